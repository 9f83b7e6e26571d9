"""What a checkpoint was trained with against what the present run says: a table of differences, refused unless allowed by name.

Learning rates, schedules, decay and betas always come from the present configuration; only what changes the meaning of the
stored numbers, or the order of the data, stands in the way.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

# Model settings that change how, not what, is computed.
FREE = ("model.attention_backend", "model.vocab_multiple", "model.fp32_residual", "fingerprints.*.prefix")
# Sections whose values must agree; of data only what decides which tokens come when.
GUARDED: tuple[str, ...] = ("model.*", "table.*", "fingerprints.*", "parameters.*")
GUARDED += ("data.seed", "data.order", "data.reset_at_document_ends", "data.split", "data.train.*.weight", "data.train.*.epochs")


@dataclass(frozen=True)
class Difference:
    """One value that is not the checkpoint's."""

    path: str
    stored: Any
    present: Any


def flatten(value: Any, path: str = "") -> dict[str, Any]:
    """Nested mappings, and lists of them, as dotted paths; everything else is a value."""
    if isinstance(value, list) and any(isinstance(inner, Mapping) for inner in value):
        value = dict(enumerate(value))
    if isinstance(value, Mapping):
        return {k: v for key, inner in value.items() for k, v in flatten(inner, f"{path}.{key}" if path else str(key)).items()}
    return {path: value}


def differences(stored: Mapping[str, Any], present: Mapping[str, Any]) -> list[Difference]:
    """Every path where the two differ, sorted; a path that one lacks counts as null there."""
    left, right = flatten(stored), flatten(present)
    paths = sorted(left.keys() | right.keys())
    return [Difference(p, left.get(p), right.get(p)) for p in paths if left.get(p) != right.get(p)]


def refused(found: Iterable[Difference], allowed: Iterable[str]) -> list[Difference]:
    """Those that must agree and are not allowed by name or pattern."""
    free = (*FREE, *allowed)
    return [d for d in found if _matches(d.path, GUARDED) and not _matches(d.path, free)]


def _matches(path: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(path, pattern) for pattern in patterns)


def side_by_side(found: Iterable[Difference], left: str = "checkpoint", right: str = "this run") -> str:
    """Differences as aligned text."""
    rows = [("setting", left, right)] + [(d.path, str(d.stored), str(d.present)) for d in found]
    widths = [min(60, max(len(row[i]) for row in rows)) for i in range(3)]
    return "\n".join("  " + "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in rows)

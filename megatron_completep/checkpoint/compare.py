"""What a checkpoint was trained with against what the present run says: a table of differences, refused unless allowed by name.

Learning rates, schedules, decay and betas always come from the present configuration; only what changes the meaning of the
stored numbers, or the order of the data, stands in the way.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from pydantic import ValidationError

from megatron_completep.config.schema import Config

# Model settings that change how, not what, is computed.
FREE = (
    "model.attention_backend",
    "model.vocab_multiple",
    "model.fp32_residual",
    "fingerprints.*.prefix",
)
# Sections whose values must agree; of data only what decides which tokens come when.
GUARDED: tuple[str, ...] = ("model.*", "table.*", "fingerprints.*", "parameters.*")
GUARDED += (
    "data.seed",
    "data.order",
    "data.reset_at_document_ends",
    "data.split",
    "data.train.*.weight",
    "data.train.*.epochs",
)
# Sections that decide what is computed.
COMPUTED = ("model", "completep", "optimizer", "data", "training", "parallel")
# What tools/checkpoint.py adapt can change: everything whose effect on the forward pass the weights can take over.
ADAPTABLE = ("model.num_layers", "model.*_multiplier", "model.attention_scale", "model.dropout")


@dataclass(frozen=True)
class Difference:
    """One value that is not the checkpoint's."""

    path: str
    stored: Any
    present: Any

    @property
    def of_other_tensors(self) -> bool:
        """A parameter that one of the two lacks, or of another shape: there is nothing to take over, whoever allows it."""
        if not self.path.startswith("parameters."):
            return False
        return self.stored is None or self.present is None or self.stored[-1] != self.present[-1]


def flatten(value: Any, path: str = "") -> dict[str, Any]:
    """Nested mappings, and lists of them, as dotted paths; everything else is a value."""
    if isinstance(value, list) and any(isinstance(inner, Mapping) for inner in value):
        value = dict(enumerate(value))
    if isinstance(value, Mapping):
        return {
            k: v
            for key, inner in value.items()
            for k, v in flatten(inner, f"{path}.{key}" if path else str(key)).items()
        }
    return {path: value}


def differences(stored: Mapping[str, Any], present: Mapping[str, Any]) -> list[Difference]:
    """Every path where the two differ, sorted; a path that one lacks counts as null there."""
    left, right = flatten(stored), flatten(present)
    paths = sorted(left.keys() | right.keys())
    return [Difference(p, left.get(p), right.get(p)) for p in paths if left.get(p) != right.get(p)]


def _by_setting(stored: Any, present: Any, path: str = "") -> list[Difference]:
    """As `differences`, but a list of sections that grew or shrank is one setting: its elements have no counterparts."""
    if (isinstance(stored, Mapping) and present is None) or (
        stored is None and isinstance(present, Mapping)
    ):
        stored, present = stored or {}, present or {}  # a section that is there in one of the two
    if isinstance(stored, Mapping) and isinstance(present, Mapping):
        inner = {
            str(key): (stored.get(key), present.get(key)) for key in stored.keys() | present.keys()
        }
    elif (
        isinstance(stored, list)
        and isinstance(present, list)
        and len(stored) == len(present)
        and _of_sections(stored + present)
    ):
        inner = {str(i): pair for i, pair in enumerate(zip(stored, present, strict=True))}
    else:
        return [Difference(path, stored, present)] if stored != present else []
    return [
        d
        for key in sorted(inner)
        for d in _by_setting(*inner[key], f"{path}.{key}" if path else key)
    ]


def _of_sections(values: Iterable[Any]) -> bool:
    return all(isinstance(value, Mapping) for value in values)


def refused(found: Iterable[Difference], allowed: Iterable[str]) -> list[Difference]:
    """Those that must agree and are not allowed by name or pattern."""
    free = (*FREE, *allowed)
    return [
        d
        for d in found
        if matches(d.path, GUARDED) and (d.of_other_tensors or not matches(d.path, free))
    ]


def changed_settings(stored: Mapping[str, Any], config: Config) -> list[Difference]:
    """What the present configuration says otherwise of what is computed. Settings that the stored one lacks have today's defaults."""
    with suppress(ValidationError):
        stored = Config.model_validate(stored).model_dump(mode="json")
    present = config.model_dump(mode="json")
    return _by_setting(
        {name: stored.get(name, {}) for name in COMPUTED},
        {name: present[name] for name in COMPUTED},
    )


def show(value: Any) -> str:
    """A value as YAML would have it."""
    return json.dumps(value, ensure_ascii=False, default=str)


def matches(path: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(path, pattern) for pattern in patterns)


def side_by_side(
    found: Iterable[Difference], left: str = "checkpoint", right: str = "this run"
) -> str:
    """Differences as aligned text."""
    rows = [("setting", left, right)] + [(d.path, show(d.stored), show(d.present)) for d in found]
    widths = [min(60, max(len(row[i]) for row in rows)) for i in range(3)]
    return "\n".join(
        "  "
        + "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )

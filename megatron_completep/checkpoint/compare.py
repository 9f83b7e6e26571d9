"""What a checkpoint was trained with against the present run: differences, which ones are refused.

Learning rates, schedules, decay and betas always come from the present configuration. What changes
the meaning of the stored numbers, or the order of the data, is refused unless the user allows it by
name.
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
    "fingerprints.*.beginning",  # compared by what it says, see `resume_check`
)
# Sections whose values must agree; of data only what decides which tokens come when.
GUARDED = (
    "model.*",
    "table.*",
    "fingerprints.*",
    "parameters.*",
    "data.seed",
    "data.order",
    "data.reset_at_document_ends",
    "data.split",
    "data.train.*.weight",
    "data.train.*.epochs",
)
# Sections that decide what is computed.
COMPUTED = ("model", "completep", "optimizer", "data", "training", "parallel")
# What tools/checkpoint.py adapt can change, as the weights can take over its effect on the forward
# pass.
ADAPTABLE = ("model.num_layers", "model.*_multiplier", "model.attention_scale", "model.dropout")
# What it can change besides, for a stage of training with longer sequences. Rotary angles are no
# part of the weights: with other ones the function is another, as is meant.
LONGER = ("model.seq_length", "model.rope_base", "model.rope_scaling*")


@dataclass(frozen=True)
class Difference:
    """One setting that is not as the checkpoint has it."""

    path: str  # dotted
    stored: Any
    present: Any

    @property
    def of_other_tensors(self) -> bool:
        """Whether a parameter is missing from one of the two, or of another shape.

        Then there is nothing to take over, whatever the user allows.
        """
        if not self.path.startswith("parameters."):
            return False
        if self.stored is None or self.present is None:
            return True
        # The shape comes last, after the role and the ratio of widths, see `identity_of`.
        return bool(self.stored[-1] != self.present[-1])


def flatten(tree: Any, path: str = "") -> dict[str, Any]:
    """Nested mappings, and lists of them, by dotted path; anything else is a leaf."""
    if isinstance(tree, list) and any(isinstance(element, Mapping) for element in tree):
        tree = dict(enumerate(tree))
    if not isinstance(tree, Mapping):
        return {path: tree}
    leaves: dict[str, Any] = {}
    for key, branch in tree.items():
        leaves |= flatten(branch, _joined(path, str(key)))
    return leaves


def _joined(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key


def differences(stored: Mapping[str, Any], present: Mapping[str, Any]) -> list[Difference]:
    """Every path where the two differ, sorted. A path that one lacks counts as null there."""
    stored_leaves = flatten(stored)
    present_leaves = flatten(present)
    differing = []
    for path in sorted(stored_leaves.keys() | present_leaves.keys()):
        difference = Difference(path, stored_leaves.get(path), present_leaves.get(path))
        if difference.stored != difference.present:
            differing.append(difference)
    return differing


def _by_setting(stored: Any, present: Any, path: str = "") -> list[Difference]:
    """The same for a user to read, where a list of sections that grew or shrank is one setting.

    The sections of such lists have no counterparts.
    """
    pairs = _counterparts(stored, present)
    if pairs is None:
        return [Difference(path, stored, present)] if stored != present else []
    differing = []
    for key in sorted(pairs):
        stored_inner, present_inner = pairs[key]
        differing += _by_setting(stored_inner, present_inner, _joined(path, key))
    return differing


def _counterparts(stored: Any, present: Any) -> dict[str, tuple[Any, Any]] | None:
    """What corresponds to each other inside of the two; None: they are compared as a whole."""
    # A section that is there in one of the two is compared with an empty one.
    if isinstance(stored, Mapping) and present is None:
        present = {}
    if isinstance(present, Mapping) and stored is None:
        stored = {}
    if isinstance(stored, Mapping) and isinstance(present, Mapping):
        pairs = {}
        for key in stored.keys() | present.keys():
            pairs[str(key)] = (stored.get(key), present.get(key))
        return pairs
    if not isinstance(stored, list) or not isinstance(present, list):
        return None
    if len(stored) != len(present) or not _of_sections(stored + present):
        return None
    return {str(i): pair for i, pair in enumerate(zip(stored, present, strict=True))}


def _of_sections(elements: Iterable[Any]) -> bool:
    return all(isinstance(element, Mapping) for element in elements)


def refused(differing: Iterable[Difference], allowed: Iterable[str]) -> list[Difference]:
    """The differences that must not be, unless a pattern in `allowed` names them."""
    free = (*FREE, *allowed)
    refused_differences = []
    for difference in differing:
        if not matches(difference.path, GUARDED):
            continue
        if difference.of_other_tensors or not matches(difference.path, free):
            refused_differences.append(difference)
    return refused_differences


def changed_settings(stored: Mapping[str, Any], config: Config) -> list[Difference]:
    """The settings of the present configuration that change what is computed.

    stored: the configuration of the checkpoint.
    """
    # Settings that the stored one lacks have today's defaults. One that is not valid today is
    # compared as it is.
    with suppress(ValidationError):
        stored = Config.model_validate(stored).model_dump(mode="json")
    present = config.model_dump(mode="json")
    stored_sections = {name: stored.get(name, {}) for name in COMPUTED}
    present_sections = {name: present[name] for name in COMPUTED}
    return _by_setting(stored_sections, present_sections)


def show(setting: Any) -> str:
    """A setting as YAML would have it."""
    return json.dumps(setting, ensure_ascii=False, default=str)


def matches(path: str, patterns: Iterable[str]) -> bool:
    """Whether one of the patterns matches the whole path."""
    return any(fnmatchcase(path, pattern) for pattern in patterns)


def side_by_side(
    differing: Iterable[Difference],
    stored_title: str = "checkpoint",
    present_title: str = "this run",
) -> str:
    """Differences as aligned columns."""
    rows = [("setting", stored_title, present_title)]
    for difference in differing:
        rows.append((difference.path, show(difference.stored), show(difference.present)))
    # A long value does not push the columns of all rows apart.
    widths = [min(60, max(map(len, column))) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        lines.append("  " + "  ".join(cells).rstrip())
    return "\n".join(lines)

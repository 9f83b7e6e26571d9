"""Data that a run left out when it went back after a loss spike.

`rollbacks.json` in the run's folder lists them, and so is a part of its data order. An entry says:
after step s, where sample a would come next, sample b comes. A run that passes that place skips to
b, at the first time and at any other. So the order of the data is a function of the run's folder,
and never of when the run was interrupted.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import xxhash

from megatron_completep.config.derived import samples_before
from megatron_completep.config.schema import TrainingConfig
from megatron_completep.data.files import read_json
from megatron_completep.errors import DataError
from megatron_completep.files import write_whole

ROLLBACKS = "rollbacks.json"


@dataclass(frozen=True)
class LeftOut:
    """After step `after_step`, samples `first_sample` .. `next_sample` - 1 are left out."""

    after_step: int
    first_sample: int
    next_sample: int
    spike_step: int  # where the loss had jumped


def past(entries: Sequence[LeftOut], step: int, consumed_samples: int) -> int:
    """The sample that comes after step `step`.

    consumed_samples: the one that would come if nothing were left out at exactly this place.
    """
    # Several entries may follow one another at the same step: a later one begins where this ends.
    for entry in entries:
        if (step, consumed_samples) == (entry.after_step, entry.first_sample):
            consumed_samples = entry.next_sample
    return consumed_samples


def first_sample_of(
    training: TrainingConfig,
    step: int,
    entries: Sequence[LeftOut],
    start_step: int = 0,
    start_samples: int = 0,
) -> int:
    """Number within the run of the first sample of step `step` (from 1).

    training: in force since `start_step`, after which `start_samples` had been consumed.
    """
    rollback_steps = {entry.after_step for entry in entries}
    # Samples by which the run is ahead of its plan: the configuration's batches from the first on.
    ahead = start_samples - samples_before(training, start_step + 1)
    for rollback_step in sorted(rollback_steps):
        if start_step <= rollback_step < step:
            planned = samples_before(training, rollback_step + 1)
            ahead = past(entries, rollback_step, planned + ahead) - planned
    return samples_before(training, step) + ahead


def read_left_out(output_dir: Path) -> list[LeftOut]:
    """The entries of a run's folder in the order in which they came; none where there is no file.

    Files of earlier versions are the bare list, without a hash. Raises DataError for a file that
    was changed.
    """
    path = output_dir / ROLLBACKS
    try:
        if not path.exists():
            return []
        content = read_json(path)
        entries = content if isinstance(content, list) else content["left_out"]
        if isinstance(content, dict) and content["xxh3_64"] != _hash(entries):
            raise ValueError(f"its hash is {_hash(entries)}, expected {content['xxh3_64']}")
        return [_entry(fields) for fields in entries]
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise DataError(
            f"{path}: not a list of rollbacks ({error}). It says which data the run leaves out: "
            "restore it, or remove it to leave out none."
        ) from None


def _entry(fields: Mapping[str, Any]) -> LeftOut:
    return LeftOut(**{name: int(number) for name, number in fields.items()})


def write_left_out(output_dir: Path, entries: Sequence[LeftOut]) -> None:
    """Replace the file in one move; it is on the disk before this returns. Raises OSError."""
    listed = [asdict(entry) for entry in entries]
    content = {"left_out": listed, "xxh3_64": _hash(listed)}
    write_whole(output_dir / ROLLBACKS, json.dumps(content, indent=1).encode())


def _hash(entries: list[dict[str, int]]) -> str:
    return xxhash.xxh3_64_hexdigest(json.dumps(entries, sort_keys=True).encode())

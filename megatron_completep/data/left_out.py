"""Data that a run left out when it went back after a loss spike: `rollbacks.json` in its folder, a part of its data order.

An entry says: after step s, where sample a would come next, sample b comes. Whoever passes that place jumps, at the first time and at
any other, so that the order of the data is a function of the run's folder and never of when the run was interrupted.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

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
    """The sample that comes after step `step`, where `consumed_samples` would come if nothing were left out just there."""
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
    jumped = start_samples - samples_before(training, start_step + 1)
    for earlier in sorted(
        {entry.after_step for entry in entries if start_step <= entry.after_step < step}
    ):
        planned = samples_before(training, earlier + 1)
        jumped = past(entries, earlier, planned + jumped) - planned
    return samples_before(training, step) + jumped


def read_left_out(output_dir: Path) -> list[LeftOut]:
    """In the order in which it happened; nothing where there is no file. Raises DataError for a file that was changed.

    Files of earlier versions are the bare list, without a hash.
    """
    path = output_dir / ROLLBACKS
    try:
        content = read_json(path) if path.exists() else []
        entries = content if isinstance(content, list) else content["left_out"]
        if isinstance(content, dict) and content["xxh3_64"] != _hash(entries):
            raise ValueError(f"its hash is {_hash(entries)}, expected {content['xxh3_64']}")
        return [LeftOut(**{name: int(value) for name, value in entry.items()}) for entry in entries]
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise DataError(
            f"{path}: not a list of rollbacks ({error}). It says which data the run leaves out: restore it, or remove it to leave out none."
        ) from None


def write_left_out(output_dir: Path, entries: Sequence[LeftOut]) -> None:
    """Replace the file in one move, on disk before this returns."""
    listed = [asdict(entry) for entry in entries]
    content = {"left_out": listed, "xxh3_64": _hash(listed)}
    write_whole(output_dir / ROLLBACKS, json.dumps(content, indent=1).encode())


def _hash(entries: list[dict[str, int]]) -> str:
    return xxhash.xxh3_64_hexdigest(json.dumps(entries, sort_keys=True).encode())

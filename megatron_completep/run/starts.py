"""The record of a run's starts: `starts.jsonl` in its folder, one line a start, never rewritten.

A line holds the step from which the start continued, the samples consumed until then, and the whole
configuration. So the samples that a step read can be told later, whatever the configuration says by
then. `config.yaml` holds the configuration of the newest start.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_completep.config import Config, config_from_mapping
from megatron_completep.config.derived import batch_size
from megatron_completep.data.left_out import LeftOut, first_sample_of
from megatron_completep.errors import DataError
from megatron_completep.files import append_line
from megatron_completep.run.state import RunState

STARTS = "starts.jsonl"


@dataclass(frozen=True)
class Start:
    """The run continued after `step`, where `consumed_samples` sequences had been read."""

    step: int
    consumed_samples: int
    config: dict[str, Any]


def append_start(folder: Path, config: Config, state: RunState) -> None:
    """Record a start, unless it equals the newest one: a restart that found the same step.

    Raises OSError, DataError.
    """
    start = Start(state.step, state.consumed_samples, config.model_dump(mode="json"))
    if read_starts(folder)[-1:] != [start]:
        append_line(folder / STARTS, json.dumps(asdict(start)).encode())


def read_starts(folder: Path) -> list[Start]:
    """All starts, oldest first; empty for a run of an older version, which has no record.

    Raises DataError for a line that is not a start.
    """
    path = folder / STARTS
    if not path.exists():
        return []
    # A kill may have cut off what follows the last newline.
    complete_lines = path.read_bytes().split(b"\n")[:-1]
    starts = []
    for number, line in enumerate(complete_lines, 1):
        try:
            starts.append(_parse_start(line))
        except (ValueError, TypeError, RecursionError) as error:
            raise DataError(
                f"{path}, line {number}: not a start ({error}). "
                "Restore the file, or move it away to go on without it."
            ) from None
    return starts


def _parse_start(line: bytes) -> Start:
    start = Start(**json.loads(line))
    for count in (start.step, start.consumed_samples):
        # `type` and not `isinstance`: true is an int, too.
        if type(count) is not int or count < 0:
            raise ValueError(f"step {start.step}, consumed_samples {start.consumed_samples}")
    return start


def start_of(starts: Sequence[Start], step: int) -> Start | None:
    """The start that made step `step` of the run as it stands now.

    That is the newest one that began before the step. None: the record begins after it.
    """
    return next((start for start in reversed(starts) if start.step < step), None)


def samples_read(
    start: Start, left_out: Sequence[LeftOut], step: int, name: str = STARTS
) -> tuple[Config, range]:
    """The configuration under which a start makes step `step`, and the samples that the step reads.

    Samples are numbered within the run. left_out: what the run's rollbacks left out.
    Raises ConfigError where this version does not read the configuration.
    """
    config = config_from_mapping(start.config, name=f"{name}: the start after step {start.step}")
    first_sample = first_sample_of(
        config.training, step, left_out, start.step, start.consumed_samples
    )
    return config, range(first_sample, first_sample + batch_size(config.training, step))

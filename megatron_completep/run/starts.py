"""The run's own record: `starts.jsonl` in its folder, a line for each start, never rewritten.

A line holds the step from which the start went on, the samples consumed until then, and the whole configuration. So what a step
read can be told later, whatever the configuration says by then; `config.yaml` is that of the newest start.
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
    """The run went on after `step`, where `consumed_samples` sequences had been read."""

    step: int
    consumed_samples: int
    config: dict[str, Any]


def append_start(folder: Path, config: Config, state: RunState) -> None:
    """Remember a start; one that equals the newest (a restart that found the same step) is there already. Raises OSError, DataError."""
    start = Start(state.step, state.consumed_samples, config.model_dump(mode="json"))
    if read_starts(folder)[-1:] != [start]:
        append_line(folder / STARTS, json.dumps(asdict(start)).encode())


def read_starts(folder: Path) -> list[Start]:
    """Oldest first; none where there is no record, as runs of before have none. Raises DataError for a line that is none."""
    path = folder / STARTS
    lines = (
        path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    )  # what follows the last newline was cut off by a kill
    starts = []
    for number, line in enumerate(lines, 1):
        try:
            start = Start(**json.loads(line))
            if (
                type(start.step) is not int
                or type(start.consumed_samples) is not int
                or min(start.step, start.consumed_samples) < 0
            ):
                raise ValueError(f"step {start.step}, consumed_samples {start.consumed_samples}")
        except (ValueError, TypeError, RecursionError) as error:
            raise DataError(
                f"{path}, line {number}: not a start ({error}). Restore the file, or move it away to go on without it."
            ) from None
        starts.append(start)
    return starts


def start_of(starts: Sequence[Start], step: int) -> Start | None:
    """The start that made step `step` as the run stands now: the newest that began before it. None: the record begins after it."""
    return next((start for start in reversed(starts) if start.step < step), None)


def samples_read(
    start: Start, left_out: Sequence[LeftOut], step: int, name: str = STARTS
) -> tuple[Config, range]:
    """The configuration under which a start makes step `step`, and the numbers within the run of the samples that the step reads.

    left_out: what the run's rollbacks left out. Raises ConfigError: this version does not read the configuration.
    """
    config = config_from_mapping(start.config, name=f"{name}: the start after step {start.step}")
    first = first_sample_of(config.training, step, left_out, start.step, start.consumed_samples)
    return config, range(first, first + batch_size(config.training, step))

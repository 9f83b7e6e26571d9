"""What a run reports: `metrics.jsonl`, one console line per interval, and the trackers."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch

from megatron_completep.config.json_text import parse_json
from megatron_completep.config.schema import Config
from megatron_completep.errors import ConfigError, DataError
from megatron_completep.run.hook import Row
from megatron_completep.telemetry.trackers import Sink, open_trackers

METRICS = "metrics.jsonl"


class MetricsFile:
    """`metrics.jsonl`: one JSON object per step.

    Floats have full precision (they read back bit for bit); those that are not finite are null.
    Opening the file truncates rows after `last_step`, which a resumed run will write again, and an
    incomplete last line. While the disk is full, rows are kept in memory; this is reported once,
    and training continues.
    """

    def __init__(self, path: Path, last_step: int, say: Callable[[str], None]):
        try:
            cut_metrics(path, last_step)
            # Unbuffered: what was written survives the end of the process, whatever ends it.
            self._file = path.open("ab", buffering=0)
        except OSError as error:
            raise ConfigError(
                f"{path} cannot be written: {error.strerror}. "
                "Choose another training.output_dir, or make the file writable."
            ) from None
        self._path = path
        self._say = say
        self._waiting = b""
        self._has_warned = False

    def write(self, row: Row) -> None:
        self._follow_path()
        finite_row = {name: _finite(figure) for name, figure in row.items()}
        self._waiting += json.dumps(finite_row, allow_nan=False).encode() + b"\n"
        self._write()

    def _follow_path(self) -> None:
        """Open a new file if the old one was removed.

        Otherwise rows would go to the deleted file and be lost silently.
        """
        if os.path.lexists(self._path):
            return
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            # Nothing has to be truncated: the file is new.
            new_file = self._path.open("ab", buffering=0)
        except OSError:
            return  # the next save, which needs the folder too, reports it
        self._file.close()
        self._file = new_file
        self._say(
            f"warning: {self._path} was removed while the run was writing it; a new file starts "
            "with the next row"
        )

    def _write(self) -> None:
        try:
            # One call may write only a part of the bytes.
            while self._waiting:
                written = self._file.write(self._waiting)
                self._waiting = self._waiting[written:]
        except OSError as error:
            if self._has_warned:
                return
            self._has_warned = True
            self._say(
                f"warning: {self._file.name} cannot be written: {error.strerror}. "
                "Rows wait in memory; training goes on."
            )

    def close(self) -> None:
        self._write()
        self._file.close()


def _finite(figure: Any) -> Any:
    """The figure, or None for a float that JSON cannot hold."""
    return None if isinstance(figure, float) and not math.isfinite(figure) else figure


def cut_metrics(path: Path, last_step: int) -> None:
    """Truncate the file after its last complete row with step <= last_step.

    A single truncate call without a copy: after a kill the file has either its old or its new
    length, and it works on a full disk.
    """
    if not path.exists():
        return
    end = 0
    position = 0
    with path.open("rb") as file:
        for line in file:
            position += len(line)
            row = _row_of(line)
            if row is None:
                continue
            # A run that begins anew writes its step 0 again, too.
            if row["step"] > last_step or last_step == 0:
                break
            end = position
    if end < path.stat().st_size:
        os.truncate(path, end)


def _row_of(line: bytes) -> dict[str, Any] | None:
    """The row of a line, or None if the line is not a complete row. Losses may be NaN."""
    # A last line without its newline was torn by a kill.
    if not line.endswith(b"\n"):
        return None
    try:
        row = parse_json(line, "a line of metrics", finite=False)
    except DataError:
        return None
    if not isinstance(row, dict) or not isinstance(row.get("step"), int):
        return None
    return row if row["step"] >= 0 else None


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All complete rows of a `metrics.jsonl`; an incomplete last line is left out."""
    rows = []
    for line in path.read_bytes().splitlines(keepends=True):
        row = _row_of(line)
        if row is not None:
            rows.append(row)
    return rows


class ConsoleLines:
    """One console line per interval, averaged over its steps.

    The first step is printed at once, so that a slow start can be seen.
    """

    def __init__(self, interval: int, train_steps: int, say: Callable[[str], None]):
        self._interval = interval
        self._train_steps = train_steps
        self._say = say
        self._rows: list[Row] = []
        self._has_begun = False

    def write(self, row: Row) -> None:
        # What was found out before the first step has been said.
        if row["step"] == 0:
            return
        self._rows.append(row)
        # Also print after the last step, whose interval may be incomplete.
        ends_interval = row["step"] % self._interval == 0 or row["step"] == self._train_steps
        if ends_interval or not self._has_begun:
            self._say(describe(self._rows, self._train_steps))
            self._has_begun = True
        if ends_interval:
            self._rows.clear()

    def close(self) -> None:
        """Nothing is buffered, so there is nothing to do."""


def describe(rows: list[Row], train_steps: int) -> str:
    """Some steps in one line.

    It holds the mean loss, the last learning rate and gradient norm, throughput, memory, the share
    of time spent waiting for data if it is above one percent, and the time that is left.
    """
    last_row = rows[-1]
    seconds = sum(row["step_seconds"] for row in rows)
    losses = [row["loss"] for row in rows if not row["skipped"]]
    mean_loss = sum(losses) / len(losses) if losses else math.nan
    # Average the rates (tokens/s here, MFU further down) weighted by step time.
    tokens = sum(row["tokens_per_second"] * row["step_seconds"] for row in rows)
    waiting_share = sum(row["data_wait_seconds"] for row in rows) / seconds
    digits = len(str(train_steps))

    phrases = [
        f"step {last_row['step']:>{digits}}/{train_steps}",
        f"loss {mean_loss:7.4f}",
        f"lr {last_row['lr']:.2e}",
        f"grad norm {last_row['grad_norm']:.3f}",
        f"{tokens / seconds:,.0f} tokens/s",
    ]
    if last_row["mfu"] is not None:
        mfu = sum(row["mfu"] * row["step_seconds"] for row in rows) / seconds
        phrases.append(f"mfu {100 * mfu:.1f} %")
    phrases.append(f"memory {last_row['memory_bytes'] / 2**30:.2f} GiB")
    # Less than one percent is noise.
    if waiting_share > 0.01:
        phrases.append(f"waiting for data {100 * waiting_share:.0f} %")
    skipped = len(rows) - len(losses)
    if skipped:
        phrases.append(f"{skipped} skipped")
    # Extrapolated from the mean of these steps; excludes validation and saving.
    seconds_left = (train_steps - last_row["step"]) * seconds / len(rows)
    phrases.append(f"{_duration(seconds_left)} left")
    return "  ".join(phrases)


def _duration(seconds: float) -> str:
    """Hours, minutes and seconds, such as 1:02:03, or 2:03 without hours."""
    minutes, full_seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}:{minutes:02}:{full_seconds:02}"
    return f"{minutes}:{full_seconds:02}"


def memory_bytes(device: torch.device) -> int:
    """Peak allocated memory of the GPU so far, or the resident memory of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return int(psutil.Process().memory_info().rss)


def open_sinks(config: Config, last_step: int, say: Callable[[str], None]) -> list[Sink]:
    """The sinks that the configuration asks for. The run continues after `last_step`."""
    file = MetricsFile(Path(config.training.output_dir) / METRICS, last_step, say)
    return [
        file,
        *open_trackers(config, last_step, say),
        ConsoleLines(config.logging.interval, config.training.train_steps, say),
    ]

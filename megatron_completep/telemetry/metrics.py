"""What a run reports: `metrics.jsonl` (one object a step), a console line an interval, and the trackers (trackers.py)."""

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
from megatron_completep.telemetry.trackers import Row, Sink, open_trackers

METRICS = "metrics.jsonl"


class MetricsFile:
    """`metrics.jsonl`: one object a step, floats at full precision (they read back bit for bit), not-finite ones as null.

    Opening it cuts off the steps after `last_step`, which a resumed run does again, and a last line that a kill left torn. While the
    disk is full, what cannot be written waits in memory; that is said once, and training goes on.
    """

    def __init__(self, path: Path, last_step: int, say: Callable[[str], None]):
        try:
            cut_metrics(path, last_step)
            self._file = path.open("ab", buffering=0)
        except OSError as error:
            raise ConfigError(
                f"{path} cannot be written: {error.strerror}. Choose another training.output_dir, or mend the file."
            ) from None
        self._path, self._say, self._waiting, self._warned = path, say, b"", False

    def write(self, row: Row) -> None:
        self._follow_path()
        self._waiting += (
            json.dumps(
                {name: _finite(value) for name, value in row.items()}, allow_nan=False
            ).encode()
            + b"\n"
        )
        self._write()

    def _follow_path(self) -> None:
        """Rows written to a file that has lost its name would be lost with it, without a word."""
        if os.path.lexists(self._path):
            return
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            again = self._path.open("ab", buffering=0)
        except OSError:
            return  # said by whoever needs the folder next
        self._file.close()
        self._file = again
        self._say(
            f"warning: {self._path} was removed under the run; a new one begins with the next row"
        )

    def _write(self) -> None:
        try:
            while self._waiting:
                self._waiting = self._waiting[self._file.write(self._waiting) :]
        except OSError as error:
            if not self._warned:
                self._warned = True
                self._say(
                    f"warning: {self._file.name} cannot be written: {error.strerror}. Rows wait in memory; training goes on."
                )

    def close(self) -> None:
        self._write()
        self._file.close()


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def cut_metrics(path: Path, last_step: int) -> None:
    """Cut the file after the last whole line of a step up to `last_step`. Its end moves in one call and nothing is copied: a kill
    leaves one of the two files, and a full disk is no obstacle."""
    if not path.exists():
        return
    end = position = 0
    with path.open("rb") as file:
        for line in file:
            position += len(line)
            step = _step_of(line) if line.endswith(b"\n") else -1
            if step > last_step:
                break
            if step >= 0:
                end = position
    if end < path.stat().st_size:
        os.truncate(path, end)


def _step_of(line: bytes) -> int:
    """The step of a line, -1 for a line that is none."""
    row = _row_of(line)
    return -1 if row is None else row["step"]


def _row_of(line: bytes) -> dict[str, Any] | None:
    """The row of a line; None for a line that is none. Losses may be NaN."""
    try:
        row = parse_json(line, "a line of metrics", finite=False)
    except DataError:
        return None
    return row if isinstance(row, dict) and isinstance(row.get("step"), int) else None


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All whole rows of a `metrics.jsonl`; a torn last line is left out."""
    lines = path.read_bytes().splitlines(keepends=True)
    rows = [row for line in lines if line.endswith(b"\n") and (row := _row_of(line)) is not None]
    return [row for row in rows if row["step"] >= 0]


class ConsoleLines:
    """One line an interval: averages over its steps. The first step is said at once, so that a slow start is seen."""

    def __init__(self, interval: int, train_steps: int, say: Callable[[str], None]):
        self._interval, self._train_steps, self._say = interval, train_steps, say
        self._rows: list[Row] = []
        self._begun = False

    def write(self, row: Row) -> None:
        self._rows.append(row)
        ends = row["step"] % self._interval == 0 or row["step"] == self._train_steps
        if ends or not self._begun:
            self._say(describe(self._rows, self._train_steps))
            self._begun = True
        if ends:
            self._rows.clear()

    def close(self) -> None:
        pass


def describe(rows: list[Row], train_steps: int) -> str:
    """Steps in words: mean loss, last learning rate and gradient norm, throughput, the share of time spent waiting for data."""
    last, seconds = rows[-1], sum(row["step_seconds"] for row in rows)
    done = [row["loss"] for row in rows if not row["skipped"]]
    loss = sum(done) / len(done) if done else math.nan
    throughput = sum(row["tokens_per_second"] * row["step_seconds"] for row in rows) / seconds
    width = len(str(train_steps))
    parts = [
        f"step {last['step']:>{width}}/{train_steps}",
        f"loss {loss:7.4f}",
        f"lr {last['lr']:.2e}",
        f"grad norm {last['grad_norm']:.3f}",
        f"{throughput:,.0f} tokens/s",
    ]
    if last["mfu"] is not None:
        parts.append(
            f"mfu {100 * sum(row['mfu'] * row['step_seconds'] for row in rows) / seconds:.1f} %"
        )
    parts.append(f"memory {last['memory_bytes'] / 2**30:.2f} GiB")
    waited = sum(row["data_wait_seconds"] for row in rows) / seconds
    if waited > 0.01:
        parts.append(f"waiting for data {100 * waited:.0f} %")
    if len(done) < len(rows):
        parts.append(f"{len(rows) - len(done)} skipped")
    parts.append(f"left {_duration((train_steps - last['step']) * seconds / len(rows))}")
    return "  ".join(parts)


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def memory_bytes(device: torch.device) -> int:
    """Peak allocated memory of the GPU so far, or this process's resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return int(psutil.Process().memory_info().rss)


def open_sinks(config: Config, last_step: int, say: Callable[[str], None]) -> list[Sink]:
    """Everything that rows go to; `last_step` is the step that the run goes on from."""
    file = MetricsFile(Path(config.training.output_dir) / METRICS, last_step, say)
    return [
        file,
        *open_trackers(config, last_step, say),
        ConsoleLines(config.logging.interval, config.training.train_steps, say),
    ]

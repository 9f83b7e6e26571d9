"""What a run reports: `metrics.jsonl` (one object a step), TensorBoard events, and a console line an interval."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import psutil
import torch

from megatron_completep.config.schema import LoggingConfig
from megatron_completep.errors import UserError

Row = Mapping[str, Any]


class Sink(Protocol):
    """Somewhere to write rows of figures."""

    def write(self, row: Row) -> None: ...
    def close(self) -> None: ...


class MetricsFile:
    """`metrics.jsonl`: one object a step, floats at full precision (they read back bit for bit), not-finite ones as null.

    Opening it cuts off the steps after `last_step`, which a resumed run does again, and a last line that a kill left torn.
    """

    def __init__(self, path: Path, last_step: int):
        cut_metrics(path, last_step)
        self._file = path.open("a", encoding="utf-8")

    def write(self, row: Row) -> None:
        self._file.write(json.dumps({name: _finite(value) for name, value in row.items()}, allow_nan=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def cut_metrics(path: Path, last_step: int) -> None:
    """Keep the whole lines of steps up to `last_step`; the file is replaced in one move, so a kill leaves one of the two."""
    if not path.exists():
        return
    kept = [line for line in path.read_bytes().splitlines(keepends=True) if line.endswith(b"\n") and 0 <= _step_of(line) <= last_step]
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("wb") as file:
        file.writelines(kept)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def _step_of(line: bytes) -> int:
    """The step of a line, -1 for a line that is none."""
    try:
        row = json.loads(line)
    except ValueError:
        return -1
    step = row.get("step") if isinstance(row, dict) else None
    return step if isinstance(step, int) else -1


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All whole rows of a `metrics.jsonl`; a torn last line is left out."""
    lines = path.read_bytes().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith(b"\n") and _step_of(line) >= 0]


class TensorBoard:
    """One scalar a figure, as TensorBoard event files; a resumed run hides the steps that it does again."""

    def __init__(self, folder: Path, last_step: int):
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._event, self._summary = Event, Summary
        self._writer = EventFileWriter(str(folder))
        if last_step:
            self._writer.add_event(Event(wall_time=time.time(), step=last_step + 1, session_log=SessionLog(status=SessionLog.START)))

    def write(self, row: Row) -> None:
        values = [self._summary.Value(tag=name, simple_value=value) for name, value in row.items() if name != "step" and _is_number(value)]
        self._writer.add_event(self._event(wall_time=time.time(), step=row["step"], summary=self._summary(value=values)))

    def close(self) -> None:
        self._writer.close()


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float)


class WeightsAndBiases:
    """A Weights & Biases run of the output folder's name."""

    def __init__(self, project: str, folder: Path):
        try:
            import wandb
        except ImportError as error:
            raise UserError(
                f"logging.wandb_project = {project} needs the package wandb: pip install 'megatron-completep[tracking]'."
            ) from error
        self._run = wandb.init(project=project, name=folder.name, dir=str(folder), resume="allow", id=folder.name)

    def write(self, row: Row) -> None:
        self._run.log(dict(row), step=row["step"])

    def close(self) -> None:
        self._run.finish()


class Optional:
    """A sink whose failure is said once and never stops the training."""

    def __init__(self, sink: Sink, say: Callable[[str], None]):
        self._sink: Sink | None = sink
        self._say = say

    def write(self, row: Row) -> None:
        self._try(lambda sink: sink.write(row))

    def close(self) -> None:
        self._try(lambda sink: sink.close())

    def _try(self, action: Callable[[Sink], None]) -> None:
        if self._sink is None:
            return
        try:
            action(self._sink)
        except Exception as error:  # whatever a logging library raises
            self._say(f"warning: {type(self._sink).__name__} failed and is left out from here on: {error}")
            self._sink = None


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
        parts.append(f"mfu {100 * sum(row['mfu'] * row['step_seconds'] for row in rows) / seconds:.1f} %")
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


def say_on_stdout(text: str) -> None:
    """A line for the person watching, at once even through a pipe."""
    print(text, file=sys.stdout, flush=True)


def open_sinks(logging: LoggingConfig, folder: Path, train_steps: int, last_step: int, say: Callable[[str], None]) -> list[Sink]:
    """Everything that rows go to; `last_step` is the step that the run goes on from."""
    sinks: list[Sink] = [MetricsFile(folder / "metrics.jsonl", last_step)]
    if logging.tensorboard:
        sinks.append(Optional(TensorBoard(folder / "tensorboard", last_step), say))
    if logging.wandb_project is not None:
        sinks.append(Optional(WeightsAndBiases(logging.wandb_project, folder), say))
    return [*sinks, ConsoleLines(logging.interval, train_steps, say)]

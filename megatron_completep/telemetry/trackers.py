"""Trackers: where figures go beside `metrics.jsonl` (TensorBoard, Weights & Biases, trackio). None of them can stop or stall a run.

Each works in a thread of its own. A tracker that raises, or takes no rows for too long, is left out with one warning line; the
training never waits for it, but for CLOSING_SECONDS at the very end.
"""

from __future__ import annotations

import importlib.util
import os
import queue
import re
import socket
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

import xxhash

from megatron_completep.config.schema import Config
from megatron_completep.errors import ConfigError

Row = Mapping[str, Any]
Say = Callable[[str], None]
WAITING_ROWS = 10_000  # steps that a tracker may lag behind
CLOSING_SECONDS = 30.0  # for what still waits when the run ends


class Sink(Protocol):
    """Somewhere to write rows of figures."""

    def write(self, row: Row) -> None: ...
    def close(self) -> None: ...


class InBackground:
    """A tracker opened, fed and closed by a thread of its own. Its failure is said once; from then on it gets nothing."""

    def __init__(
        self,
        name: str,
        start: Callable[[], Sink],
        say: Say,
        rows: int = WAITING_ROWS,
        patience: float | None = None,
    ):
        self._name, self._start, self._say = name, start, say
        self._patience = CLOSING_SECONDS if patience is None else patience
        self._rows: queue.Queue[Row | None] = queue.Queue(rows)
        self._left, self._leaving = False, threading.Lock()
        self._thread = threading.Thread(target=self._run, name=f"tracker {name}", daemon=True)
        self._thread.start()

    def write(self, row: Row) -> None:
        if self._left:
            return
        try:
            self._rows.put_nowait(row)
        except queue.Full:
            self._leave(f"it has not taken the last {self._rows.maxsize} rows")

    def close(self) -> None:
        if self._left:
            return
        until = time.monotonic() + self._patience
        with suppress(queue.Full):
            self._rows.put(None, timeout=self._patience)
        self._thread.join(max(0.0, until - time.monotonic()))
        if self._thread.is_alive():
            self._leave(f"it did not finish within {self._patience:g} s")

    def _run(self) -> None:
        try:
            sink = self._start()
            while not self._left and (row := self._rows.get()) is not None:
                sink.write(row)
            sink.close()
        except BaseException as error:  # whatever a logging library raises; some call sys.exit
            self._leave(f"{type(error).__name__}: {' '.join(str(error).split())}")

    def _leave(self, reason: str) -> None:
        with self._leaving:
            if not self._left:
                self._left = True
                self._say(
                    f"warning: {self._name} is left out from here on: {reason}. Training goes on; metrics.jsonl has every step."
                )


class TensorBoard:
    """One scalar a figure, as TensorBoard event files; a resumed run hides the steps that it does again."""

    def __init__(self, folder: Path, last_step: int):
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._event, self._summary = Event, Summary
        folder.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{int(time.time()):010}.{socket.gethostname()}.{os.getpid()}.{time.monotonic_ns()}"
        # Not through EventFileWriter: its thread prints a traceback of its own when the disk is full.
        self._writer = RecordWriter((folder / name).open("wb"))
        self._add(file_version="brain.Event:2")
        if last_step:
            self._add(step=last_step + 1, session_log=SessionLog(status=SessionLog.START))

    def write(self, row: Row) -> None:
        values = [
            self._summary.Value(tag=name, simple_value=value)
            for name, value in figures(row).items()
        ]
        self._add(step=row["step"], summary=self._summary(value=values))

    def _add(self, **parts: Any) -> None:
        self._writer.write(self._event(wall_time=time.time(), **parts).SerializeToString())
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """A Weights & Biases run; offline, it lies in output_dir/wandb until `wandb sync`. A resumed run goes on under its id."""

    def __init__(self, config: Config):
        import wandb

        folder = Path(config.training.output_dir)
        self._run = wandb.init(
            project=config.logging.project,
            name=run_name(config),
            id=run_id(config),
            resume="allow",
            dir=str(folder),
            mode="offline" if config.logging.offline else "online",
            config=config.model_dump(mode="json"),
            settings=wandb.Settings(console="off", quiet=True, x_disable_stats=True),
        )

    def write(self, row: Row) -> None:
        self._run.log(figures(row), step=row["step"])

    def close(self) -> None:
        self._run.finish()


class Trackio:
    """A trackio run, in trackio's own database on this machine (its TRACKIO_DIR), which `trackio show` draws."""

    def __init__(self, config: Config):
        import trackio

        self._run = trackio.init(
            project=config.logging.project,
            name=run_id(config),
            resume="allow",
            config=config.model_dump(mode="json"),
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )

    def write(self, row: Row) -> None:
        self._run.log(figures(row), step=row["step"])

    def close(self) -> None:
        self._run.finish()


def open_trackers(config: Config, last_step: int, say: Say) -> list[Sink]:
    """The trackers that `logging` names; ConfigError where one is not installed. `last_step`: where the run goes on from."""
    logging, folder = config.logging, Path(config.training.output_dir)
    missing = [name for name in logging.trackers if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"logging.trackers names {' and '.join(missing)}, not installed here. pip install 'megatron-completep[tracking]', "
            "or take the name out."
        )
    starts: dict[str, Callable[[], Sink]] = {
        "wandb": lambda: WeightsAndBiases(config),
        "trackio": lambda: Trackio(config),
    }
    trackers: list[Sink] = [InBackground(name, starts[name], say) for name in logging.trackers]
    if logging.tensorboard:
        trackers.append(
            InBackground("tensorboard", lambda: TensorBoard(folder / "tensorboard", last_step), say)
        )
    return trackers


def figures(row: Row) -> dict[str, float]:
    """What of a row is a number, without the step."""
    return {
        name: value
        for name, value in row.items()
        if name != "step" and isinstance(value, int | float)
    }


def run_name(config: Config) -> str:
    return config.logging.run_name or Path(config.training.output_dir).name


def run_id(config: Config) -> str:
    """The same for every start in the same output_dir, another for any other; letters, digits, - and _ only."""
    place = xxhash.xxh64_hexdigest(str(Path(config.training.output_dir).absolute()).encode())
    return f"{re.sub(r'[^A-Za-z0-9_-]', '-', run_name(config))[:64]}-{place[:8]}"

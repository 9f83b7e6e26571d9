"""Trackers: where figures go besides `metrics.jsonl` (TensorBoard, Weights & Biases, trackio).

No tracker can stop or stall a run. Each works in a thread of its own. One that raises, or takes no
rows for too long, is left out with one warning line; training never waits for it, except for
CLOSING_SECONDS at the very end.
"""

from __future__ import annotations

import importlib.util
import os
import queue
import re
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

import xxhash

from megatron_completep.config.schema import Config
from megatron_completep.errors import ConfigError
from megatron_completep.run.hook import Row

Say = Callable[[str], None]
WAITING_ROWS = 10_000  # steps by which a tracker may lag behind
CLOSING_SECONDS = 30.0  # for the rows that still wait when the run ends


class Sink(Protocol):
    """A place to write rows of figures to."""

    def write(self, row: Row) -> None:
        """Write the figures of one step."""

    def close(self) -> None:
        """Write what still waits, and end."""


class InBackground:
    """A tracker that is opened, fed and closed by a thread of its own.

    Its failure is reported once; from then on it gets no rows.
    """

    def __init__(
        self,
        name: str,
        start: Callable[[], Sink],
        say: Say,
        rows: int = WAITING_ROWS,
        patience: float | None = None,
    ):
        """start: opens the tracker, in the thread.

        rows: how many may wait. patience: seconds to wait for them when the run ends.
        """
        self._name = name
        self._start = start
        self._say = say
        self._patience = CLOSING_SECONDS if patience is None else patience
        self._rows: queue.Queue[Row | None] = queue.Queue(rows)
        self._is_left_out = False
        self._leaving = threading.Lock()
        self._thread = threading.Thread(target=self._run, name=f"tracker {name}", daemon=True)
        self._thread.start()

    def write(self, row: Row) -> None:
        if self._is_left_out:
            return
        try:
            self._rows.put_nowait(row)
        except queue.Full:
            self._leave_out(f"it has not taken the last {self._rows.maxsize} rows")

    def close(self) -> None:
        if self._is_left_out:
            return
        deadline = time.monotonic() + self._patience
        # None ends the thread, after the rows that wait.
        with suppress(queue.Full):
            self._rows.put(None, timeout=self._patience)
        self._thread.join(max(0.0, deadline - time.monotonic()))
        if self._thread.is_alive():
            self._leave_out(f"it did not finish within {self._patience:g} s")

    def _run(self) -> None:
        try:
            sink = self._start()
            while not self._is_left_out and (row := self._rows.get()) is not None:
                sink.write(row)
            sink.close()
        except BaseException as error:  # whatever a logging library raises; some call sys.exit
            self._leave_out(f"{type(error).__name__}: {' '.join(str(error).split())}")

    def _leave_out(self, reason: str) -> None:
        # Both threads may come here; one of them reports.
        with self._leaving:
            if self._is_left_out:
                return
            self._is_left_out = True
            self._say(
                f"warning: {self._name} is left out from here on: {reason}. "
                "Training goes on; metrics.jsonl has every step."
            )


class TensorBoard:
    """TensorBoard event files, one scalar a figure.

    A resumed run hides the steps that it does again.
    """

    def __init__(self, folder: Path, last_step: int):
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._event = Event
        self._summary = Summary
        folder.mkdir(parents=True, exist_ok=True)
        name = ".".join(
            (
                "events.out.tfevents",
                f"{int(time.time()):010}",
                socket.gethostname(),
                str(os.getpid()),
                str(time.monotonic_ns()),
            )
        )
        # Not through EventFileWriter, whose thread prints a traceback of its own when the disk is
        # full.
        self._writer = RecordWriter((folder / name).open("wb"))
        self._add(file_version="brain.Event:2")
        if last_step:
            self._add(step=last_step + 1, session_log=SessionLog(status=SessionLog.START))

    def write(self, row: Row) -> None:
        scalars = []
        for name, figure in figures(row).items():
            scalars.append(self._summary.Value(tag=name, simple_value=figure))
        self._add(step=row["step"], summary=self._summary(value=scalars))

    def _add(self, **fields: Any) -> None:
        self._writer.write(self._event(wall_time=time.time(), **fields).SerializeToString())
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """A Weights & Biases run; a resumed run continues under its id.

    Offline, it lies in output_dir/wandb until `wandb sync`.
    """

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
    """A trackio run, which `trackio show` draws.

    It lies in the database of trackio on this machine (its TRACKIO_DIR).
    """

    def __init__(self, config: Config):
        import trackio

        self._run: Any = trackio.init(
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
    """The trackers that `logging` names, for the rows after `last_step`.

    Raises ConfigError where one is not installed.
    """
    logging = config.logging
    # Asked before a thread starts: at the start of a run this is a mistake of the user's.
    missing = [name for name in logging.trackers if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"logging.trackers names {' and '.join(missing)}, not installed here. "
            "pip install 'megatron-completep[tracking]', or take the name out."
        )
    starts: dict[str, Callable[[], Sink]] = {
        "wandb": lambda: WeightsAndBiases(config),
        "trackio": lambda: Trackio(config),
    }
    trackers: list[Sink] = [InBackground(name, starts[name], say) for name in logging.trackers]
    if logging.tensorboard:
        folder = Path(config.training.output_dir) / "tensorboard"
        trackers.append(InBackground("tensorboard", lambda: TensorBoard(folder, last_step), say))
    return trackers


def figures(row: Row) -> dict[str, float]:
    """The numbers of a row, without the step."""
    numbers = {name: entry for name, entry in row.items() if isinstance(entry, int | float)}
    numbers.pop("step", None)
    return numbers


def run_name(config: Config) -> str:
    """The name under which trackers show a run: the configured one, or that of its folder."""
    return config.logging.run_name or Path(config.training.output_dir).name


def run_id(config: Config) -> str:
    """The same for every start in the same output_dir, different for any other.

    It holds letters, digits, - and _ only.
    """
    folder = str(Path(config.training.output_dir).absolute())
    # Two runs may have folders of the same name in different places.
    suffix = xxhash.xxh64_hexdigest(folder.encode())[:8]
    name = re.sub(r"[^A-Za-z0-9_-]", "-", run_name(config))
    return f"{name[:64]}-{suffix}"

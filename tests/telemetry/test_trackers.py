"""Trackers get every row, and whatever one of them does, the run goes on."""

from __future__ import annotations

import importlib.util
import json
import sqlite3
import struct
import subprocess
import sys
import threading
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_completep.errors import ConfigError
from megatron_completep.pretrain import pretrain
from megatron_completep.run.state import ExitCode
from megatron_completep.telemetry import trackers
from megatron_completep.telemetry.trackers import InBackground, TensorBoard, figures, run_id
from tests.support.runs import rows_of, tiny_config

ROWS = [{"step": step, "loss": 1.0 / step, "mfu": None, "skipped": False} for step in range(1, 6)]
HERE = [name for name in ("wandb", "trackio") if importlib.util.find_spec(name) is not None]


@pytest.fixture(autouse=True)
def patience_with_a_busy_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trackers, "CLOSING_SECONDS", 280.0)


class Recorder:
    """A tracker that keeps what it gets, and does `act` before each row."""

    def __init__(self, act: Callable[[], None] = lambda: None):
        self.rows: list[Any] = []
        self.closed, self._act = False, act

    def write(self, row: Any) -> None:
        self._act()
        self.rows.append(row)

    def close(self) -> None:
        self.closed = True


def fail() -> None:
    raise OSError("no space\nleft")


def feed(start: Callable[[], Any], **settings: Any) -> list[str]:
    """Give ROWS to a tracker in the background; what was said."""
    said: list[str] = []
    tracker = InBackground("it", start, said.append, **{"patience": 280.0, **settings})
    for row in ROWS:
        tracker.write(row)
    tracker.close()
    return said


def test_a_working_tracker_gets_every_row_in_order_and_is_closed() -> None:
    recorder = Recorder()
    assert feed(lambda: recorder) == []
    assert recorder.rows == ROWS and recorder.closed


@pytest.mark.parametrize(
    "start",
    [fail, lambda: Recorder(fail), lambda: Recorder(sys.exit)],
    ids=["at the start", "at a row", "exits"],
)
def test_a_tracker_that_raises_is_said_once_on_one_line(start: Callable[[], Any]) -> None:
    (line,) = feed(start)
    assert line.startswith("warning: it is left out from here on: ") and "\n" not in line
    with pytest.raises((OSError, SystemExit)):
        start().write(ROWS[0])


def test_a_tracker_that_hangs_costs_no_more_than_its_patience() -> None:
    never = threading.Event()
    said = feed(lambda: Recorder(never.wait), patience=0.2)  # otherwise it would wait for ever
    assert said == [
        (
            "warning: it is left out from here on: it did not finish within 0.2 s. Training goes "
            "on; metrics.jsonl has every step."
        )
    ]
    never.set()


def test_a_tracker_that_falls_too_far_behind_is_left_out_without_waiting() -> None:
    never = threading.Event()
    (line,) = feed(lambda: Recorder(never.wait), rows=2, patience=60)
    assert "has not taken the last 2 rows" in line
    never.set()


def test_a_full_disk_stops_the_event_file_with_one_line_and_no_traceback(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def start() -> TensorBoard:
        board = TensorBoard(tmp_path, 0)
        board._writer._writer = open("/dev/full", "wb")  # noqa: SIM115
        return board

    (line,) = feed(start)
    assert "No space left on device" in line
    assert capsys.readouterr().err == ""


def test_tensorboard_reads_what_was_written(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    board = TensorBoard(tmp_path, last_step=4)
    board.write({"step": 5, "loss": 1.25, "validation_loss": 2.5, "mfu": None})
    board.close()
    (file,) = tmp_path.iterdir()
    events = list(EventFileLoader(str(file)).Load())
    values = {
        value.tag: value.tensor.float_val[0]
        for event in events
        if event.step == 5
        for value in event.summary.value
    }
    assert values == {"loss": 1.25, "validation_loss": 2.5}
    # Hides steps from 5 on of the earlier files.
    assert any(event.HasField("session_log") and event.step == 5 for event in events)


def test_a_run_with_a_tracker_that_raises_and_one_that_hangs_trains_as_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    never = threading.Event()
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(trackers, "WeightsAndBiases", lambda config: Recorder(fail))
    monkeypatch.setattr(trackers, "Trackio", lambda config: never.wait())
    monkeypatch.setattr(InBackground.__init__, "__defaults__", (trackers.WAITING_ROWS, 0.5))
    plain = tiny_config(tmp_path, output="plain")
    tracked = tiny_config(tmp_path, "logging.trackers=[wandb, trackio]", output="tracked")
    assert pretrain(plain) == pretrain(tracked) == ExitCode.DONE
    never.set()
    assert rows_of(plain) == rows_of(tracked)
    warnings = [
        line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: ")
    ]
    assert sorted(line.split()[1] for line in warnings) == ["trackio", "wandb"]


def test_a_tracker_that_is_not_installed_is_refused_before_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        ConfigError,
        match=r"logging.trackers names wandb and trackio, not installed here. pip install",
    ):
        trackers.open_trackers(tiny_config(tmp_path, "logging.trackers=[wandb, trackio]"), 0, print)


def test_runs_of_the_same_name_in_other_folders_have_other_ids(tmp_path: Path) -> None:
    one = tiny_config(tmp_path, "training.output_dir=a/run")
    two = tiny_config(tmp_path, "training.output_dir=b/run")
    assert run_id(one) == run_id(one) != run_id(two)
    assert run_id(tiny_config(tmp_path, "logging.run_name='a b/c#é'")).startswith("a-b-c---")


class Interface(types.SimpleNamespace):
    """Stands for wandb and trackio: the calls that trackers.py makes of them, and no others."""

    Settings = dict

    def __init__(self) -> None:
        super().__init__(calls=[])

    def init(self, **arguments: Any) -> Interface:
        self.calls.append(arguments)
        return self

    def log(self, values: Any, step: int) -> None:
        self.calls.append((step, values))

    def finish(self) -> None:
        self.calls.append("finished")


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_configuration_figures_and_steps_reach_the_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    library = Interface()
    monkeypatch.setitem(sys.modules, name, library)
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: object())
    config = tiny_config(
        tmp_path, f"logging.trackers=[{name}]", "logging.project=proxy", "logging.offline=true"
    )
    (tracker,) = trackers.open_trackers(config, 0, print)
    for row in ROWS:
        tracker.write(row)
    tracker.close()
    settings, *logged, last = library.calls
    assert settings["project"] == "proxy" and settings["config"] == config.model_dump(mode="json")
    assert settings.get("mode") == {"wandb": "offline"}.get(name)
    assert logged == [(row["step"], figures(row)) for row in ROWS] and last == "finished"
    assert figures(ROWS[1]) == {"loss": 0.5, "skipped": False}


REAL_RUN = """
import sys
import time
from pathlib import Path
from megatron_completep.pretrain import pretrain
from megatron_completep.telemetry import trackers
from tests.support.runs import tiny_config
trackers.CLOSING_SECONDS = 280.0
tracked = ("logging.offline=true", "logging.trackers=[wandb, trackio]")
for steps in ("stop_at_step=6", "stop_at_step=null"):  # the second start resumes
    pretrain(tiny_config(Path(sys.argv[1]), f"training.{steps}", *tracked))
    time.sleep(1.1)  # wandb names its folders by the second
"""


@pytest.mark.slow
@pytest.mark.skipif(
    len(HERE) < 2, reason="wandb and trackio are not both installed (extra `tracking`)"
)
def test_the_libraries_themselves_keep_a_run_and_its_resumption_offline(tmp_path: Path) -> None:
    environment = {
        "PATH": "/usr/bin:/bin",
        "HOME": str(tmp_path),
        "TRACKIO_DIR": str(tmp_path / "trackio"),
        "OMP_NUM_THREADS": "1",
    }
    environment |= {"PYTHONPATH": ":".join(path for path in sys.path if path)}
    program = [sys.executable, "-c", REAL_RUN, str(tmp_path)]
    run = subprocess.run(
        program,
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert "warning" not in run.stdout
    losses = {row["step"]: row["loss"] for row in rows_of(tiny_config(tmp_path))}
    assert len(losses) == 12
    assert losses_in_trackio(tmp_path / "trackio") == losses
    assert losses_in_wandb(tmp_path / "run" / "wandb") == losses


def losses_in_trackio(folder: Path) -> dict[int, float]:
    """Loss by step in trackio's database."""
    (database,) = folder.glob("*.db")
    with sqlite3.connect(database) as connection:
        return {
            step: json.loads(values)["loss"]
            for step, values in connection.execute("select step, metrics from metrics")
        }


def losses_in_wandb(folder: Path) -> dict[int, float]:
    """Loss by step in wandb's offline files."""
    from wandb.proto.wandb_internal_pb2 import Record

    losses = {}
    for file in sorted(folder.glob("offline-run-*/*.wandb")):
        for data in leveldb_records(file.read_bytes()[7:]):
            record = Record()
            record.ParseFromString(data)
            items = {
                ".".join(item.nested_key) or item.key: json.loads(item.value_json)
                for item in record.history.item
            }
            if "loss" in items:
                losses[items["_step"]] = items["loss"]
    return losses


def leveldb_records(data: bytes) -> Iterator[bytes]:
    """The records of a LevelDB log:
    blocks of 32 KiB (the first is 7 bytes shorter here), pieces of crc, length, kind.
    """
    at, block, record = 0, 32768, b""
    while at + 7 <= len(data):
        if block - (at + 7) % block < 7:  # no room for a header: padding
            at += block - (at + 7) % block
            continue
        length, kind = struct.unpack("<HB", data[at + 4 : at + 7])
        record += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # the whole record, or its last piece
            yield record
            record = b""

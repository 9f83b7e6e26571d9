"""What saving and starting cost is in the metrics and in the log."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import psutil
import pytest

from megatron_completep.checkpoint import save
from megatron_completep.pretrain import pretrain
from megatron_completep.run.step import TrainingStep
from megatron_completep.telemetry.metrics import read_metrics
from megatron_completep.telemetry.startup import StartupClock, seconds_since_process_start
from tests.support.runs import tiny_config

TIME_OF_DAY = time.time
PHASES = ("process_groups", "model", "data", "checkpoint", "first_step")


@pytest.mark.parametrize("async_save", [True, False])
def test_metrics_say_what_starting_and_saving_cost(folder, capsys, monkeypatch, async_save):
    """An asynchronous save ends here only when the next step has begun; any other ends before."""
    original, original_run = save.write_tensor_file, TrainingStep.run
    begun, order = threading.Event(), []

    def slow(*arguments):
        time.sleep(0.05)
        assert not async_save or begun.wait(120)
        order.append("write")
        return original(*arguments)

    def run(self, batches, step, stop=False):
        if step == 3:
            order.append("step 3")
            begun.set()
        return original_run(self, batches, step, stop)

    monkeypatch.setattr(save, "write_tensor_file", slow)
    monkeypatch.setattr(TrainingStep, "run", run)
    config = tiny_config(
        folder, output=f"costs_{async_save}", checkpoint={"interval": 2, "async_save": async_save}
    )
    pretrain(config)
    assert order[0] == ("step 3" if async_save else "write")
    rows = {
        row["step"]: row for row in read_metrics(Path(config.training.output_dir) / "metrics.jsonl")
    }
    assert sum(rows[1][f"startup_{phase}_seconds"] for phase in PHASES) == pytest.approx(
        rows[1]["startup_seconds"]
    )
    assert rows[1]["startup_seconds"] > 0
    assert not any(name.startswith("startup") for name in rows[2])
    assert (
        f"first step {rows[1]['startup_seconds']:.1f} s after the start: process groups "
        in capsys.readouterr().out
    )
    blocked = {
        step: row["checkpoint_blocked_seconds"]
        for step, row in rows.items()
        if "checkpoint_blocked_seconds" in row
    }
    # The steps after saves; the last save is after the last row.
    assert sorted(blocked) == [3, 5, 7, 9, 11]
    written = [row["checkpoint_seconds"] for row in rows.values() if "checkpoint_seconds" in row]
    assert written and min(written) >= 0.05
    assert async_save or min(blocked.values()) >= 0.05


def test_phases_are_measured_by_the_clock_that_is_handed_in():
    now = [100.0]
    clock = StartupClock(lambda: now[0])
    now[0] += 2.5
    clock.done("process_groups")
    now[0] += 1.0
    assert clock.seconds == {"process_groups": 2.5} and clock.elapsed == 3.5


def test_the_clock_knows_when_the_process_began_whatever_the_clock_of_the_day_says(monkeypatch):
    age = time.time() - psutil.Process().create_time()
    clocks = []
    for change in (0.0, 86400.0, -86400.0):
        monkeypatch.setattr(time, "time", lambda change=change: TIME_OF_DAY() + change)
        clocks.append(StartupClock.from_process_start())
        clocks[-1].done("process_groups")
    assert all(age - 1 < clock.seconds["imports"] < age + 600 for clock in clocks)
    assert all(0 <= clock.seconds["process_groups"] < 600 for clock in clocks)


def test_where_the_system_does_not_tell_its_start_the_clock_of_the_day_has_to_do(tmp_path):
    """A name with spaces and brackets stands before the field."""
    boot = time.clock_gettime(time.CLOCK_BOOTTIME)
    stat = tmp_path / "stat"
    fields = ["R", *["0"] * 18, str(round((boot - 40.0) * os.sysconf("SC_CLK_TCK"))), "7"]
    stat.write_text(f"4711 (a (strange) name) {' '.join(fields)}\n")
    assert 39.9 < seconds_since_process_start(stat) < 640
    stat.write_text("not what Linux writes")
    assert seconds_since_process_start(stat) > 0
    assert seconds_since_process_start(tmp_path / "missing") > 0

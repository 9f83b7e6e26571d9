"""What saving and starting cost is in the metrics and in the log."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from tiny_runs import tiny_config

from megatron_completep.pretrain import pretrain
from megatron_completep.training.checkpoint import save
from megatron_completep.training.metrics import read_metrics
from megatron_completep.training.startup import StartupClock

PHASES = ("process_groups", "model", "data", "checkpoint", "first_step")


@pytest.mark.parametrize("async_save", [True, False])
def test_metrics_say_what_starting_and_saving_cost(folder, capsys, monkeypatch, async_save):
    original = save.write_tensor_file

    def slow(*arguments):
        time.sleep(0.3)
        return original(*arguments)

    monkeypatch.setattr(save, "write_tensor_file", slow)
    config = tiny_config(folder, output=f"costs_{async_save}", checkpoint={"interval": 2, "async_save": async_save})
    started = time.perf_counter()
    pretrain(config)
    took = time.perf_counter() - started
    rows = {row["step"]: row for row in read_metrics(Path(config.training.output_dir) / "metrics.jsonl")}
    assert sum(rows[1][f"startup_{phase}_seconds"] for phase in PHASES) == pytest.approx(rows[1]["startup_seconds"])
    assert 0 < rows[1]["startup_seconds"] < took and not any(name.startswith("startup") for name in rows[2])
    assert f"first step {rows[1]['startup_seconds']:.1f} s after the start: process groups " in capsys.readouterr().out
    blocked = {step: row["checkpoint_blocked_seconds"] for step, row in rows.items() if "checkpoint_blocked_seconds" in row}
    assert sorted(blocked) == [3, 5, 7, 9, 11]  # the steps after saves; the last save is after the last row
    written = [row["checkpoint_seconds"] for row in rows.values() if "checkpoint_seconds" in row]
    assert written and min(written) > 0.3
    assert blocked[3] < 0.2 if async_save else min(blocked.values()) > 0.3  # the first save waits for none before it


def test_the_clock_knows_when_the_process_began():
    clock = StartupClock.from_process_start()
    assert clock.seconds["imports"] > 0.1  # torch and pytest were imported
    time.sleep(0.02)
    clock.done("process_groups")
    assert 0.02 <= clock.seconds["process_groups"] < clock.seconds["imports"] + 10

"""The telemetry's benchmark: what its figures are made of (nothing here depends on how long anything took)."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from megatron_completep.benchmarks import telemetry_benchmark
from megatron_completep.config import save_config
from megatron_completep.errors import exit_on_user_error
from megatron_completep.instruments.trial import change
from megatron_completep.tools.benchmark_telemetry import main
from tests.support.small_runs import small_config


def test_the_share_is_a_look_over_the_steps_between_two(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A clock by which steps take 2 s and looks 1 s; the programs really run."""
    ran: list[str] = []

    def timed(program, device):
        found = program()
        ran.append("look" if isinstance(found, dict) else "step")
        return (1.0, 1.0) if isinstance(found, dict) else (2.0, 2.0)

    monkeypatch.setattr(telemetry_benchmark, "time_once", timed)
    config = change(
        small_config(tmp_path, training={"global_batch_size": 16}),
        logging={"parameterization_interval": 50},
    )
    cost = telemetry_benchmark.measure(config, torch.device("cpu"), rounds=4, warmup=1)
    assert (cost.step_seconds, cost.look_seconds, cost.percent) == (2.0, 1.0, 1.0)
    assert cost.percent_low == cost.percent_high == 1.0
    assert ran[:4] == ["step", "look", "look", "step"]  # in turn


def test_the_program_prints_one_object_and_refuses_a_run_without_telemetry(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    path = tmp_path / "config.yaml"
    save_config(small_config(tmp_path, training={"cpu_threads": 1}), path)

    def run(*words: str) -> int | str | None:
        monkeypatch.setattr(sys, "argv", ["benchmark_telemetry.py", str(path), *words])
        with pytest.raises(SystemExit) as left:
            exit_on_user_error(main)
        return left.value.code

    assert run("--rounds", "2", "--json") == 0
    assert json.loads(capsys.readouterr().out)["interval"] == 100
    assert run("logging.parameterization_interval=null") == 2
    assert "parameterization_interval is null" in capsys.readouterr().err

"""The telemetry's benchmark:
what its figures are made of (nothing here depends on how long anything took).
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from megatron_completep.benchmarks import telemetry_benchmark
from megatron_completep.config import save_config
from megatron_completep.instruments.trial import change
from megatron_completep.tools.benchmark_telemetry import main
from tests.support.commands import Programs
from tests.support.runs import proxy_config


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
        proxy_config(tmp_path, training={"global_batch_size": 16}),
        logging={"parameterization_interval": 50},
    )
    cost = telemetry_benchmark.measure(config, torch.device("cpu"), rounds=4, warmup=1)
    assert (cost.step_seconds, cost.look_seconds, cost.percent) == (2.0, 1.0, 1.0)
    assert cost.percent_low == cost.percent_high == 1.0
    assert ran[:4] == ["step", "look", "look", "step"]  # in turn


def test_the_program_prints_one_object_and_refuses_a_run_without_telemetry(
    tmp_path: Path, programs: Programs
):
    path = tmp_path / "config.yaml"
    save_config(proxy_config(tmp_path, training={"cpu_threads": 1}), path)
    assert json.loads(programs.output(main, path, "--rounds", 2, "--json"))["interval"] == 100
    refused = programs.run(main, path, "logging.parameterization_interval=null")
    assert refused.code == 2 and "parameterization_interval is null" in refused.err

"""The benchmark of Muon: what it compares is the same update, whatever it takes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megatron_completep.benchmarks import muon_benchmark
from megatron_completep.benchmarks.muon_benchmark import PlainUpdate, _plain_step
from megatron_completep.benchmarks.training_benchmark import BenchmarkSettings, random_batch
from megatron_completep.config import save_config
from megatron_completep.config.schema import Config
from megatron_completep.optim.muon import section_of
from megatron_completep.parallel.context import ParallelContext
from megatron_completep.roles import Role
from megatron_completep.run.assemble import assemble
from megatron_completep.tools.benchmark_muon import main
from tests.support.commands import Programs
from tests.support.runs import proxy_config

MUON = {"type": "muon", "muon": {"base_lr": 0.02, "precision": "master"}}


def config_of(folder: Path) -> Config:
    optimizer = {**MUON, "schedule": "constant", "warmup_fraction": None, "betas": [0.9, 0.999]}
    return proxy_config(folder, optimizer=optimizer, training={"cpu_threads": 1})


def test_the_plain_update_is_ours(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    step = assemble(config, ParallelContext.single()).step
    optimizer = step.optimizer
    update = PlainUpdate(optimizer, section_of(config.optimizer), config.optimizer.base_lr)
    batch = random_batch(BenchmarkSettings(config.model, config.training.micro_batch_size))
    before = [weight.clone() for weight, *_ in update.matrices]
    _plain_step(step, [batch], update)
    step.run([batch], 1).read()
    parts = optimizer.shards.part_segments
    matrices = [s for s in parts if optimizer.groups[s.group].role is Role.HIDDEN_WEIGHT]
    ours = [optimizer.shards.master[segment.in_shard] for segment in matrices]
    assert len(ours) == len(update.matrices) == 2 * 7
    for weight, (plain, *_), old in zip(ours, update.matrices, before, strict=True):
        change = (weight.view(plain.shape) - plain).norm()
        assert change < 1e-4 * (plain - old).norm()


def test_the_figures_are_of_steps_in_turn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock by which the plain step takes 2 s, and ours and the factors 1 s and 0.5 s."""
    taken = iter([1.0, 2.0, 0.5, 2.0, 1.0, 0.5] * 2)

    def timed(program: Callable[[], object], device: torch.device) -> tuple[float, float]:
        program()
        return 0.0, next(taken)

    monkeypatch.setattr(muon_benchmark, "time_once", timed)
    cost = muon_benchmark.measure(config_of(tmp_path), torch.device("cpu"), rounds=4, warmup=0)
    assert (cost.ratio, cost.ratio_low, cost.ratio_high) == (0.5, 0.5, 0.5)
    assert cost.update_share == 0.5


def test_the_program_prints_one_object_and_refuses_a_run_without_muon(
    tmp_path: Path, programs: Programs
) -> None:
    path = tmp_path / "config.yaml"
    save_config(config_of(tmp_path), path)
    assert json.loads(programs.output(main, path, "--rounds", 2, "--json"))["rounds"] == 2
    refused = programs.run(main, path, "optimizer.type=adamw", "optimizer.muon=null")
    assert refused.code == 2 and "optimizer.muon is null" in refused.err

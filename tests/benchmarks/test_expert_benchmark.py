"""The benchmark of experts: the dense model has as many FLOPs, and the figures are of turns."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megatron_completep.benchmarks import expert_benchmark
from megatron_completep.config.schema import Config
from megatron_completep.errors import ConfigError
from tests.support.runs import proxy_config

MOE = {"num_experts": 8, "top_k": 2, "ffn_hidden_size": 48, "shared_ffn_hidden_size": 16}


def config_of(folder: Path, **moe: int) -> Config:
    return proxy_config(folder, model={"moe": {**MOE, **moe}}, training={"cpu_threads": 1})


def test_the_figures_are_of_steps_in_turn_at_equal_active_flops(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A clock by which a step with experts takes 3 s, and the dense one 2 s."""
    taken = iter([3.0, 2.0, 2.0, 3.0] * 2)

    def timed(program: Callable[[], object], device: torch.device) -> tuple[float, float]:
        program()
        return 0.0, next(taken)

    monkeypatch.setattr(expert_benchmark, "time_once", timed)
    config = config_of(tmp_path)
    cost = expert_benchmark.measure(config, torch.device("cpu"), rounds=4, warmup=0)
    assert (cost.ratio, cost.ratio_low, cost.ratio_high) == (1.5, 1.5, 1.5)
    # The router's own product: 8 of 32 x 8 beside 2 x 48 + 16 of 32 x 3.
    assert 1.0 < cost.flops_ratio < 1.05
    assert expert_benchmark.dense_of(config).model.ffn_hidden_size == 112


def test_layers_without_experts_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="all layers must have experts"):
        expert_benchmark.dense_of(config_of(tmp_path, first_dense_layers=1))

"""What a plan says of Muon: rates of matrices, tau, FLOPs of owners, ranks without work."""

from __future__ import annotations

import math
from typing import Any

import pytest

from megatron_completep.optim.newton_schulz import newton_schulz_flops
from megatron_completep.planning.plan import describe, make_plan
from megatron_completep.planning.scaling import scaling_plan
from megatron_completep.planning.scaling_report import describe_scaling
from tests.support.configs import small_config

MUON: dict[str, Any] = {"type": "muon", "muon": {"base_lr": 0.02, "base_weight_decay": 0.05}}
GROUPED = {"num_query_groups": 2}
SHAPES = [(32, 32), (16, 32), (16, 32), (32, 32), (48, 32), (48, 32), (32, 48)]  # of a layer


def test_parts_stand_for_themselves_where_their_rates_differ() -> None:
    plan = make_plan(small_config(optimizer=MUON, model=GROUPED))
    rates = {parameter.name: parameter.lr for parameter in plan.parameters}
    assert rates["layers.0.attention.qkv.weight.q"] == pytest.approx(0.02)
    assert rates["layers.0.attention.qkv.weight.k"] == pytest.approx(0.02 * math.sqrt(0.5))
    assert rates["layers.0.mlp.up.weight"] == pytest.approx(0.02 * math.sqrt(1.5))
    shapes = {parameter.name: parameter.shape for parameter in plan.parameters}
    assert shapes["layers.0.attention.qkv.weight.k"] == (16, 32)
    assert shapes["layers.0.mlp.up.weight"] == (96, 32)
    adamw = make_plan(small_config(model=GROUPED))
    assert "layers.0.attention.qkv.weight" in {parameter.name for parameter in adamw.parameters}


def test_the_text_has_tau_of_the_run_and_of_the_proxy() -> None:
    base = {"base_batch_tokens": 96, "base_total_tokens": 96 * 5}
    text = describe(small_config(optimizer=MUON, completep=base))
    # 10 steps, the proxy's 5; at the default exponents tau is kept.
    assert "tau = 1 / (peak lr x decay x steps): embedding 200 (proxy 200), " in text
    assert "hidden_weight 200 (proxy 200), unembedding 200 (proxy 200)" in text


@pytest.mark.parametrize(("ranks", "idle"), [(1, 0), (8, 0), (64, 36)])
def test_the_flops_are_those_of_all_matrices_and_owners_are_counted(ranks: int, idle: int) -> None:
    config = small_config(
        optimizer=MUON, model=GROUPED, training={"micro_batch_size": 1, "global_batch_size": 64}
    )
    plan = scaling_plan(config, ranks)
    (stage,) = plan.orthogonal
    total = 4 * sum(newton_schulz_flops(*shape, 5) for shape in SHAPES)
    assert stage.mean_flops * ranks == pytest.approx(total)
    assert (stage.ranks, stage.matrices, stage.idle) == (ranks, 28, idle)
    assert f"{idle} of {ranks} ranks of a stage own no matrix" in describe_scaling(
        config, plan, "h100"
    )
    assert scaling_plan(small_config(model=GROUPED), 1).orthogonal == ()


def test_a_momentum_in_place_of_two_moments_is_in_the_memory_and_the_checkpoint() -> None:
    config = small_config(optimizer=MUON, model=GROUPED)
    ours = scaling_plan(config, 1)
    adamw = scaling_plan(small_config(model=GROUPED), 1)
    matrices = 4 * sum(math.prod(shape) for shape in SHAPES)
    assert adamw.checkpoint_bytes - ours.checkpoint_bytes == 4 * matrices
    saved = adamw.memory[0].optimizer - ours.memory[0].optimizer
    assert saved == pytest.approx(4 * matrices, rel=0.01)

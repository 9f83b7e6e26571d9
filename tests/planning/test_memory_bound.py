"""The bytes of the plan's memory-bound kernels are those that the kernel benchmark counts."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron_completep.benchmarks import kernel_cases
from megatron_completep.benchmarks.head_cases import head_cases
from megatron_completep.benchmarks.kernel_cases import Setting
from megatron_completep.config.schema import Config
from megatron_completep.planning.memory_bound import (
    activation_bytes,
    head_bytes,
    loss_bytes,
    micro_batch_bytes,
    optimizer_bytes,
    residual_norm_bytes,
)
from megatron_completep.planning.scaling import GPUS, MEMORY_EFFICIENCY, scaling_plan
from tests.support.configs import small_config

ON_PAPER = Setting(torch.bfloat16, torch.device("meta"), with_compile=False, say=lambda line: None)
TOKENS = 2 * 12  # of a micro-batch of `small_config`
HEADS, SIZE = 4, 8


def config_of(**model: Any) -> Config:
    return small_config(model=model, training={"precision": "bf16"})


def floors(cases: Any) -> dict[str, int]:
    return {case.kernel: case.floor_bytes for case in cases}


def test_norms_activations_loss_and_optimizer_move_what_the_benchmark_counts() -> None:
    config = config_of()
    norms = floors(kernel_cases.residual_norm_cases(TOKENS, 32, True, ON_PAPER))
    norm = residual_norm_bytes(config)
    assert norm.forward == norms["residual rmsnorm forward"]
    assert norm.backward == norms["residual rmsnorm backward"]

    pointwise = floors(kernel_cases.pointwise_cases(TOKENS, 48, ON_PAPER))
    for activation in ("swiglu", "squared_relu"):
        passes = activation_bytes(config_of(activation=activation))
        name = activation.replace("_", " ")
        assert passes.forward == pointwise[f"{name} forward"]
        assert passes.backward == pointwise[f"{name} backward"]

    losses = floors(kernel_cases.cross_entropy_cases(TOKENS, 40, ON_PAPER))  # 37 words, padded
    assert loss_bytes(config) == losses["cross-entropy forward + backward"]

    updates = floors(kernel_cases.optimizer_cases(640, ON_PAPER))
    assert optimizer_bytes(config, 640, 3 * 640) == updates["adamw"] + updates["gradient norm"]


@pytest.mark.parametrize("groups", [4, 2])
def test_heads_are_rotated_once_and_back_while_their_gradients_are_joined(groups: int) -> None:
    element = TOKENS * SIZE * 2  # bytes of one head of a micro-batch
    passes = head_bytes(config_of(num_query_groups=groups))
    assert passes.forward == 2 * (HEADS + groups) * element
    assert passes.backward == 2 * (HEADS + 2 * groups) * element
    counted = floors(head_cases(TOKENS, HEADS, groups, SIZE, ON_PAPER))
    angles = 2 * TOKENS * (SIZE // 2) * 4  # which the plan leaves out: all heads share them
    assert passes.backward == counted["joined heads"] - angles
    assert head_bytes(config_of(position="learned")).forward == 0
    # QK-norm and rotation are one pass, which also gathers the gradients.
    normed = head_bytes(config_of(num_query_groups=groups, qk_norm=True))
    assert normed.forward == passes.forward
    assert normed.backward == 3 * (HEADS + groups) * element + 2 * groups * element
    assert normed.forward == counted["normed heads forward"] - angles
    assert normed.backward == counted["normed heads backward"] - angles


def test_ranks_share_the_bytes_and_recomputation_adds_a_forward_pass() -> None:
    plain = config_of()
    split = small_config(
        training={"precision": "bf16"},
        parallel={"tensor_parallel_size": 2, "sequence_parallel": True},
        model={"vocab_size": 40},
    )
    assert micro_batch_bytes(split) == pytest.approx(micro_batch_bytes(plain) / 2, rel=0.05)
    full = small_config(training={"precision": "bf16", "recompute": "full"})
    layer = 2 * residual_norm_bytes(plain).forward
    layer += head_bytes(plain).forward + activation_bytes(plain).forward
    assert micro_batch_bytes(full) == micro_batch_bytes(plain) + 4 * layer


def test_the_step_on_paper_has_the_time_of_the_traffic() -> None:
    config = config_of()
    plan = scaling_plan(config, 1)
    bandwidth = GPUS["h100"].memory_bandwidth * MEMORY_EFFICIENCY
    assert plan.memory_seconds == pytest.approx(4 * micro_batch_bytes(config) / bandwidth)
    parts = plan.compute_seconds + plan.memory_seconds + plan.optimizer_seconds
    assert plan.step_seconds == pytest.approx(parts)
    # The optimizer's time does not grow with the tokens of a step.
    larger = small_config(training={"precision": "bf16", "global_batch_size": 16})
    twice = scaling_plan(larger, 1)
    assert twice.optimizer_seconds == plan.optimizer_seconds > 0
    assert twice.memory_seconds == pytest.approx(2 * plan.memory_seconds)

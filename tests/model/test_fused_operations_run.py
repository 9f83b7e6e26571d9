"""By the profiler: one training step really goes through the fused operations, each as often as the model asks for it."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from megatron_completep.optim.optimizer import DistributedOptimizer
from megatron_completep.parallel.context import ParallelContext
from tests.support.models import (
    build_model,
    completep_config,
    model_config,
    optimizer_config,
    table_for,
)

LAYERS = 3
NORMS = 2 * LAYERS + 1


def operations_of_one_step(**changes) -> Counter[str]:
    """How often each operation of the project ran in one optimizer step of one micro-batch."""
    config = model_config(num_layers=LAYERS, **changes)
    table = table_for(config, completep_config())
    model = build_model(config, table, torch.float32)
    optimizer = DistributedOptimizer(
        [model], table, optimizer_config(), ParallelContext.single(), precision=torch.float32
    )
    tokens = torch.randint(config.vocab_size, (2, config.seq_length))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        optimizer.begin_step(1)
        loss = model(tokens, labels=tokens)
        loss.backward()
        optimizer.step(1e-3, loss, torch.tensor(tokens.numel()))
    return Counter(
        {
            event.key.removeprefix("completep::"): event.count
            for event in profiler.key_averages()
            if event.key.startswith("completep::")
        }
    )


@pytest.mark.parametrize("norm", ["layernorm", "rmsnorm"])
def test_every_residual_sum_but_the_first_is_one_kernel_with_its_norm(norm):
    ran = operations_of_one_step(norm=norm)
    assert ran["residual_norm_forward"] == NORMS - 1
    assert ran["norm_forward"] == 1
    assert ran["residual_norm_backward"] == NORMS


def test_the_optimizer_is_one_launch_and_the_loss_owns_its_logits():
    ran = operations_of_one_step()
    assert (ran["adamw_"], ran["sum_of_squares"], ran["begin_step_"]) == (1, 1, 1)
    assert (ran["cross_entropy_forward"], ran["cross_entropy_backward_"]) == (1, 1)


def test_the_activation_and_the_rotation_are_fused_where_the_model_has_them():
    ran = operations_of_one_step(activation="swiglu", position="rope")
    assert (ran["swiglu_forward"], ran["swiglu_backward"], ran["rotary_"]) == (
        LAYERS,
        LAYERS,
        2 * LAYERS,
    )
    other = operations_of_one_step(activation="squared_relu", position="learned")
    assert (other["squared_relu_forward"], other["squared_relu_backward"], other["rotary_"]) == (
        LAYERS,
        LAYERS,
        0,
    )
    assert "swiglu_forward" not in other  # negative control: the count follows the model

"""By the profiler: one training step really goes through the fused operations,
each as often as the model asks for it.
"""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from tests.support.models import (
    batch_of,
    small_setup,
    train_step,
)

LAYERS = 3
NORMS = 2 * LAYERS + 1


def operations_of_one_step(**changes) -> Counter[str]:
    """How often each operation of the project ran in one optimizer step of one micro-batch."""
    gpt, optimizer, _ = small_setup({"num_layers": LAYERS, **changes}, dtype=torch.float32)
    batch = batch_of(gpt.config)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        train_step(gpt, optimizer, 1e-3, batch)
    counts: Counter[str] = Counter()
    for event in profiler.key_averages():
        if event.key.startswith("completep::"):
            counts[event.key.removeprefix("completep::")] = event.count
    return counts


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
    # Forward rotates in place; backward rotates back where it joins the gradients.
    names = ("swiglu_forward", "swiglu_backward", "rotary_", "join_heads")
    assert [ran[name] for name in names] == [LAYERS] * 4
    other = operations_of_one_step(activation="squared_relu", position="learned")
    names = ("squared_relu_forward", "squared_relu_backward", "rotary_", "join_heads")
    assert [other[name] for name in names] == [LAYERS, LAYERS, 0, 0]
    assert "swiglu_forward" not in other  # negative control: the count follows the model


def test_queries_and_keys_are_normed_and_rotated_in_one_pass_each_way():
    ran = operations_of_one_step(position="rope", qk_norm=True)
    assert (ran["head_norm_forward"], ran["head_norm_backward"]) == (LAYERS, LAYERS)
    assert (ran["rotary_"], ran["rotary"], ran["norm_forward"]) == (0, 0, 1)
    # One launch for both gains of a layer, and one for the gain of each norm.
    assert ran["reduce_partials_"] == LAYERS + NORMS
    other = operations_of_one_step(position="learned", qk_norm=True)
    assert (other["head_norm_forward"], other["norm_forward"]) == (0, 2 * LAYERS + 1)

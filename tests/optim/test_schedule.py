"""Schedules against closed forms, and E9:
lr_group(t) = schedule(t) * factor, after a reload too.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from megatron_completep.config import derived
from megatron_completep.config.schema import OptimizerConfig
from megatron_completep.optim.optimizer import DistributedOptimizer
from megatron_completep.optim.schedule import learning_rate, schedule
from tests.support.models import batch_of, group_of, optimizer_config, small_setup, train_step

STEPS = 100


def curve(steps: int = STEPS, **settings: Any) -> list[float]:
    config = optimizer_config(**settings)
    return [schedule(step, config, steps) for step in range(1, steps + 1)]


AXIS = np.arange(1, STEPS + 1)


@pytest.mark.parametrize("minimum", [0.0, 0.1])
@pytest.mark.parametrize("warmup", [0, 10, 33])
def test_linear_is_two_straight_lines(warmup: int, minimum: float) -> None:
    found = curve(schedule="linear", warmup_steps=warmup, min_lr_fraction=minimum)
    wanted = (
        np.interp(AXIS, [0, warmup, STEPS], [0.0, 1.0, minimum])
        if warmup
        else np.interp(AXIS, [0, STEPS], [1.0, minimum])
    )
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-15)


@pytest.mark.parametrize("minimum", [0.0, 0.1])
def test_cosine_is_half_a_wave_from_peak_to_minimum(minimum: float) -> None:
    found = curve(schedule="cosine", warmup_steps=10, min_lr_fraction=minimum)
    wave = minimum + (1 - minimum) * np.cos(np.pi / 2 * (AXIS - 10) / 90) ** 2
    np.testing.assert_allclose(found, np.where(AXIS < 10, AXIS / 10, wave), rtol=0, atol=1e-15)
    assert found[9] == 1.0 and found[54] == pytest.approx((1 + minimum) / 2, abs=1e-15)


@pytest.mark.parametrize("minimum", [0.0, 0.2])
def test_warmup_stable_decay_is_three_straight_lines(minimum: float) -> None:
    found = curve(
        schedule="warmup_stable_decay",
        warmup_steps=10,
        decay_fraction=0.25,
        min_lr_fraction=minimum,
    )
    np.testing.assert_allclose(
        found, np.interp(AXIS, [0, 10, 75, 100], [0, 1, 1, minimum]), rtol=0, atol=1e-15
    )


def test_constant_stays_at_the_peak_after_the_warm_up() -> None:
    np.testing.assert_allclose(
        curve(schedule="constant", warmup_steps=4), np.minimum(AXIS / 4, 1), rtol=0, atol=1e-15
    )


def test_warm_up_as_a_fraction_equals_warm_up_in_steps() -> None:
    assert curve(schedule="linear", warmup_fraction=0.1) == curve(
        schedule="linear", warmup_steps=10
    )
    assert curve(schedule="linear", warmup_fraction=0.1) != curve(
        schedule="linear", warmup_steps=11
    )
    assert curve(schedule="linear") == curve(schedule="linear", warmup_steps=0)
    assert derived.warmup_steps(optimizer_config(warmup_fraction=0.1), 114) == 11


@given(
    st.sampled_from(["linear", "cosine", "warmup_stable_decay", "constant"]),
    st.integers(1, 60),
    st.floats(0, 1),
    st.floats(0, 1),
    st.floats(0, 1),
)
def test_every_schedule_rises_to_one_peak_and_falls_to_its_minimum(
    shape: str, steps: int, warmup: float, decay: float, minimum: float
) -> None:
    config = optimizer_config(
        schedule=shape, warmup_fraction=warmup, decay_fraction=decay, min_lr_fraction=minimum
    )
    values = [schedule(step, config, steps) for step in range(1, steps + 1)]
    ramp = derived.warmup_steps(config, steps)
    # The configuration's check holds this.
    assume(shape != "warmup_stable_decay" or ramp + derived.decay_steps(config, steps) <= steps)
    assert all(0 <= value <= 1 for value in values)
    assert all(a < b for a, b in itertools.pairwise(values[:ramp]))
    after = values[max(0, ramp - 1) :]
    assert all(a >= b - 1e-12 for a, b in itertools.pairwise(after))
    assert all(value >= minimum - 1e-12 for value in after)
    if ramp:
        assert values[ramp - 1] == 1.0
    falls = (
        derived.decay_steps(config, steps) > 0
        if shape == "warmup_stable_decay"
        else shape != "constant"
    )
    if falls and ramp < steps:
        assert values[-1] == pytest.approx(minimum, abs=1e-12)


def test_a_step_beyond_the_last_stays_at_the_minimum() -> None:
    config = optimizer_config(schedule="linear", min_lr_fraction=0.1)
    assert schedule(150, config, 100) == pytest.approx(0.1)
    assert learning_rate(100, config, 100) == pytest.approx(0.1 * config.base_lr)


# E9.

SETTINGS = {
    "base_weight_decay": 0.0,
    "base_eps": 1e-30,
    "schedule": "linear",
    "warmup_steps": 4,
    "min_lr_fraction": 0.25,
}
TOTAL = 12


def push_constant_gradients(gpt: torch.nn.Module, optimizer: DistributedOptimizer) -> None:
    """Adam then moves every element by exactly its learning rate, at every step."""
    optimizer.begin_step(1)
    for parameter in gpt.parameters():
        gpt.queue.push(parameter, lambda main_grad, first: main_grad.fill_(0.5))


def group_rates(
    gpt: torch.nn.Module, optimizer: DistributedOptimizer, lr: float
) -> dict[str, float]:
    """The learning rate of each parameter, seen in what one step does to it."""
    before = {name: p.detach().clone() for name, p in gpt.named_parameters()}
    push_constant_gradients(gpt, optimizer)
    optimizer.step(lr, torch.zeros(()), torch.tensor(1))
    moved = {name: before[name] - p.detach() for name, p in gpt.named_parameters()}
    assert all((change.max() - change.min()).abs() < 1e-12 for change in moved.values())
    return {name: change.mean().item() for name, change in moved.items()}


def reloaded(
    optimizer: DistributedOptimizer, changes: dict[str, Any]
) -> tuple[torch.nn.Module, DistributedOptimizer]:
    """A new model and optimizer, as a resumed run builds them, with the state of the old ones."""
    gpt, fresh, _ = small_setup(completep={"alpha": 0.5}, optimizer=changes)
    copy_state(optimizer, fresh)
    return gpt, fresh


def copy_state(source: DistributedOptimizer, target: DistributedOptimizer) -> None:
    """All that training depends on."""
    for name, state in source.states.items():
        target.states[name].copy_(state)
    target.shards.flat.copy_(source.shards.flat)
    target.control.copy_(source.control)


def test_a_groups_rate_is_schedule_times_factor_at_warm_up_peak_minimum_and_after_reload() -> None:
    gpt, optimizer, _ = small_setup(completep={"alpha": 0.5}, optimizer=SETTINGS)
    factors = {name: group.lr_factor for name, group in optimizer.groups.items()}
    # Outside the blocks, vectors in blocks, matrices in blocks.
    assert len(set(factors.values())) == 3
    shape = np.interp(np.arange(1, TOTAL + 1), [0, 4, TOTAL], [0, 1, 0.25])
    for step in range(1, TOTAL + 1):
        if step in (2, 4, 9):  # in the warm-up, at its end, on the way down
            gpt, optimizer = reloaded(optimizer, SETTINGS)
        rates = group_rates(gpt, optimizer, learning_rate(step, optimizer.config, TOTAL))
        for name, rate in rates.items():
            assert rate == pytest.approx(
                1e-2 * shape[step - 1] * group_of(factors, name), rel=1e-9
            ), (
                step,
                name,
            )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_training_goes_on_bitwise_after_a_reload(dtype: torch.dtype) -> None:
    """Epsilon and decay survive with it:
    a large eps and decay would show any change in the last bit.
    """
    settings = {"base_weight_decay": 0.3, "base_eps": 1e-2, "schedule": "cosine", "warmup_steps": 2}

    def run(reload_after: int | None, changes: dict[str, Any] | None = None) -> Tensor:
        gpt, optimizer, _ = small_setup(optimizer=settings, dtype=dtype)
        for step in range(1, 7):
            train_step(
                gpt, optimizer, learning_rate(step, optimizer.config, 6), batch_of(gpt.config, step)
            )
            if step == reload_after:
                old = optimizer
                gpt, optimizer, _ = small_setup(
                    optimizer={**settings, **(changes or {})}, dtype=dtype
                )
                copy_state(old, optimizer)
        return optimizer.shards.master.clone()

    whole = run(None)
    assert torch.equal(run(3), whole)
    assert not torch.equal(run(3, {"base_eps": 1.1e-2}), whole)
    assert not torch.equal(run(3, {"base_weight_decay": 0.31}), whole)


def test_the_configuration_and_the_schedule_agree_on_the_warm_up() -> None:
    """One definition serves the check of the configuration and the training loop."""
    config: OptimizerConfig = optimizer_config(schedule="constant", warmup_fraction=0.25)
    values = [schedule(step, config, 10) for step in range(1, 11)]
    assert values.index(1.0) + 1 == derived.warmup_steps(config, 10)
    assert math.isclose(values[0], 1 / derived.warmup_steps(config, 10))

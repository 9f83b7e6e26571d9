"""The step model, against sums made by hand and the predictions that it was written with."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron_completep.benchmarks.gpu_day.expected import (
    RATES,
    Rates,
    Shape,
    StepModel,
    rates_of,
    total,
)
from megatron_completep.benchmarks.gpu_day.step import SEQUENCES, TARGET_MODEL
from megatron_completep.model.flops import training_flops_per_token

H100 = RATES["H100 80GB HBM3"]
SHAPE = Shape(
    layers=24,
    hidden=2048,
    heads=16,
    groups=16,
    head_dim=128,
    ffn=8192,
    vocabulary=50_304,
    sequence=2048,
    sequences=4,
)


def milliseconds_of(name: str, model: StepModel) -> float:
    return sum(kernel.milliseconds for kernel in model.ours() if name in kernel.name)


def test_single_kernels_take_their_bytes_and_flops() -> None:
    model = StepModel(SHAPE, H100)
    parameters = 24 * 12 * 2048**2 + 2 * 50_304 * 2048
    assert SHAPE.parameters == parameters
    assert milliseconds_of("AdamW", model) == pytest.approx(30e3 * parameters / 3.0e12 / 0.93)
    up = 24 * 1e3 * 2 * 8192 * 2048 * 8192 / 680e12
    assert milliseconds_of("forward: up", model) == pytest.approx(up)
    norms = 48 * 1e3 * 8 * 8192 * 2048 / 3.0e12 / 0.9
    assert milliseconds_of("forward: residual norm", model) == pytest.approx(norms)


def test_the_step_is_what_was_predicted_before_a_gpu_was_at_hand() -> None:
    """The prediction had two passes that are gone: the head's gradient zeroed, scaled and copied
    (0.7 ms), and the gradients of queries and keys rotated back after they were joined (1.2 ms).

    It also gave the plain model's one pass over those gradients 0.6 ms less than its bytes take.
    """
    model = StepModel(SHAPE, H100, chunk_bytes=1 << 28)
    ours = total(model.ours())
    copies = 1e3 * 20 * 50_304 * 2048 / 3.0e12 / 0.9
    rotation = 24 * 1e3 * 8 * 8192 * 2048 / 3.0e12 / 0.9
    values = 24 * 1e3 * 4 * 8192 * 2048 / 3.0e12 / 0.9
    assert ours + copies + rotation == pytest.approx(146.1, abs=0.2)
    plain = ours + total(model.plain_differences())
    assert plain - values == pytest.approx(156.3, abs=0.2)
    pure = ours + total(model.plain_differences(pure=True))
    assert pure - values == pytest.approx(136.0, abs=0.2)


def test_products_at_no_cost_for_memory_take_the_models_flops() -> None:
    """With endless bandwidth the step is its FLOPs over their rate."""
    rates = Rates(copy=1e30, products=1e14, attention_forward=1e14, attention_backward=1e14, peak=1)
    model = StepModel(replace(SHAPE, sequences=SEQUENCES), rates)
    seconds = SHAPE.tokens * training_flops_per_token(TARGET_MODEL) / 1e14
    # Attention computes its scores twice, and the head's products are taken a little longer.
    assert total(model.ours()) == pytest.approx(1e3 * seconds, rel=0.03)


def test_smaller_chunks_and_more_tokens_take_longer() -> None:
    whole = total(StepModel(SHAPE, H100).ours())
    assert total(StepModel(SHAPE, H100, chunk_bytes=1 << 26).ours()) > whole
    assert 1.8 * whole < total(StepModel(replace(SHAPE, sequences=8), H100).ours()) < 2 * whole


def test_nothing_is_expected_of_a_device_that_is_not_known() -> None:
    assert rates_of("NVIDIA H100 80GB HBM3") is H100
    assert rates_of("cpu") is None

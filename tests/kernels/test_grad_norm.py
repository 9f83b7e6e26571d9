"""The gradient norm and what follows from it,
every implementation against plain float64 arithmetic.
"""

import math
from fractions import Fraction

import pytest
import torch

from megatron_completep import kernels
from megatron_completep.kernels import Control, new_control, read_control
from megatron_completep.kernels.ops.adamw import block_table
from tests.kernels.step_kernels import DEVICE, IMPLEMENTATIONS, launchers, mutant


@pytest.mark.parametrize("size", [0, 1, 63, 1024, 70_001])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_the_sum_of_squares_matches_float64(name, dtype, size):
    flat = torch.randn(size, generator=torch.Generator().manual_seed(0)).to(dtype)
    total = IMPLEMENTATIONS[name].sum_of_squares(flat.to(DEVICE), None)
    assert total.dtype == torch.float64 and total.shape == ()
    assert total.item() == pytest.approx(
        flat.double().square().sum().item(), rel=1e-12 if dtype == torch.float64 else 2e-7
    )


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_only_the_named_segments_count(name):
    """What another rank counts, and the padding, are left out, whatever they hold."""
    segments = torch.tensor([[64, 1000, 0], [6400, 5000, 0], [12_800, 0, 0]])
    flat = torch.full((12_864,), math.nan)
    expected = 0.0
    for start, length, _ in segments.tolist():
        flat[start : start + length] = torch.randn(
            length, generator=torch.Generator().manual_seed(start)
        )
        expected += flat[start : start + length].double().square().sum().item()
    for table in (segments, block_table(segments, 1024)):
        assert IMPLEMENTATIONS[name].sum_of_squares(
            flat.to(DEVICE), table.to(DEVICE)
        ).item() == pytest.approx(expected, rel=2e-7)
    assert math.isnan(IMPLEMENTATIONS[name].sum_of_squares(flat.to(DEVICE), None).item())


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_the_sum_is_bitwise_repeatable(name):
    flat = torch.randn(30_000, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    totals = {IMPLEMENTATIONS[name].sum_of_squares(flat, None).item() for _ in range(3)}
    assert len(totals) == 1


def test_the_cpu_sum_does_not_depend_on_the_number_of_threads():
    flat = torch.randn(1_000_001, generator=torch.Generator().manual_seed(0))
    threads = torch.get_num_threads()
    try:
        totals = set()
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            totals.add(kernels.sum_of_squares(flat).item())
    finally:
        torch.set_num_threads(threads)
    assert len(totals) == 1


def begin(implementation, sum_sq, step, max_norm, beta1=0.9, beta2=0.999):
    record = new_control(DEVICE, Control(0.25, step=step, unused=0.75))
    total = torch.tensor(sum_sq, dtype=torch.float64, device=DEVICE)
    implementation.begin_step_(record, total, max_norm, beta1, beta2)
    after = read_control(record)
    assert (after.learning_rate, after.unused) == (0.25, 0.75), (
        "these two are not for `begin_step_` to write"
    )
    return after


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_bias_corrections_are_exact(name):
    """Against rational arithmetic,
    where 1 - beta^step in float32 is off by 1e-5 and a float32 step stops at 2^24.
    """
    for step, beta1, beta2 in (
        (1, 0.9, 0.999),
        (2, 0.9, 0.9999),
        (1000, 0.95, 0.999),
        (2**24 + 1, 0.9, 0.9999999),
        (7, 0.0, 0.5),
    ):
        control = begin(IMPLEMENTATIONS[name], 1.0, step - 1, 0.0, beta1, beta2)
        assert control.step == step
        for value, beta in ((control.correction1, beta1), (control.correction2, beta2)):
            exact = (
                float(1 - Fraction(beta) ** step)
                if step < 2000
                else -math.expm1(step * math.log(beta))
                if beta
                else 1.0
            )
            assert value == pytest.approx(exact, rel=1e-9 if step > 2000 else 2e-12)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_the_clip_coefficient_is_that_of_torch(name):
    for norm in (0.0, 1e-3, 0.999, 1.0, 30.0):
        parameter = torch.zeros(1, dtype=torch.float64, requires_grad=True)
        parameter.grad = torch.tensor([norm], dtype=torch.float64)
        torch.nn.utils.clip_grad_norm_([parameter], 1.0)
        control = begin(IMPLEMENTATIONS[name], norm**2, 0, 1.0)
        assert control.clip * norm == pytest.approx(parameter.grad.item(), rel=1e-14)
        assert control.grad_norm == pytest.approx(norm, rel=1e-15)
        assert begin(IMPLEMENTATIONS[name], norm**2, 0, 0.0).clip == 1.0


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("sum_sq", [math.inf, math.nan])
def test_a_norm_that_is_not_finite_sets_the_skip_flag_and_keeps_the_step(name, sum_sq):
    control = begin(IMPLEMENTATIONS[name], sum_sq, 41, 1.0)
    assert (control.step, control.clip, control.skip) == (41.0, 1.0, 1.0)
    assert not math.isfinite(control.grad_norm)
    fine = begin(IMPLEMENTATIONS[name], 4.0, 41, 1.0)
    assert (fine.step, fine.clip, fine.skip) == (42.0, 1.0 / (2.0 + 1e-6), 0.0)


def test_a_skipped_step_that_advances_is_caught(monkeypatch):
    broken = launchers(
        mutant("ops.grad_norm", "tl.where(finite, 1.0, 0.0)", "tl.where(finite, 1.0, 1.0)")
    )
    control = begin(broken, math.inf, 41, 1.0)
    assert control.step == 42.0


def test_a_norm_that_counts_padding_is_caught():
    broken = launchers(mutant("ops.grad_norm", "tl.where(i < length, x, 0.0)", "x"))
    flat, segments = torch.ones(128).to(DEVICE), torch.tensor([[0, 65, 0]]).to(DEVICE)
    assert IMPLEMENTATIONS["triton"].sum_of_squares(flat, segments).item() == 65.0
    assert broken.sum_of_squares(flat, segments).item() == 128.0


@pytest.mark.parametrize("segments", [None, torch.tensor([[0, 65, 0]])])
def test_the_norm_operator_passes_opcheck(segments):
    table = None if segments is None else kernels.device_segments(segments, DEVICE)
    torch.library.opcheck(
        torch.ops.completep.sum_of_squares.default, (torch.randn(128, device=DEVICE), table)
    )


def test_the_begin_step_operator_passes_opcheck():
    control = new_control(DEVICE, Control(0.25, step=1))
    sum_sq = torch.tensor(4.0, dtype=torch.float64, device=DEVICE)
    torch.library.opcheck(
        torch.ops.completep.begin_step_.default, (control, sum_sq, 1.0, 0.9, 0.95)
    )

"""Casts to float8: Triton kernels (interpreter or GPU) and CPU path, to the byte."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron_completep.kernels.cpu import float8 as cpu
from megatron_completep.kernels.ops import float8
from tests.kernels.step_kernels import DEVICE, launchers, mutant

TRITON = launchers(float8)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def operand(shape: tuple[int, int], dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Elements over many octaves, with ties between two numbers of either type among them."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator) * torch.randn(shape, generator=generator).exp()
    x.flatten()[::7] = 1.0625  # halfway between two numbers of e4m3
    x.flatten()[::11] = 1.125  # and of e5m2
    return x.to(dtype).to(DEVICE)


def same_bytes(a: Tensor, b: Tensor) -> bool:
    """NaN may have any sign."""
    a = a.cpu()
    not_numbers = a.float().isnan() & b.float().isnan()
    return bool((not_numbers | (a.view(torch.uint8) == b.view(torch.uint8))).all())


def check_cast(module: object, x: Tensor, amax: Tensor, gradient: bool) -> None:
    expected = cpu.float8_cast(x.cpu(), amax.cpu(), gradient, True)
    data, scale, transposed = module.cast(x, amax, gradient, True)
    assert torch.equal(scale.cpu(), expected[1]) or bool(scale.isnan() & expected[1].isnan())
    assert same_bytes(data, expected[0])
    assert same_bytes(transposed, expected[2])
    assert module.cast(x, amax, gradient, False)[2].numel() == 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("shape", [(37, 50), (1, 3), (70, 130)], ids=str)
def test_cast_and_transpose_have_the_bytes_of_torch(dtype, gradient, shape):
    x = operand(shape, dtype)
    amax = TRITON.largest(x)
    assert amax == x.abs().max().float()
    for bound in (amax, amax / 16, torch.zeros_like(amax)):
        check_cast(TRITON, x, bound, gradient)


def test_the_reference_is_torch_s_own_rounding_under_the_smallest_power_of_two_that_fits():
    x = operand((40, 50), torch.float32).cpu()
    for gradient, largest in ((False, 448.0), (True, 57344.0)):
        for factor in (1.0, 3e-20, 7e20):
            data, scale, _ = cpu.float8_cast(factor * x, (factor * x).abs().max(), gradient, False)
            exponent = torch.log2(scale.double())
            assert exponent == exponent.round()
            top = (factor * x).abs().max().double() / scale
            assert largest / 2 <= top <= largest
            expected = (factor * x).double() / scale.double()
            assert same_bytes(data, expected.float().to(data.dtype))


@pytest.mark.parametrize("module", ["triton", "cpu"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_stays_so(module, bad):
    x = operand((5, 9), torch.float32)
    x[2, 3] = bad
    amax = TRITON.largest(x) if module == "triton" else cpu.largest_magnitude(x.cpu())
    assert not amax.isfinite()
    cast = TRITON.cast if module == "triton" else cpu.float8_cast
    data, scale, _ = cast(x if module == "triton" else x.cpu(), amax, False, False)
    assert scale.isnan() and data.float()[2, 3].isnan()


def test_magnitudes_beyond_the_bound_saturate_and_extreme_bounds_give_normal_scales():
    x = torch.tensor([[1e30, -1e30, 1.0]], device=DEVICE)
    data, scale, _ = TRITON.cast(x, torch.ones((), device=DEVICE), False, False)
    assert (data.float() * scale).tolist()[0][:2] == [448 * 2**-8, -448 * 2**-8]
    for bound in (1e-42, 3e38):
        check_cast(TRITON, x, torch.tensor(bound, device=DEVICE), True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_largest_of_segments_are_those_of_each_group(dtype):
    values = torch.zeros(64 * 40)
    segments = torch.tensor([[0, 1300, 2], [1344, 70, 0], [1472, 1000, 2]])
    generator = torch.Generator().manual_seed(1)
    expected = torch.zeros(4)
    for start, size, group in segments.tolist():
        values[start : start + size] = torch.randn(size, generator=generator).to(dtype).float()
        expected[group] = max(expected[group], values[start : start + size].abs().max())
    stored = values.to(dtype).to(DEVICE)
    for largest in (
        TRITON.largest_of_segments(stored, segments.to(DEVICE), 4),
        cpu.largest_of_segments(stored.cpu(), segments, 4),
    ):
        assert torch.equal(largest.cpu(), expected)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("(quotient >> 23) + 1", "(quotient >> 23) + 2"),
        ("tl.trans(rounded)", "rounded"),
        ("0x7FC00000", "0x3F800000"),
        ("tl.PropagateNan.ALL", "tl.PropagateNan.NONE"),
    ],
)
def test_a_kernel_that_is_wrong_is_noticed(old, new):
    """Negative controls. A tile is square, so that the transpose of another one has its shape."""
    module = launchers(mutant("ops.float8", old, new))
    x = operand((64, 64), torch.float32)
    bad = operand((8, 8), torch.float32)
    bad[3, 5] = float("nan")
    with pytest.raises(AssertionError):
        check_cast(module, x, x.abs().max(), False)
        check_cast(module, bad, bad.abs().max(), False)
        check_cast(module, bad, torch.ones((), device=DEVICE), False)

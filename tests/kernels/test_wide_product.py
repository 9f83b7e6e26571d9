"""Products added into a wider total:
what each device does, and when torch's GEMM is trusted to do it in one piece.
"""

import pytest
import torch

from megatron_completep import kernels
from megatron_completep.kernels.ops.wide_product import adds_exactly
from tests.kernels.step_kernels import DEVICE

true_addmm = torch.addmm


def exact(total, a, b, *, beta=1.0, out_dtype=None, out=None):
    """What CUDA does: the product in float32, added in float32."""
    return out.copy_((0.0 if beta == 0.0 else beta * total) + a.float() @ b.float())


def rounding(total, a, b, *, beta=1.0, out_dtype=None, out=None):
    return out.copy_((0.0 if beta == 0.0 else beta * total) + (a @ b).float())


def reading_what_it_overwrites(total, a, b, *, beta=1.0, out_dtype=None, out=None):
    return out.copy_(beta * total + a.float() @ b.float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_product_is_added_or_written(dtype, overwrite):
    generator = torch.Generator().manual_seed(0)
    a, b = (
        torch.randn(*shape, generator=generator).to(dtype).to(DEVICE) for shape in ((5, 7), (7, 3))
    )
    total = torch.full(
        (5, 3),
        float("nan") if overwrite else 2.0,
        dtype=torch.float64 if dtype == torch.float64 else torch.float32,
    )
    total = total.to(DEVICE)
    kernels.add_product(total, a, b, overwrite)
    expected = a.double() @ b.double() + (0.0 if overwrite else 2.0)
    tolerance = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 2e-2}[dtype]
    torch.testing.assert_close(total.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("addmm", "trusted"),
    [
        (exact, True),
        (rounding, False),
        (reading_what_it_overwrites, False),
        (true_addmm, torch.cuda.is_available()),
    ],
)
def test_only_a_gemm_that_rounds_nothing_is_trusted(addmm, trusted, monkeypatch):
    """CPU builds refuse the combination, which is one way to say no."""
    monkeypatch.setattr(torch, "addmm", addmm)
    adds_exactly.cache_clear()
    try:
        assert adds_exactly(torch.device(DEVICE), torch.bfloat16) is trusted
    finally:
        adds_exactly.cache_clear()


@pytest.mark.gpu
def test_weight_gradients_are_not_rounded_on_a_gpu():
    a = torch.full((16, 16), 1.0 + 2.0**-7, dtype=torch.bfloat16, device="cuda")
    total = torch.ones(16, 16, device="cuda")
    kernels.add_product(total, a, a)
    assert (total == 1.0 + 16.0 * (1.0 + 2.0**-7) ** 2).all()

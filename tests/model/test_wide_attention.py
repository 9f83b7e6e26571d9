"""Short bf16 sequences on a CPU: attention in float32, by a rule of shape."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_completep.model.attention import AttentionInputs, attend
from megatron_completep.model.wide_attention import float32_attention, pays_in_float32


def heads(seed: int, *shape: int) -> Tensor:
    """[B, N, S, D] as a view of a fused projection [S, B, ...]: strided in every dimension."""
    batch, count, length, size = shape
    generator = torch.Generator().manual_seed(seed)
    fused = torch.randn(length, batch, count + 1, size, generator=generator, dtype=torch.float64)
    return fused.bfloat16()[:, :, :count].permute(1, 2, 0, 3)


def attention(function, inputs: list[Tensor], d_out: Tensor) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, d_out)]


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.2, enable_gqa=True)


def wide(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return float32_attention(q, k, v, 0.2)


def errors(found: list[Tensor], exact: list[Tensor]) -> list[float]:
    pairs = zip(found, exact, strict=True)
    return [float((a.double() - b).norm() / b.norm()) for a, b in pairs]


@pytest.mark.parametrize("groups", [4, 2, 1])
@pytest.mark.parametrize("length", [5, 33, 128])
def test_it_is_as_exact_as_torchs_own_in_output_and_every_gradient(length, groups):
    inputs = [
        heads(0, 2, 4, length, 16),
        heads(1, 2, groups, length, 16),
        heads(2, 2, groups, length, 16),
    ]
    d_out = heads(3, 2, 4, length, 16)
    exact = attention(sdpa, [x.double() for x in inputs], d_out.double())
    ours = attention(wide, inputs, d_out)
    assert all(x.dtype == torch.bfloat16 for x in ours)
    bounds = errors(attention(sdpa, inputs, d_out), exact)
    for error, bound in zip(errors(ours, exact), bounds, strict=True):
        assert error <= 1.1 * bound + 1e-4
    # The control: another scale is far outside.
    other = attention(lambda q, k, v: float32_attention(q, k, v, 0.3), inputs, d_out)
    assert errors(other, exact)[0] > 5 * bounds[0]


def test_shape_type_and_device_decide():
    def rule(length: int, size: int, keys: int | None = None, **how) -> bool:
        how = {"dtype": torch.bfloat16, **how}
        q = torch.empty(1, 2, length, size, **how)
        return pays_in_float32(q, torch.empty(1, 2, keys or length, size, **how))

    assert rule(128, 64) and rule(255, 128) and rule(512, 32)
    assert not rule(256, 64)
    assert not rule(513, 32)
    assert not rule(8, 64, keys=20)  # behind a cache
    assert not rule(128, 64, dtype=torch.float32)
    assert not rule(128, 64, device="meta")


def test_the_model_takes_it_where_the_rule_says_so():
    def function_of(dtype: torch.dtype) -> str:
        q = heads(0, 1, 2, 8, 16).to(dtype).requires_grad_()
        out = attend(q, q, q, AttentionInputs(), 0.25, "sdpa")
        assert out.dtype == dtype
        return type(out.grad_fn).__name__

    assert function_of(torch.bfloat16) == "_Float32AttentionBackward"
    assert function_of(torch.float32) != "_Float32AttentionBackward"

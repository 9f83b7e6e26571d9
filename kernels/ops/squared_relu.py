"""Squared ReLU: max(x, 0)^2, gradient 2 * max(x, 0) * d_out; float32 arithmetic, rounded once."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..cpu import pointwise as cpu
from ..cpu.compiled import CompiledDefinitions, server_of
from ..launch import block_shape, options
from ..library import first_derivative, register
from ..optional_triton import tl, triton
from ..tiling import ceil_div


@triton.jit
def squared_relu_forward_kernel(
    x: tl.tensor, out: tl.tensor, n: tl.tensor, BLOCK: tl.constexpr
) -> None:
    """Each program computes one block of the n elements."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    i = start + tl.arange(0, BLOCK)
    inside = i < n
    loaded = tl.load(x + i, mask=inside, other=0.0).to(tl.float32)
    # NaN stays NaN, as in torch, so that a failing run is noticed.
    positive = tl.maximum(loaded, 0.0, propagate_nan=tl.PropagateNan.ALL)
    square = positive * positive
    tl.store(out + i, square.to(out.dtype.element_ty), mask=inside)


@triton.jit
def squared_relu_backward_kernel(
    d_out: tl.tensor, x: tl.tensor, d_x: tl.tensor, n: tl.tensor, BLOCK: tl.constexpr
) -> None:
    """Each program computes one block of the n elements."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    i = start + tl.arange(0, BLOCK)
    inside = i < n
    loaded = tl.load(x + i, mask=inside, other=0.0).to(tl.float32)
    # NaN stays NaN, as in the forward.
    positive = tl.maximum(loaded, 0.0, propagate_nan=tl.PropagateNan.ALL)
    gradient = tl.load(d_out + i, mask=inside, other=0.0).to(tl.float32)
    product = 2.0 * positive * gradient
    tl.store(d_x + i, product.to(d_x.dtype.element_ty), mask=inside)


def launch_squared_relu_forward(x: Tensor) -> Tensor:
    """The result has the shape of `x` and is contiguous."""
    if x.dtype == torch.float64:
        return cpu.squared_relu_forward(x)
    x = x.contiguous()
    out = torch.empty_like(x)
    size = x.numel()
    if size > 0:
        block, num_warps, _ = block_shape("squared_relu_forward", x.dtype, x.device)
        grid = (ceil_div(size, block),)
        squared_relu_forward_kernel[grid](x, out, size, BLOCK=block, **options(num_warps))
    return out


def launch_squared_relu_backward(d_out: Tensor, x: Tensor) -> Tensor:
    """The gradient has the shape of `x` and is contiguous."""
    if x.dtype == torch.float64:
        return cpu.squared_relu_backward(d_out, x)
    d_out = d_out.contiguous()
    x = x.contiguous()
    d_x = torch.empty_like(x)
    size = x.numel()
    if size > 0:
        block, num_warps, _ = block_shape("squared_relu_backward", x.dtype, x.device)
        grid = (ceil_div(size, block),)
        squared_relu_backward_kernel[grid](d_out, x, d_x, size, BLOCK=block, **options(num_warps))
    return d_x


_squared_relu_forward = register(
    "squared_relu_forward(Tensor x) -> Tensor",
    cpu=cpu.squared_relu_forward,
    cuda=launch_squared_relu_forward,
    fake=lambda x: x.new_empty(x.shape),
)
_squared_relu_backward = register(
    "squared_relu_backward(Tensor d_out, Tensor x) -> Tensor",
    cpu=cpu.squared_relu_backward,
    cuda=launch_squared_relu_backward,
    fake=lambda d_out, x: x.new_empty(x.shape),
)


class _SquaredReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, compiled: CompiledDefinitions | None) -> Tensor:
        ctx.save_for_backward(x)
        ctx.compiled = compiled
        forward = compiled.squared_relu_forward if compiled else _squared_relu_forward
        return forward(x)

    @staticmethod
    @first_derivative
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor, None]:
        compiled = ctx.compiled
        backward = compiled.squared_relu_backward if compiled else _squared_relu_backward
        return backward(d_out, ctx.saved_tensors[0]), None


_squared_relu: Callable[[Tensor, CompiledDefinitions | None], Tensor] = _SquaredReLU.apply


def squared_relu(x: Tensor, compiled: CompiledDefinitions | None = None) -> Tensor:
    """`max(x, 0)^2`, any shape; saves its input.

    compiled: what runs in place of the operator on the tensors that it serves.
    """
    return _squared_relu(x, server_of(x, compiled))

"""Squared ReLU: max(x, 0)^2, gradient 2 * max(x, 0) * d_out; float32 arithmetic, rounded once."""

from typing import Any

import torch
from torch import Tensor

from ..cpu import pointwise as cpu
from ..launch import block_shape, options
from ..library import first_derivative, register
from ..optional_triton import tl, triton


@triton.jit
def squared_relu_forward_kernel(x, out, n, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    positive = tl.maximum(
        tl.load(x + i, mask=i < n, other=0.0).to(tl.float32), 0.0, propagate_nan=tl.PropagateNan.ALL
    )
    tl.store(out + i, (positive * positive).to(out.dtype.element_ty), mask=i < n)


@triton.jit
def squared_relu_backward_kernel(d_out, x, d_x, n, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    positive = tl.maximum(
        tl.load(x + i, mask=i < n, other=0.0).to(tl.float32), 0.0, propagate_nan=tl.PropagateNan.ALL
    )
    gradient = tl.load(d_out + i, mask=i < n, other=0.0).to(tl.float32)
    tl.store(d_x + i, (2.0 * positive * gradient).to(d_x.dtype.element_ty), mask=i < n)


def launch_squared_relu_forward(x: Tensor) -> Tensor:
    if x.dtype == torch.float64:
        return cpu.squared_relu_forward(x)
    x = x.contiguous()
    out = torch.empty_like(x)
    if x.numel() > 0:
        block, num_warps, _ = block_shape("squared_relu_forward", x.dtype, x.device)
        squared_relu_forward_kernel[(triton.cdiv(x.numel(), block),)](
            x, out, x.numel(), BLOCK=block, **options(num_warps)
        )
    return out


def launch_squared_relu_backward(d_out: Tensor, x: Tensor) -> Tensor:
    if x.dtype == torch.float64:
        return cpu.squared_relu_backward(d_out, x)
    d_out, x = d_out.contiguous(), x.contiguous()
    d_x = torch.empty_like(x)
    if x.numel() > 0:
        block, num_warps, _ = block_shape("squared_relu_backward", x.dtype, x.device)
        squared_relu_backward_kernel[(triton.cdiv(x.numel(), block),)](
            d_out, x, d_x, x.numel(), BLOCK=block, **options(num_warps)
        )
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
    def forward(ctx: Any, x):
        ctx.save_for_backward(x)
        return _squared_relu_forward(x)

    @staticmethod
    @first_derivative
    def backward(ctx: Any, d_out):
        return _squared_relu_backward(d_out, ctx.saved_tensors[0])


def squared_relu(x: Tensor) -> Tensor:
    """`max(x, 0)^2`, any shape; saves its input."""
    return _SquaredReLU.apply(x)

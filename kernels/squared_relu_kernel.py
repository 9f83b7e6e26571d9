"""Squared ReLU: max(x, 0)^2, gradient 2 * max(x, 0) * d_out; float32 arithmetic, rounded once."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import native
from .launch import flat_shape


@triton.jit
def forward_kernel(x, out, n, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    positive = tl.maximum(tl.load(x + i, mask=i < n, other=0.0).to(tl.float32), 0.0, propagate_nan=tl.PropagateNan.ALL)
    tl.store(out + i, (positive * positive).to(out.dtype.element_ty), mask=i < n)


@triton.jit
def backward_kernel(d_out, x, d_x, n, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    positive = tl.maximum(tl.load(x + i, mask=i < n, other=0.0).to(tl.float32), 0.0, propagate_nan=tl.PropagateNan.ALL)
    gradient = tl.load(d_out + i, mask=i < n, other=0.0).to(tl.float32)
    tl.store(d_x + i, (2.0 * positive * gradient).to(d_x.dtype.element_ty), mask=i < n)


def squared_relu_forward(x: Tensor) -> Tensor:
    if x.dtype == torch.float64:
        return native.squared_relu_forward(x)
    x = x.contiguous()
    out = torch.empty_like(x)
    if x.numel() > 0:
        shape = flat_shape()
        forward_kernel[(triton.cdiv(x.numel(), shape.columns),)](x, out, x.numel(), BLOCK=shape.columns, **shape.options)
    return out


def squared_relu_backward(d_out: Tensor, x: Tensor) -> Tensor:
    if x.dtype == torch.float64:
        return native.squared_relu_backward(d_out, x)
    d_out, x = d_out.contiguous(), x.contiguous()
    d_x = torch.empty_like(x)
    if x.numel() > 0:
        shape = flat_shape()
        backward_kernel[(triton.cdiv(x.numel(), shape.columns),)](d_out, x, d_x, x.numel(), BLOCK=shape.columns, **shape.options)
    return d_x

"""Rotary position embedding: the pair (i, i + D/2) of every head is rotated by the angle of its position.

    out[i]       = x[i] * cos - x[i + D/2] * sin
    out[i + D/2] = x[i + D/2] * cos + x[i] * sin          inverse, and gradient: -sin

A program rotates a tile of heads of one token, so cos and sin [S, 1 or B, D/2] are read once for them all. In place or not:
each element is read before it is written, by the program that writes it. Only the last dimension must be contiguous.
"""

from typing import Any

import torch
from torch import Tensor

from ..cpu import pointwise as cpu
from ..launch import rotary_shape
from ..library import first_derivative, register
from ..optional_triton import tl, triton


@triton.jit
def rotary_kernel(
    x, cos, sin, out, batch, heads, half,
    x_stride_s, x_stride_b, x_stride_n, out_stride_s, out_stride_b, out_stride_n,
    cos_stride_s, cos_stride_b, sin_stride_s, sin_stride_b,
    INVERSE: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    s, b = token // batch, token % batch
    column = tl.arange(0, HALF)[None, :]
    in_half = column < half
    cosine = tl.load(
        cos + s * cos_stride_s + b * cos_stride_b + column, mask=in_half, other=0.0
    ).to(tl.float32)
    sine = tl.load(sin + s * sin_stride_s + b * sin_stride_b + column, mask=in_half, other=0.0).to(
        tl.float32
    )
    if INVERSE:
        sine = -sine
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS).to(tl.int64)[:, None]
    mask = (head < heads) & in_half
    source = x + s * x_stride_s + b * x_stride_b + head * x_stride_n + column
    first = tl.load(source, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(source + half, mask=mask, other=0.0).to(tl.float32)
    destination = out + s * out_stride_s + b * out_stride_b + head * out_stride_n + column
    tl.store(destination, (first * cosine - second * sine).to(out.dtype.element_ty), mask=mask)
    tl.store(
        destination + half, (second * cosine + first * sine).to(out.dtype.element_ty), mask=mask
    )


def _launch(x: Tensor, cos: Tensor, sin: Tensor, out: Tensor, inverse: bool) -> None:
    if x.numel() == 0:
        return
    sequence, batch, heads, head_dim = x.shape
    cos, sin = (t.contiguous() for t in (cos, sin))
    cos_stride_b = 0 if cos.shape[1] == 1 else cos.stride(1)
    shape = rotary_shape(heads, head_dim // 2, x.dtype, x.device)
    rotary_kernel[(sequence * batch, triton.cdiv(heads, shape.rows))](
        x, cos, sin, out, batch, heads, head_dim // 2,
        x.stride(0), x.stride(1), x.stride(2), out.stride(0), out.stride(1), out.stride(2),
        cos.stride(0), cos_stride_b, sin.stride(0), 0 if sin.shape[1] == 1 else sin.stride(1),
        INVERSE=inverse, HEADS=shape.rows, HALF=shape.columns, **shape.options,
    )  # fmt: skip


def launch_rotary(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> Tensor:
    if x.dtype == torch.float64:
        return cpu.rotary(x, cos, sin, inverse)
    x = x if x.stride(-1) == 1 else x.contiguous()
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _launch(x, cos, sin, out, inverse)
    return out


def launch_rotary_(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> None:
    if x.dtype == torch.float64:
        cpu.rotary_(x, cos, sin, inverse)
    elif x.stride(-1) != 1:
        x.copy_(launch_rotary(x, cos, sin, inverse))
    else:
        _launch(x, cos, sin, x, inverse)


_rotary = register(
    "rotary(Tensor x, Tensor cos, Tensor sin, bool inverse) -> Tensor",
    cpu=cpu.rotary,
    cuda=launch_rotary,
    fake=lambda x, cos, sin, inverse: x.new_empty(x.shape),
)
_rotary_in_place = register(
    "rotary_(Tensor(a!) x, Tensor cos, Tensor sin, bool inverse) -> ()",
    cpu=cpu.rotary_,
    cuda=launch_rotary_,
    fake=lambda x, cos, sin, inverse: None,
)


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x, cos, sin, inverse):
        ctx.save_for_backward(cos, sin)
        ctx.inverse = inverse
        return _rotary(x, cos, sin, inverse)

    @staticmethod
    @first_derivative
    def backward(ctx: Any, d_out):
        cos, sin = ctx.saved_tensors
        return _rotary(d_out, cos, sin, not ctx.inverse), None, None, None


def rotary(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool = False) -> Tensor:
    """Rotate the pairs (i, i + D/2) of `x` [S, B, N, D] by angles whose `cos`, `sin` are float32 [S, 1 or B, D/2].

    `inverse` rotates back (it is also the gradient). Only the last dimension of `x` must be contiguous; the result is.
    """
    return _Rotary.apply(x, cos, sin, inverse)


def rotary_(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool = False) -> None:
    """`rotary` in place, without autograd: for a tensor that nobody saved, such as a view of the fused QKV projection."""
    _rotary_in_place(x, cos, sin, inverse)

"""Rotary position embedding: the pair (i, i + D/2) of a head is rotated by its position's angle.

    out[i]       = x[i] * cos - x[i + D/2] * sin
    out[i + D/2] = x[i + D/2] * cos + x[i] * sin          inverse, and gradient: -sin

A program rotates a tile of heads of one token, so cos and sin [S, 1 or B, D/2] are read once for
them all. It works in place or not: each element is read before it is written, by the program that
writes it. Only the last dimension must be contiguous.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..cpu import pointwise as cpu
from ..cpu.compiled import CompiledDefinitions, server_of
from ..heads import angle_strides, dense, load_angles, load_halves, store_halves
from ..launch import rotary_shape
from ..library import first_derivative, register
from ..optional_triton import tl, triton
from ..tiling import ceil_div


@triton.jit
def rotary_kernel(
    x: tl.tensor, cos: tl.tensor, sin: tl.tensor, out: tl.tensor,
    batch: tl.tensor, heads: tl.tensor, half: tl.tensor,
    x_stride_s: tl.tensor, x_stride_b: tl.tensor, x_stride_n: tl.tensor,
    out_stride_s: tl.tensor, out_stride_b: tl.tensor, out_stride_n: tl.tensor,
    cos_stride_s: tl.tensor, cos_stride_b: tl.tensor,
    sin_stride_s: tl.tensor, sin_stride_b: tl.tensor,
    INVERSE: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr,
) -> None:  # fmt: skip
    """Each program rotates HEADS heads of one token.

    Strides are of the sequence (s), batch (b) and head (n) dimensions, in elements.
    """
    # In 64 bits: an offset into a large batch passes 2^31 elements.
    token = tl.program_id(0).to(tl.int64)
    s = token // batch
    b = token % batch
    column = tl.arange(0, HALF)[None, :]
    in_half = column < half

    cosine, sine = load_angles(
        cos, sin, s, b, cos_stride_s, cos_stride_b, sin_stride_s, sin_stride_b, column, in_half
    )
    if INVERSE:
        sine = -sine

    first_head = tl.program_id(1) * HEADS
    head = first_head + tl.arange(0, HEADS).to(tl.int64)[:, None]
    mask = (head < heads) & in_half
    source = x + s * x_stride_s + b * x_stride_b + head * x_stride_n
    low, high = load_halves(source, column, half, mask)

    # Both halves are in registers before either is written, so `out` may be `x`.
    out_low = low * cosine - high * sine
    out_high = high * cosine + low * sine
    destination = out + s * out_stride_s + b * out_stride_b + head * out_stride_n
    store_halves(destination, out_low, out_high, column, half, mask)


def _launch(x: Tensor, cos: Tensor, sin: Tensor, out: Tensor, inverse: bool) -> None:
    if x.numel() == 0:
        return
    sequence, batch, heads, head_dim = x.shape
    half = head_dim // 2
    # The kernel has strides of positions and of sequences, and none of the pairs.
    cos = cos.contiguous()
    sin = sin.contiguous()
    shape = rotary_shape(heads, half, x.dtype, x.device)
    grid = (sequence * batch, ceil_div(heads, shape.rows))
    rotary_kernel[grid](
        x, cos, sin, out,
        batch, heads, half,
        *x.stride()[:3],
        *out.stride()[:3],
        *angle_strides(cos, sin),
        INVERSE=inverse, HEADS=shape.rows, HALF=shape.columns, **shape.options,
    )  # fmt: skip


def launch_rotary(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> Tensor:
    """`x` rotated, contiguous."""
    if x.dtype == torch.float64:
        return cpu.rotary(x, cos, sin, inverse)
    # Heads may be strided: q and k are views of the fused QKV projection.
    x = dense(x)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _launch(x, cos, sin, out, inverse)
    return out


def launch_rotary_(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> None:
    """`x` rotated in place."""
    if x.dtype == torch.float64:
        cpu.rotary_(x, cos, sin, inverse)
    elif x.stride(-1) != 1:
        # The kernel reads pairs of contiguous halves: such a tensor goes through a copy.
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
    """The gradient is the inverse rotation of the result's."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        inverse: bool,
        compiled: CompiledDefinitions | None,
    ) -> Tensor:
        # The rotation is linear in x: backward needs its angles alone.
        ctx.save_for_backward(cos, sin)
        ctx.inverse = inverse
        ctx.rotate = compiled.rotary if compiled else _rotary
        rotated: Tensor = ctx.rotate(x, cos, sin, inverse)
        return rotated

    @staticmethod
    @first_derivative
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor, None, None, None, None]:
        cos, sin = ctx.saved_tensors
        return ctx.rotate(d_out, cos, sin, not ctx.inverse), None, None, None, None


_differentiable_rotary: Callable[..., Tensor] = _Rotary.apply


def rotary(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    inverse: bool = False,
    compiled: CompiledDefinitions | None = None,
) -> Tensor:
    """Rotate the pairs (i, i + D/2) of `x` [S, B, N, D]; `inverse` rotates back.

    `cos` and `sin` of the angles are float32 [S, 1 or B, D/2]. Only the last dimension of `x` must
    be contiguous; the result is contiguous. The gradient goes to `x` alone.
    `compiled` runs in place of the operator on the tensors that it serves.
    """
    return _differentiable_rotary(x, cos, sin, inverse, server_of(x, compiled))


def rotary_(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    inverse: bool = False,
    compiled: CompiledDefinitions | None = None,
) -> None:
    """`rotary` in place, without autograd.

    It is for a tensor that no backward has saved, such as a view of the fused QKV projection.
    """
    compiled = server_of(x, compiled)
    rotate = compiled.rotary_ if compiled else _rotary_in_place
    rotate(x, cos, sin, inverse)

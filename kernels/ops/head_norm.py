"""QK-norm and rotation in one pass: heads of a fused QKV projection become queries and keys.

    normed = x * rstd * gain                 rstd = 1 / sqrt(mean(x^2) + eps), over a head
    out    = normed, rotated                 pairs (i, i + D/2), by the angle of the position

    g      = d_out, rotated back, times gain
    d_x    = rstd * (g - x_hat * mean(g * x_hat))            x_hat = x * rstd
    d_gain = sum over tokens and heads of (d_out, rotated back) * x_hat

Queries have one gain for all heads, keys another. `normed` is rounded to the dtype of x, as a norm
of its own would; the backward rounds nothing in between. A program has a tile of heads of one
token, of both kinds perhaps: what belongs to the other kind is masked and not read. So the heads
are read where the projection wrote them, and their gradients are written beside that of the values,
into one buffer. Only the last dimension must be contiguous.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..cpu import head_norm as cpu
from ..heads import angle_strides, dense, load_angles, load_halves, store_halves
from ..launch import head_norm_backward_shape, rotary_shape
from ..library import first_derivative, register
from ..optional_triton import tl, triton
from ..reference import Norm, compute_dtype
from ..tiling import ceil_div
from .partial_sums import Sink, receivers, vector_gradients


@triton.jit
def _store_half_sums(
    base: tl.tensor, low: tl.tensor, high: tl.tensor, half: tl.tensor, HALF: tl.constexpr
) -> None:
    """Store the sums over the heads of a tile, the low half of a gain's gradient first."""
    column = tl.arange(0, HALF)
    in_half = column < half
    tl.store(base + column, tl.sum(low, axis=0), mask=in_half)
    tl.store(base + half + column, tl.sum(high, axis=0), mask=in_half)


@triton.jit
def _norm_gradient(
    d_low: tl.tensor, d_high: tl.tensor, low: tl.tensor, high: tl.tensor,
    rstd: tl.tensor, half: tl.tensor,
) -> tl.tuple:  # fmt: skip
    """The gradient of the norm's input from that of its output (low, high), without the gain."""
    # The mean of g x_hat over the D = 2 half elements of a head; masked lanes hold 0.
    along = tl.sum(d_low * low + d_high * high, axis=1, keep_dims=True) / (2 * half)
    return (d_low - low * along) * rstd, (d_high - high * along) * rstd


@triton.jit
def head_norm_forward_kernel(
    x: tl.tensor, q_gain: tl.tensor, k_gain: tl.tensor, cos: tl.tensor, sin: tl.tensor,
    q: tl.tensor, k: tl.tensor, q_rstd: tl.tensor, k_rstd: tl.tensor,
    batch: tl.tensor, query_heads: tl.tensor, key_heads: tl.tensor, half: tl.tensor,
    x_stride_s: tl.tensor, x_stride_b: tl.tensor, x_stride_n: tl.tensor,
    cos_stride_s: tl.tensor, cos_stride_b: tl.tensor,
    sin_stride_s: tl.tensor, sin_stride_b: tl.tensor,
    eps: tl.tensor,
    HEADS: tl.constexpr, HALF: tl.constexpr,
) -> None:  # fmt: skip
    """Each program norms and rotates HEADS heads of one token; q and k are contiguous."""
    # In 64 bits: an offset into a large batch passes 2^31 elements.
    token = tl.program_id(0).to(tl.int64)
    s = token // batch
    b = token % batch
    column = tl.arange(0, HALF)[None, :]
    in_half = column < half
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS).to(tl.int64)[:, None]
    is_query = head < query_heads
    is_key = (head >= query_heads) & (head < query_heads + key_heads)

    # Values lie behind the keys in x. A lane of theirs is masked: it is read as 0 and not written.
    source = x + s * x_stride_s + b * x_stride_b + head * x_stride_n
    low, high = load_halves(source, column, half, (is_query | is_key) & in_half)
    squares = tl.sum(low * low + high * high, axis=1, keep_dims=True)
    row_rstd = tl.rsqrt(squares / (2 * half) + eps)
    # Outputs and statistics are contiguous, each kind for itself, so that keys count from 0.
    q_row = token * query_heads + head
    k_row = token * key_heads + head - query_heads
    tl.store(q_rstd + q_row, row_rstd, mask=is_query)
    tl.store(k_rstd + k_row, row_rstd, mask=is_key)

    # A tile may hold heads of both kinds, so each lane picks the gain of its own.
    q_low_gain, q_high_gain = load_halves(q_gain, column, half, in_half)
    k_low_gain, k_high_gain = load_halves(k_gain, column, half, in_half)
    low *= row_rstd * tl.where(is_query, q_low_gain, k_low_gain)
    high *= row_rstd * tl.where(is_query, q_high_gain, k_high_gain)
    # The norm's own rounding.
    dtype: tl.constexpr = x.dtype.element_ty
    low = low.to(dtype).to(tl.float32)
    high = high.to(dtype).to(tl.float32)

    cosine, sine = load_angles(
        cos, sin, s, b, cos_stride_s, cos_stride_b, sin_stride_s, sin_stride_b, column, in_half
    )
    out_low = low * cosine - high * sine
    out_high = high * cosine + low * sine
    store_halves(q + q_row * 2 * half, out_low, out_high, column, half, is_query & in_half)
    store_halves(k + k_row * 2 * half, out_low, out_high, column, half, is_key & in_half)


# Otherwise Triton compiles one more kernel for a number of tokens that 16 divides.
@triton.jit(do_not_specialize=["tokens"])
def head_norm_backward_kernel(
    d_q: tl.tensor, d_k: tl.tensor, x: tl.tensor, q_rstd: tl.tensor, k_rstd: tl.tensor,
    q_gain: tl.tensor, k_gain: tl.tensor, cos: tl.tensor, sin: tl.tensor,
    d_x: tl.tensor, partials: tl.tensor,
    tokens: tl.tensor, batch: tl.tensor,
    query_heads: tl.tensor, key_heads: tl.tensor, half: tl.tensor,
    q_stride_s: tl.tensor, q_stride_b: tl.tensor, q_stride_n: tl.tensor,
    k_stride_s: tl.tensor, k_stride_b: tl.tensor, k_stride_n: tl.tensor,
    x_stride_s: tl.tensor, x_stride_b: tl.tensor, x_stride_n: tl.tensor,
    d_x_stride_s: tl.tensor, d_x_stride_b: tl.tensor, d_x_stride_n: tl.tensor,
    cos_stride_s: tl.tensor, cos_stride_b: tl.tensor,
    sin_stride_s: tl.tensor, sin_stride_b: tl.tensor,
    HEADS: tl.constexpr, HALF: tl.constexpr, STAGES: tl.constexpr,
) -> None:  # fmt: skip
    """Program p takes tiles p, p + P, p + 2P, ... and leaves its share of both gains' gradients.

    A tile is HEADS heads of one token. `partials` is float32 [P, 2, 2 * half].
    """
    column = tl.arange(0, HALF)[None, :]
    in_half = column < half
    q_low_gain, q_high_gain = load_halves(q_gain, column, half, in_half)
    k_low_gain, k_high_gain = load_halves(k_gain, column, half, in_half)
    q_low_sum = tl.zeros((HEADS, HALF), tl.float32)  # over tiles; over heads below
    q_high_sum = tl.zeros((HEADS, HALF), tl.float32)
    k_low_sum = tl.zeros((HEADS, HALF), tl.float32)
    k_high_sum = tl.zeros((HEADS, HALF), tl.float32)
    # Which program takes a tile is fixed, so that the sums repeat to the bit.
    blocks = tl.cdiv(query_heads + key_heads, HEADS)
    first_tile = tl.program_id(0).to(tl.int64)
    for tile in tl.range(first_tile, tokens * blocks, tl.num_programs(0), num_stages=STAGES):
        token = tile // blocks
        s = token // batch
        b = token % batch
        head = (tile % blocks) * HEADS + tl.arange(0, HEADS).to(tl.int64)[:, None]
        is_query = head < query_heads
        is_key = (head >= query_heads) & (head < query_heads + key_heads)
        # A lane past the keys reads 0 everywhere, and so adds nothing to any sum below.
        cosine, sine = load_angles(
            cos, sin, s, b, cos_stride_s, cos_stride_b, sin_stride_s, sin_stride_b, column, in_half
        )
        source = x + s * x_stride_s + b * x_stride_b + head * x_stride_n
        low, high = load_halves(source, column, half, (is_query | is_key) & in_half)
        q_row = d_q + s * q_stride_s + b * q_stride_b + head * q_stride_n
        q_low, q_high = load_halves(q_row, column, half, is_query & in_half)
        k_row = d_k + s * k_stride_s + b * k_stride_b + (head - query_heads) * k_stride_n
        k_low, k_high = load_halves(k_row, column, half, is_key & in_half)
        row_rstd = tl.load(q_rstd + token * query_heads + head, mask=is_query, other=0.0)
        row_rstd += tl.load(k_rstd + token * key_heads + head - query_heads, mask=is_key, other=0.0)

        # The gradient of the kind that a head is not was read as 0. Then the inverse rotation.
        turned_low = q_low + k_low
        turned_high = q_high + k_high
        d_low = turned_low * cosine + turned_high * sine
        d_high = turned_high * cosine - turned_low * sine
        low *= row_rstd  # x_hat from here on
        high *= row_rstd
        q_low_sum += tl.where(is_query, d_low * low, 0.0)
        q_high_sum += tl.where(is_query, d_high * high, 0.0)
        k_low_sum += tl.where(is_key, d_low * low, 0.0)
        k_high_sum += tl.where(is_key, d_high * high, 0.0)
        # The gains' gradients, taken above, do not have the gain in them; that of x does.
        d_low *= tl.where(is_query, q_low_gain, k_low_gain)
        d_high *= tl.where(is_query, q_high_gain, k_high_gain)
        d_low, d_high = _norm_gradient(d_low, d_high, low, high, row_rstd, half)
        destination = d_x + s * d_x_stride_s + b * d_x_stride_b + head * d_x_stride_n
        store_halves(destination, d_low, d_high, column, half, (is_query | is_key) & in_half)
    # A program without a tile writes zeros here: `partials` is not initialized.
    row = partials + tl.program_id(0).to(tl.int64) * 4 * half
    _store_half_sums(row, q_low_sum, q_high_sum, half, HALF)
    _store_half_sums(row + 2 * half, k_low_sum, k_high_sum, half, HALF)


def launch_head_norm_forward(
    heads: Tensor,
    q_gain: Tensor,
    k_gain: Tensor,
    cos: Tensor,
    sin: Tensor,
    query_heads: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(q, k, q_rstd, k_rstd)."""
    # The kernel computes in float32, which would cost a float64 run its digits.
    if heads.dtype == torch.float64:
        return cpu.head_norm_forward(heads, q_gain, k_gain, cos, sin, query_heads, eps)
    heads = dense(heads)
    cos = cos.contiguous()
    sin = sin.contiguous()
    sequence, batch, _, head_dim = heads.shape
    key_heads = (heads.shape[2] - query_heads) // 2
    q, k, q_rstd, k_rstd = _new_outputs(heads, query_heads, torch.float32)
    if heads.numel() == 0:
        return q, k, q_rstd, k_rstd
    half = head_dim // 2
    shape = rotary_shape(query_heads + key_heads, half, heads.dtype, heads.device)
    grid = (sequence * batch, ceil_div(query_heads + key_heads, shape.rows))
    head_norm_forward_kernel[grid](
        heads, q_gain, k_gain, cos, sin,
        q, k, q_rstd, k_rstd,
        batch, query_heads, key_heads, half,
        *heads.stride()[:3],
        *angle_strides(cos, sin),
        eps,
        HEADS=shape.rows, HALF=shape.columns, **shape.options,
    )  # fmt: skip
    return q, k, q_rstd, k_rstd


def launch_head_norm_backward(
    d_q: Tensor, d_k: Tensor, d_v: Tensor, heads: Tensor, q_rstd: Tensor, k_rstd: Tensor,
    q_gain: Tensor, k_gain: Tensor, cos: Tensor, sin: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(d_heads, partials [P, 2, D])."""
    if heads.dtype == torch.float64:
        return cpu.head_norm_backward(
            d_q, d_k, d_v, heads, q_rstd, k_rstd, q_gain, k_gain, cos, sin
        )
    heads = dense(heads)
    d_q = dense(d_q)
    d_k = dense(d_k)
    cos = cos.contiguous()
    sin = sin.contiguous()
    sequence, batch, query_heads, head_dim = d_q.shape
    key_heads = d_k.shape[2]
    d_heads = torch.empty(heads.shape, dtype=heads.dtype, device=heads.device)
    # Values were handed on as they are, and so is their gradient.
    d_heads[:, :, query_heads + key_heads :].copy_(d_v)
    half = head_dim // 2
    shape = head_norm_backward_shape(query_heads + key_heads, half, heads.dtype, heads.device)
    partials = heads.new_empty((shape.programs, 2, head_dim), dtype=torch.float32)
    grid = (shape.programs,)
    head_norm_backward_kernel[grid](
        d_q, d_k, heads, q_rstd, k_rstd,
        q_gain, k_gain, cos, sin,
        d_heads, partials,
        sequence * batch, batch, query_heads, key_heads, half,
        *d_q.stride()[:3],
        *d_k.stride()[:3],
        *heads.stride()[:3],
        *d_heads.stride()[:3],
        *angle_strides(cos, sin),
        HEADS=shape.rows, HALF=shape.widths[0], STAGES=shape.stages, **shape.options,
    )  # fmt: skip
    return d_heads, partials


def _new_outputs(
    heads: Tensor, query_heads: int, statistics: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(q, k, q_rstd, k_rstd), to be written."""
    sequence, batch, count, head_dim = heads.shape
    key_heads = (count - query_heads) // 2
    tokens = sequence * batch
    return (
        heads.new_empty((sequence, batch, query_heads, head_dim)),
        heads.new_empty((sequence, batch, key_heads, head_dim)),
        heads.new_empty(tokens * query_heads, dtype=statistics),
        heads.new_empty(tokens * key_heads, dtype=statistics),
    )


def _fake_forward(
    heads: Tensor,
    q_gain: Tensor,
    k_gain: Tensor,
    cos: Tensor,
    sin: Tensor,
    query_heads: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _new_outputs(heads, query_heads, compute_dtype(heads, q_gain))


def _fake_backward(
    d_q: Tensor, d_k: Tensor, d_v: Tensor, heads: Tensor, q_rstd: Tensor, k_rstd: Tensor,
    q_gain: Tensor, k_gain: Tensor, cos: Tensor, sin: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    # The number of partial sums depends on the device, and a traced shape has to be the real one.
    programs = 1
    if heads.device.type == "cuda" and heads.dtype != torch.float64:
        count = d_q.shape[2] + d_k.shape[2]
        shape = head_norm_backward_shape(count, d_q.shape[-1] // 2, heads.dtype, heads.device)
        programs = shape.programs
    partials = heads.new_empty((programs, 2, heads.shape[-1]), dtype=q_rstd.dtype)
    return heads.new_empty(heads.shape), partials


_forward = register(
    "head_norm_forward(Tensor heads, Tensor q_gain, Tensor k_gain, Tensor cos, Tensor sin, "
    "int query_heads, float eps) -> (Tensor, Tensor, Tensor, Tensor)",
    cpu=cpu.head_norm_forward,
    cuda=launch_head_norm_forward,
    fake=_fake_forward,
)
_backward = register(
    "head_norm_backward(Tensor d_q, Tensor d_k, Tensor d_v, Tensor heads, Tensor q_rstd, "
    "Tensor k_rstd, Tensor q_gain, Tensor k_gain, Tensor cos, Tensor sin) -> (Tensor, Tensor)",
    cpu=cpu.head_norm_backward,
    cuda=launch_head_norm_backward,
    fake=_fake_backward,
)


class _NormedHeads(torch.autograd.Function):
    """Values are a view of the projection; the gradients of all three meet in one buffer."""

    @staticmethod
    def forward(
        ctx: Any,
        heads: Tensor,
        q_gain: Tensor,
        k_gain: Tensor,
        cos: Tensor,
        sin: Tensor,
        query_heads: int,
        norm: Norm,
        sink: Sink | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        q, k, q_rstd, k_rstd = _forward(heads, q_gain, k_gain, cos, sin, query_heads, norm.eps)
        ctx.save_for_backward(heads, q_rstd, k_rstd, q_gain, k_gain, cos, sin)
        ctx.sink = sink
        ctx.receivers = receivers((q_gain, k_gain), sink)
        # The values share the projection's memory. Their gradient comes in as d_v, and backward
        # puts it in its place beside the others.
        values = heads.detach()[:, :, query_heads + k.shape[2] :]
        return q, k, values

    @staticmethod
    @first_derivative
    def backward(
        ctx: Any, d_q: Tensor, d_k: Tensor, d_v: Tensor
    ) -> tuple[Tensor | None, ...]:  # fmt: skip
        d_heads, partials = _backward(d_q, d_k, d_v, *ctx.saved_tensors)
        d_q_gain, d_k_gain = vector_gradients(partials, ctx.receivers, ctx.sink)
        return d_heads, d_q_gain, d_k_gain, None, None, None, None, None


_normed_heads: Callable[..., tuple[Tensor, Tensor, Tensor]] = _NormedHeads.apply


def normed_heads(
    heads: Tensor,
    q_gain: Tensor,
    k_gain: Tensor,
    cos: Tensor,
    sin: Tensor,
    query_heads: int,
    norm: Norm,
    sink: Sink | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries [S, B, N, D] and keys [S, B, G, D], normed and rotated, and values as they are.

    heads: [S, B, N + 2 G, D], the heads of queries, keys and values of a fused projection.
    q_gain, k_gain: [D], one for all heads of queries, one for those of keys.
    cos, sin: float32 [S, 1 or B, D/2] of the angles.
    query_heads: N.
    norm: RMSNorm with its epsilon.
    sink: takes the gradients of the gains, which are then parameters, in place of autograd.

    Raises ValueError for another norm than RMSNorm.
    """
    if not norm.rms:
        raise ValueError(f'kind = "{norm.kind}" of a norm of heads must be "rmsnorm".')
    return _normed_heads(heads, q_gain, k_gain, cos, sin, query_heads, norm, sink)

"""One gradient of the fused QKV projection from those of its queries, keys and values, in one pass.

    out = cat(rotated back d_q, rotated back d_k, d_v)                   along the heads

Rotation is orthogonal, so its gradient is the inverse rotation (rotary.py). Attention returns three
tensors in its own layout; a program reads a tile of heads of one token from where they lie and
writes them side by side. Joining first and rotating in place would move queries and keys twice.
"""

import torch
from torch import Tensor

from ..cpu import pointwise as cpu
from ..cpu.compiled import CompiledDefinitions, server_of
from ..heads import angle_strides, dense, load_angles, load_halves, store_halves
from ..launch import rotary_shape
from ..library import register
from ..optional_triton import tl, triton
from ..tiling import ceil_div


@triton.jit
def join_heads_kernel(
    d_q: tl.tensor, d_k: tl.tensor, d_v: tl.tensor, cos: tl.tensor, sin: tl.tensor, out: tl.tensor,
    batch: tl.tensor, queries: tl.tensor, keys: tl.tensor, half: tl.tensor,
    q_stride_s: tl.tensor, q_stride_b: tl.tensor, q_stride_n: tl.tensor,
    k_stride_s: tl.tensor, k_stride_b: tl.tensor, k_stride_n: tl.tensor,
    v_stride_s: tl.tensor, v_stride_b: tl.tensor, v_stride_n: tl.tensor,
    cos_stride_s: tl.tensor, cos_stride_b: tl.tensor,
    sin_stride_s: tl.tensor, sin_stride_b: tl.tensor,
    HEADS: tl.constexpr, HALF: tl.constexpr,
) -> None:  # fmt: skip
    """Each program joins HEADS heads of one token; `out` is contiguous.

    Strides are of the sequence (s), batch (b) and head (n) dimensions, in elements.
    """
    token = tl.program_id(0).to(tl.int64)
    s = token // batch
    b = token % batch
    column = tl.arange(0, HALF)[None, :]
    head = (tl.program_id(1) * HEADS + tl.arange(0, HEADS).to(tl.int64))[:, None]

    # A head is read from one of the three tensors, and as 0 from the others.
    in_half = column < half
    key = head - queries
    value = key - keys
    q_row = d_q + s * q_stride_s + b * q_stride_b + head * q_stride_n
    q_low, q_high = load_halves(q_row, column, half, (head < queries) & in_half)
    k_row = d_k + s * k_stride_s + b * k_stride_b + key * k_stride_n
    is_key = (key >= 0) & (key < keys)
    k_low, k_high = load_halves(k_row, column, half, is_key & in_half)
    v_row = d_v + s * v_stride_s + b * v_stride_b + value * v_stride_n
    is_value = (value >= 0) & (value < keys)
    v_low, v_high = load_halves(v_row, column, half, is_value & in_half)

    # Values were not rotated. The others turn back: the sine changes its sign.
    cosine, sine = load_angles(
        cos, sin, s, b, cos_stride_s, cos_stride_b, sin_stride_s, sin_stride_b, column, in_half
    )
    turned_low = q_low + k_low
    turned_high = q_high + k_high
    low = turned_low * cosine + turned_high * sine + v_low
    high = turned_high * cosine - turned_low * sine + v_high

    # The last tile of a token may reach past its heads, into those of the next token.
    heads = queries + 2 * keys
    destination = out + (token * heads + head) * 2 * half
    store_halves(destination, low, high, column, half, (head < heads) & in_half)


def launch_join_heads(d_q: Tensor, d_k: Tensor, d_v: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """[S, B, N + 2G, D], contiguous."""
    # The kernel computes in float32, which would cost a float64 run its digits.
    if d_q.dtype == torch.float64:
        return cpu.join_heads(d_q, d_k, d_v, cos, sin)
    d_q = dense(d_q)
    d_k = dense(d_k)
    d_v = dense(d_v)
    cos = cos.contiguous()
    sin = sin.contiguous()
    sequence, batch, queries, head_dim = d_q.shape
    keys = d_k.shape[2]
    heads = queries + 2 * keys
    out = torch.empty((sequence, batch, heads, head_dim), dtype=d_q.dtype, device=d_q.device)
    if out.numel() == 0:
        return out
    half = head_dim // 2
    shape = rotary_shape(heads, half, d_q.dtype, d_q.device)
    grid = (sequence * batch, ceil_div(heads, shape.rows))
    join_heads_kernel[grid](
        d_q, d_k, d_v, cos, sin, out,
        batch, queries, keys, half,
        *d_q.stride()[:3],
        *d_k.stride()[:3],
        *d_v.stride()[:3],
        *angle_strides(cos, sin),
        HEADS=shape.rows, HALF=shape.columns, **shape.options,
    )  # fmt: skip
    return out


def _fake_join_heads(d_q: Tensor, d_k: Tensor, d_v: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    sequence, batch, queries, head_dim = d_q.shape
    return d_q.new_empty((sequence, batch, queries + 2 * d_k.shape[2], head_dim))


_join_heads = register(
    "join_heads(Tensor d_q, Tensor d_k, Tensor d_v, Tensor cos, Tensor sin) -> Tensor",
    cpu=cpu.join_heads,
    cuda=launch_join_heads,
    fake=_fake_join_heads,
)


def join_heads(
    d_q: Tensor,
    d_k: Tensor,
    d_v: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    compiled: CompiledDefinitions | None = None,
) -> Tensor:
    """The gradient [S, B, N + 2G, D] of fused heads, without autograd.

    d_q [S, B, N, D], d_k and d_v [S, B, G, D], with any strides: the gradients of what attention
    read, of which queries and keys had been rotated by the angles of `cos` and `sin`, float32
    [S, 1 or B, D/2]. Without angles nothing was rotated. `compiled` runs in place of the operator
    on the tensors that it serves.
    """
    if cos is None or sin is None:
        return torch.cat((d_q, d_k, d_v), dim=2)
    compiled = server_of(d_q, compiled)
    join = compiled.join_heads if compiled else _join_heads
    joined: Tensor = join(d_q, d_k, d_v, cos, sin)
    return joined

"""Attention over short bf16 sequences on a CPU: computed in float32, which is faster there.

B micro-batch, N query heads, G query groups, S sequence, D head dim.

torch's CPU kernel cuts short sequences into small blocks, whose products in bf16 cost more than in
float32: forward and backward of 8 x 128 tokens take 0.3 (D 16) to 0.8 (D 64) of their time this
way, and round less. From 256 tokens on the two are alike, with narrow heads from 512 on.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default
NARROW_HEAD = 32
NARROW_LIMIT = 512  # tokens of a sequence, with heads that are not wider
WIDE_LIMIT = 255  # with wider ones


def pays_in_float32(q: Tensor, k: Tensor) -> bool:
    """Whether causal attention of q [B, N, S, D] is to be computed in float32: a rule of shape.

    Keys that go back beyond the queries (a cache) are left to torch.
    """
    if q.device.type != "cpu" or q.dtype != torch.bfloat16:
        return False
    length, head_dim = q.shape[2:]
    limit = NARROW_LIMIT if head_dim <= NARROW_HEAD else WIDE_LIMIT
    return length <= limit and k.shape[2] == length


def float32_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Causal attention: q [B, N, S, D], k and v [B, G, S, D] -> [B, N, S, D].

    What backward keeps is what torch's own kernel keeps: the stored inputs, the output, and the
    logsumexp of each row.
    """
    out: Tensor = _Float32Attention.apply(q, k, v, scale)  # type: ignore[no-untyped-call]
    return out


class _Float32Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        ctx.scale = scale
        wide, lse = _forward(*_widened(q, k, v), 0.0, True, scale=scale)
        out: Tensor = wide.to(q.dtype)
        ctx.save_for_backward(q, k, v, out, lse)
        return out

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        d_q, d_k, d_v = _backward(
            d_out.float(), *_widened(q, k, v), out.float(), lse, 0.0, True, scale=ctx.scale
        )
        groups = k.shape[1]
        if groups != q.shape[1]:
            # The heads of a group read the same keys and values.
            d_k, d_v = (d.unflatten(1, (groups, -1)).sum(2) for d in (d_k, d_v))
        return d_q.to(q.dtype), d_k.to(k.dtype), d_v.to(v.dtype), None


def _widened(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """float32 copies, with the keys and values of a group repeated for each of its heads."""
    heads = q.shape[1] // k.shape[1]
    k = k.float()
    v = v.float()
    if heads > 1:
        k = k.repeat_interleave(heads, dim=1)
        v = v.repeat_interleave(heads, dim=1)
    return q.float(), k, v

"""Stand-ins for attention that runs on a GPU alone, with its arguments and its rule, by SDPA."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def lower_right(q: Tensor, k: Tensor, v: Tensor, softmax_scale: float, causal: bool) -> Tensor:
    """flash-attn's own shapes and rule, by SDPA: [B, S, N, D]; the last query sees every key."""
    assert causal
    mask = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool).tril(k.shape[1] - q.shape[1])
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    mixed = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, scale=softmax_scale, enable_gqa=True
    )
    return mixed.transpose(1, 2)


def lower_right_by_document(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    softmax_scale: float,
    causal: bool,
) -> Tensor:
    """The same for sequences one after the other: [T, N, D]."""
    assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
    assert int(cu_seqlens_q[-1]) == len(q) and int(cu_seqlens_k[-1]) == len(k) == len(v)
    sizes_q = cu_seqlens_q.diff().tolist()
    sizes_k = cu_seqlens_k.diff().tolist()
    # Blocks of the kernel are counted by the longest.
    assert (max(sizes_q), max(sizes_k)) == (max_seqlen_q, max_seqlen_k)
    rows = zip(q.split(sizes_q), k.split(sizes_k), v.split(sizes_k), strict=True)
    mixed = [lower_right(a[None], b[None], c[None], softmax_scale, causal)[0] for a, b, c in rows]
    return torch.cat(mixed)


def varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float,
    window_size: tuple[int, int],
    enable_gqa: bool,
) -> Tensor:
    """The same by the name and the arguments of torch's own."""
    assert window_size == (-1, 0)  # causal
    assert enable_gqa == (query.shape[1] != key.shape[1])
    bounds = (cu_seq_q, cu_seq_k, max_q, max_k)
    return lower_right_by_document(query, key, value, *bounds, scale, causal=True)

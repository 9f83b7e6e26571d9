"""flash-attn as attention backend: used where it is installed and asked for, never required."""

from __future__ import annotations

import importlib.util

from torch import Tensor

from megatron_completep.errors import ConfigError


def require_flash_attention() -> None:
    """Raises ConfigError where the package that model.attention_backend needs is missing."""
    if importlib.util.find_spec("flash_attn") is None:
        raise ConfigError(
            "model.attention_backend = flash_attention, but the package flash-attn is not "
            "installed. Install it, or use sdpa."
        )


def flash_attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, document_starts: Tensor | None
) -> Tensor:
    """Causal attention: q [B, N, S, D], k and v [B, G, S, D] -> [B, N, S, D].

    document_starts [documents + 1] int32, over the B * S tokens: each document is a sequence of its
    own.
    """
    from flash_attn import flash_attn_func, flash_attn_varlen_func

    # flash-attn has the sequence before the heads.
    q = q.transpose(1, 2)
    k = k.transpose(1, 2)
    v = v.transpose(1, 2)
    if document_starts is None:
        mixed: Tensor = flash_attn_func(q, k, v, softmax_scale=scale, causal=True)
        return mixed.transpose(1, 2)

    batch, length = q.shape[:2]
    mixed = flash_attn_varlen_func(
        q.flatten(0, 1),
        k.flatten(0, 1),
        v.flatten(0, 1),
        cu_seqlens_q=document_starts,
        cu_seqlens_k=document_starts,
        max_seqlen_q=length,
        max_seqlen_k=length,
        softmax_scale=scale,
        causal=True,
    )
    return mixed.view(batch, length, *mixed.shape[1:]).transpose(1, 2)

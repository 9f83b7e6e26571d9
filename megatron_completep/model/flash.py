"""flash-attn as attention backend: used where it is installed and asked for, never required."""

from __future__ import annotations

import importlib.util

from torch import Tensor

from megatron_completep.errors import ConfigError


def require_flash_attention() -> None:
    """ConfigError when `model.attention_backend: flash_attention` is asked for and the package is missing."""
    if importlib.util.find_spec("flash_attn") is None:
        raise ConfigError(
            "model.attention_backend = flash_attention, but the package flash-attn is not installed. Install it, or use sdpa."
        )


def flash_attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, document_starts: Tensor | None
) -> Tensor:
    """Causal attention; q [B, N, S, D], k, v [B, G, S, D] -> [B, N, S, D]. With `document_starts` every document is its own sequence."""
    from flash_attn import flash_attn_func, flash_attn_varlen_func

    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if document_starts is None:
        return flash_attn_func(q, k, v, softmax_scale=scale, causal=True).transpose(1, 2)
    batch, length = q.shape[:2]
    flat = (x.flatten(0, 1) for x in (q, k, v))
    mixed = flash_attn_varlen_func(
        *flat,
        cu_seqlens_q=document_starts,
        cu_seqlens_k=document_starts,
        max_seqlen_q=length,
        max_seqlen_k=length,
        softmax_scale=scale,
        causal=True,
    )
    return mixed.unflatten(0, (batch, length)).transpose(1, 2)

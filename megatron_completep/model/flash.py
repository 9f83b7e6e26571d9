"""FlashAttention's packages as attention backends: used where installed and asked for."""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor
from torch.nn.attention import activate_flash_attention_impl

from megatron_completep.errors import ConfigError

# Setting of model.attention_backend -> (the package, the module that it brings).
PACKAGES = {
    "flash_attention": ("flash-attn", "flash_attn"),
    "flash_attention_3": ("flash-attn-3", "flash_attn_interface"),
}


def prepare_backend(backend: str, device: torch.device) -> None:
    """Make ready what a setting of model.attention_backend needs, before the model is built.

    FlashAttention 3 takes the place of torch's own FlashAttention in this process.

    Raises ConfigError where the package is missing, or no GPU is there for FlashAttention 3.
    """
    if backend not in PACKAGES:
        return
    package, module = PACKAGES[backend]
    if importlib.util.find_spec(module) is None:
        raise ConfigError(
            f"model.attention_backend = {backend}, but the package {package} is not "
            "installed. Install it, or use auto."
        )
    if backend == "flash_attention_3":
        if device.type != "cuda":
            raise ConfigError(
                f"model.attention_backend = {backend} runs on GPUs only, but this run is on "
                f"{device.type}. Use auto."
            )
        activate_flash_attention_impl("FA3")


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

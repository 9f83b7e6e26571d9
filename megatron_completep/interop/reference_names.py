"""Our parameter names as the paper's authors' implementation has them: GPT-2's."""

from __future__ import annotations

NAMES = {  # ours -> GPT-2's
    "embedding": "transformer.wte",
    "positions": "transformer.wpe",
    "unembedding": "lm_head",
    "final_norm": "transformer.ln_f",
    "attention_norm": "ln_1",
    "mlp_norm": "ln_2",
    "attention.qkv": "attn.c_attn",
    "attention.output": "attn.c_proj",
    "mlp.up": "mlp.c_fc",
    "mlp.down": "mlp.c_proj",
}


def reference_name(name: str) -> str:
    """Our parameter name -> the reference's."""
    parts = name.split(".")
    prefix, inner = (
        (f"transformer.h.{parts[1]}.", ".".join(parts[2:-1]))
        if parts[0] == "layers"
        else ("", ".".join(parts[:-1]))
    )
    return f"{prefix}{NAMES[inner]}.{parts[-1]}"

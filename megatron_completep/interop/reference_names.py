"""Our parameter names as the implementation of the paper's authors has them: GPT-2's."""

from __future__ import annotations

NAMES = {  # our modules -> GPT-2's
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
    """The name that the reference implementation gives to our parameter `name`."""
    module, _, kind = name.rpartition(".")  # kind: weight or bias
    if not module.startswith("layers."):
        return f"{NAMES[module]}.{kind}"
    _, block, inner = module.split(".", 2)
    return f"transformer.h.{block}.{NAMES[inner]}.{kind}"

"""Does an exported folder compute what the checkpoint computes? transformers' own code is the judge."""

from __future__ import annotations

import gc
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_completep.errors import ConfigError
from megatron_completep.inference.generation import load_model

# float32: small models agree to 1e-5 and better; sharp attention and depth magnify rounding. 16 bits: the weights are rounded.
TOLERANCES = {"float32": 1e-4, "bfloat16": 5e-2, "float16": 1e-2}


@dataclass(frozen=True)
class Comparison:
    """Logits of the folder in transformers against ours, both computed in float32 on the same random tokens."""

    relative_difference: float  # largest difference / largest logit
    tolerance: float  # for the folder's type
    tokens: int

    @property
    def equal(self) -> bool:
        return self.relative_difference <= self.tolerance


def load_with_transformers(folder: str | Path) -> Any:
    """The folder's model in float32, by transformers' code alone. Raises ConfigError where transformers is not installed."""
    try:
        import transformers
    except ImportError:
        raise ConfigError(
            "transformers is not installed. pip install 'megatron-completep[hf]'."
        ) from None
    transformers.utils.logging.disable_progress_bar()
    return (
        transformers.AutoModelForCausalLM.from_pretrained(str(folder), attn_implementation="eager")
        .float()
        .eval()
    )


@torch.no_grad()
def check_export(
    checkpoint: str | Path,
    folder: str | Path,
    dtype: str,
    batch: int = 2,
    length: int = 64,
    seed: int = 0,
) -> Comparison:
    """Compare both models on random tokens; they are in memory one after the other."""
    config, ours = load_model(checkpoint, torch.device("cpu"), torch.float32)
    length = min(length, config.model.seq_length)
    tokens = torch.randint(
        config.model.vocab_size, (batch, length), generator=torch.Generator().manual_seed(seed)
    )
    expected = ours(tokens)
    del ours
    gc.collect()
    found = load_with_transformers(folder)(tokens).logits
    if found.shape != expected.shape:
        raise ConfigError(
            f"{folder}: logits of shape {list(found.shape)}, the checkpoint's model gives {list(expected.shape)}."
        )
    difference = ((found - expected).abs().max() / expected.abs().max()).item()
    return Comparison(difference, TOLERANCES[dtype], tokens.numel())

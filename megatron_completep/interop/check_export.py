"""Whether an exported folder computes what the checkpoint computes, by transformers' own code."""

from __future__ import annotations

import gc
import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_completep.errors import ConfigError
from megatron_completep.inference.generation import load_model

# float32: small models agree to 1e-5 and better, but sharp attention and depth magnify rounding.
# 16 bits: the weights of the folder are rounded, those of the checkpoint are not.
TOLERANCES = {"float32": 1e-4, "bfloat16": 5e-2, "float16": 1e-2}


@dataclass(frozen=True)
class Comparison:
    """Logits of the folder in transformers against ours, in float32 on the same random tokens."""

    relative_difference: float  # largest difference / largest logit
    tolerance: float  # for the folder's type
    tokens: int

    @property
    def equal(self) -> bool:
        """Whether the difference is within the tolerance."""
        return self.relative_difference <= self.tolerance


def load_with_transformers(folder: str | Path) -> Any:
    """The folder's model in float32, by transformers' code alone.

    Raises ConfigError where transformers is not installed.
    """
    try:
        transformers: Any = importlib.import_module("transformers")
    except ImportError:
        raise ConfigError(
            "transformers is not installed. pip install 'megatron-completep[hf]'."
        ) from None
    transformers.utils.logging.disable_progress_bar()
    model_class = transformers.AutoModelForCausalLM
    # Eager attention is the plainest of transformers' implementations.
    model = model_class.from_pretrained(str(folder), attn_implementation="eager")
    return model.float().eval()


@torch.no_grad()
def check_export(
    checkpoint: str | Path,
    folder: str | Path,
    dtype: str,
    batch: int = 2,
    length: int = 64,
    seed: int = 0,
) -> Comparison:
    """Compare logits of both models on random tokens [batch, length].

    Raises ConfigError where the logits have another shape or transformers is not installed.
    """
    config, our_model = load_model(checkpoint, torch.device("cpu"), torch.float32)
    length = min(length, config.model.seq_length)
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(config.model.vocab_size, (batch, length), generator=generator)
    expected = our_model(tokens)

    # Memory need only hold one of the two models.
    del our_model
    gc.collect()
    logits = load_with_transformers(folder)(tokens).logits
    if logits.shape != expected.shape:
        raise ConfigError(
            f"{folder}: logits of shape {list(logits.shape)}, the checkpoint's model gives "
            f"{list(expected.shape)}."
        )
    largest_difference = (logits - expected).abs().max()
    relative_difference = (largest_difference / expected.abs().max()).item()
    return Comparison(relative_difference, TOLERANCES[dtype], tokens.numel())

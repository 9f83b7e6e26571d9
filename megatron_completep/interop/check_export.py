"""Whether an exported folder computes what the checkpoint computes, by transformers' own code."""

from __future__ import annotations

import gc
import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_completep.data.tokenizer import build_tokenizer
from megatron_completep.errors import ConfigError
from megatron_completep.inference.generation import load_model, run_config, tokenizer_of_run
from megatron_completep.interop.probes import probe_texts

# float32: small models agree to 1e-5 and better, but sharp attention and depth magnify rounding.
# 16 bits: the weights of the folder are rounded, those of the checkpoint are not.
TOLERANCES = {"float32": 1e-4, "bfloat16": 5e-2, "float16": 1e-2}


@dataclass(frozen=True)
class Comparison:
    """Logits of the folder in transformers against ours, in float32 on the same random tokens."""

    relative_difference: float  # largest difference (see `check_export`) / largest logit
    tolerance: float  # for the folder's type
    tokens: int

    @property
    def equal(self) -> bool:
        """Whether the difference is within the tolerance."""
        return self.relative_difference <= self.tolerance


def _transformers() -> Any:
    """The package. Raises ConfigError where it is not installed."""
    try:
        return importlib.import_module("transformers")
    except ImportError:
        raise ConfigError(
            "transformers is not installed. pip install 'megatron-completep[hf]'."
        ) from None


def load_with_transformers(folder: str | Path) -> Any:
    """The folder's model in float32, by transformers' code alone.

    Raises ConfigError where transformers is not installed.
    """
    transformers = _transformers()
    transformers.utils.logging.disable_progress_bar()
    model_class = transformers.AutoModelForCausalLM
    # Eager attention is the plainest of transformers' implementations.
    model = model_class.from_pretrained(str(folder), attn_implementation="eager")
    return model.float().eval()


def check_tokenizer(
    checkpoint: str | Path, folder: str | Path, tokenizer_model: str | None = None
) -> int:
    """Compare ids of the folder's tokenizer in transformers with those of training; how many texts.

    tokenizer_model: of the export, where its user named one. Each text begins as in training. Names
    of special tokens are left out of the texts: a Hugging Face tokenizer's own configuration
    decides about them. Raises ConfigError for a text that differs, or where transformers is not
    installed.
    """
    config = run_config(checkpoint)
    tokenizer = build_tokenizer(tokenizer_of_run(checkpoint, config, tokenizer_model))
    theirs = _transformers().AutoTokenizer.from_pretrained(str(folder))
    special = set(theirs.all_special_tokens)
    compared = 0
    for text in probe_texts(tokenizer):
        if any(name in text for name in special):
            continue
        ids = theirs(text)["input_ids"]
        expected = [*tokenizer.beginning, *tokenizer.encode(text)]
        if ids != expected:
            raise ConfigError(
                f"{folder}: transformers encodes {text[:60]!r} as {ids[:12]}, in training it was "
                f"{expected[:12]}. Report this."
            )
        compared += 1
    return compared


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

    Where weights of experts are rounded to 16 bits, some tokens that stood between two experts go
    to the other one, and have other logits by right. There the difference is the median over the
    tokens of the largest of each; a multiplier that is left out changes every token.

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
    token_differences = (logits - expected).abs().amax(-1)
    some_go_elsewhere = config.model.moe is not None and dtype != "float32"
    difference = token_differences.median() if some_go_elsewhere else token_differences.max()
    relative_difference = (difference / expected.abs().max()).item()
    return Comparison(relative_difference, TOLERANCES[dtype], tokens.numel())

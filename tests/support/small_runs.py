"""Token files and configurations of models small enough to train many of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from megatron_completep.config import config_from_mapping
from megatron_completep.config.schema import Config
from megatron_completep.data.writer import IndexedWriter

VOCABULARY = 32

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "modern": {"norm": "rmsnorm", "activation": "swiglu", "position": "rope"},
    "paper": {"norm": "layernorm", "activation": "squared_relu", "position": "alibi", "bias": True},
    "gpt2": {
        "norm": "layernorm",
        "activation": "gelu",
        "position": "learned",
        "bias": True,
        "tied_embeddings": True,
    },
    "qk_norm": {
        "norm": "rmsnorm",
        "activation": "gelu",
        "position": "rope",
        "qk_norm": True,
        "num_query_groups": 1,
    },
}


def write_tokens(folder: Path, tokens: int = 40_000) -> None:
    """folder/text.{bin,idx}: documents of a Markov chain of second order, which takes a model a while to learn."""
    random = np.random.default_rng(0)
    likely = random.integers(0, VOCABULARY, size=(VOCABULARY, VOCABULARY, 3))
    choices, surprises = random.integers(0, 3, tokens), random.random(tokens) < 0.1
    text = random.integers(0, VOCABULARY, tokens)
    for i in range(2, tokens):
        if not surprises[i]:
            text[i] = likely[text[i - 2], text[i - 1], choices[i]]
    with IndexedWriter(folder / "text", np.uint16) as writer:
        for document in np.split(text, 20):
            writer.add_document([document])


def small_config(folder: Path, architecture: str = "modern", **sections: dict[str, Any]) -> Config:
    """A proxy of 2 layers x 32 on those tokens; sections replace single settings."""
    values: dict[str, dict[str, Any]] = {
        "model": {
            "hidden_size": 32,
            "num_layers": 2,
            "num_attention_heads": 2,
            "ffn_hidden_size": 128,
            "vocab_size": VOCABULARY,
            "vocab_multiple": 1,
            "seq_length": 32,
            **ARCHITECTURES[architecture],
        },
        "completep": {"base_hidden_size": 32, "base_num_layers": 2},
        "optimizer": {"base_lr": 2**-9, "schedule": "linear", "warmup_fraction": 0.1},
        "data": {"train": [{"prefix": str(folder / "text")}], "split": "80,20,0"},
        "training": {
            "micro_batch_size": 8,
            "global_batch_size": 8,
            "train_steps": 10,
            "precision": "float32",
            "device": "cpu",
            "output_dir": str(folder / "run"),
            "validation_samples": 16,
        },
    }
    for name, settings in sections.items():
        values[name] = {**values.get(name, {}), **settings}
    return config_from_mapping(values)

"""Configurations of small models and runs: one base, from which each test says what differs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_completep.config import Config, config_from_mapping

Sections = Mapping[str, Mapping[str, Any]]  # section -> setting -> value

# Options of `model` that make decoders which are no Llama.
GPT2: dict[str, Any] = {
    "norm": "layernorm",
    "activation": "gelu",
    "position": "learned",
    "bias": True,
}
TIED_GPT2: dict[str, Any] = {**GPT2, "tied_embeddings": True}
PAPER: dict[str, Any] = {
    "norm": "layernorm",
    "activation": "squared_relu",
    "position": "alibi",
    "bias": True,
}

# Two and four ranks divide the heads, the layers and the widths; the vocabulary needs padding.
SMALL_MODEL: dict[str, Any] = {
    "hidden_size": 32,
    "num_layers": 4,
    "num_attention_heads": 4,
    "ffn_hidden_size": 48,
    "vocab_size": 37,
    "vocab_multiple": 8,
    "seq_length": 12,
}
# As little as a model can be, for tests of programs that do not look at it.
SMALLEST: dict[str, dict[str, Any]] = {
    "model": {
        "hidden_size": 8,
        "num_layers": 1,
        "num_attention_heads": 1,
        "ffn_hidden_size": 8,
        "vocab_size": 512,
        "vocab_multiple": 128,
        "seq_length": 16,
    },
    "completep": {"base_hidden_size": 8, "base_num_layers": 1},
}
BASE: dict[str, dict[str, Any]] = {
    "model": SMALL_MODEL,
    "completep": {"base_hidden_size": 16, "base_num_layers": 2},  # m_N = 2, m_L = 2
    "optimizer": {"base_lr": 1e-2},
    "data": {"train": [{"prefix": "none"}]},
    "training": {
        "micro_batch_size": 2,
        "global_batch_size": 8,
        "train_steps": 10,
        "precision": "float32",
        "device": "cpu",
        "output_dir": "none",
    },
}


def merged(*layers: Sections) -> dict[str, dict[str, Any]]:
    """The sections of all layers; a later one replaces single settings of an earlier one."""
    values: dict[str, dict[str, Any]] = {}
    for layer in layers:
        for section, settings in layer.items():
            values[section] = {**values.get(section, {}), **settings}
    return values


def small_config(*overrides: str, **sections: Mapping[str, Any]) -> Config:
    """A run of a small model that reads no file.

    sections: settings that differ from `BASE`, by section. overrides: as on a command line,
    `section.key=value`. Raises ConfigError as the loading of a file would.
    """
    return config_from_mapping(merged(BASE, sections), overrides)

"""Complete runs small enough for a test: their configurations, and what they wrote."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_completep.config import Config
from megatron_completep.telemetry.metrics import read_metrics
from tests.support.configs import GPT2, PAPER, merged, small_config
from tests.support.corpora import write_ramps

VOCABULARY = 64
# What two equal runs do not share, beside every name that ends in _seconds.
TIMES = ("tokens_per_second", "memory_bytes", "mfu")

TINY_RUN: dict[str, dict[str, Any]] = {
    "model": {
        "hidden_size": 16,
        "num_layers": 2,
        "num_attention_heads": 2,
        "ffn_hidden_size": 32,
        "vocab_size": VOCABULARY,
        "seq_length": 16,
    },
    "completep": {"base_hidden_size": 8, "base_num_layers": 1},
    "optimizer": {"base_lr": 0.03, "warmup_fraction": 0.2},
    "training": {
        "micro_batch_size": 4,
        "global_batch_size": 8,
        "train_steps": 12,
        "precision": "float64",
        "cpu_threads": 1,
        "validation_interval": 6,
        "validation_samples": 10,
    },
    "checkpoint": {"interval": 6, "async_save": False},
    "logging": {"interval": 6, "tensorboard": False},
}

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "modern": {"norm": "rmsnorm", "activation": "swiglu", "position": "rope"},
    "paper": PAPER,
    "gpt2": {**GPT2, "tied_embeddings": True},
    "qk_norm": {"activation": "gelu", "qk_norm": True, "num_query_groups": 1},
}
# A proxy, with token files that `write_markov_chain(folder / "text")` writes.
PROXY: dict[str, dict[str, Any]] = {
    "model": {
        "hidden_size": 32,
        "num_layers": 2,
        "num_attention_heads": 2,
        "ffn_hidden_size": 128,
        "vocab_size": 32,
        "vocab_multiple": 1,
        "seq_length": 32,
    },
    "completep": {"base_hidden_size": 32, "base_num_layers": 2},
    "optimizer": {"base_lr": 2**-9, "schedule": "linear", "warmup_fraction": 0.1},
    "training": {"micro_batch_size": 8, "global_batch_size": 8, "validation_samples": 16},
}


def tiny_config(
    folder: Path, *overrides: str, output: str = "run", **sections: Mapping[str, Any]
) -> Config:
    """A run of 12 steps in float64 on one thread that learns.

    Its token files lie in `folder`, where they are written when missing.
    """
    for name, documents in (("train", 120), ("validation", 20)):
        if not (folder / f"{name}.idx").exists():
            write_ramps(folder / name, documents, seed=documents, vocabulary=VOCABULARY)
    files: dict[str, dict[str, Any]] = {
        "data": {
            "train": [{"prefix": str(folder / "train")}],
            "validation": [{"prefix": str(folder / "validation")}],
        },
        "training": {"output_dir": str(folder / output)},
    }
    return small_config(*overrides, **merged(TINY_RUN, files, sections))


def proxy_config(
    folder: Path, architecture: str = "modern", **sections: Mapping[str, Any]
) -> Config:
    """A proxy of 2 layers, 32 wide, over the token files folder/text,
    small enough to train many.
    """
    files: dict[str, dict[str, Any]] = {
        "model": ARCHITECTURES[architecture],
        "data": {"train": [{"prefix": str(folder / "text")}], "split": "80,20,0"},
        "training": {"output_dir": str(folder / "run")},
    }
    return small_config(**merged(PROXY, files, sections))


def rows_of(config: Config) -> list[dict[str, Any]]:
    """What a run wrote of every step, without times."""
    rows = []
    for row in read_metrics(Path(config.training.output_dir) / "metrics.jsonl"):
        names = [name for name in row if name not in TIMES and not name.endswith("_seconds")]
        rows.append({name: row[name] for name in names})
    return rows

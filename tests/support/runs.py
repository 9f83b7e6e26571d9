"""Complete runs small enough for a test: a configuration, token files to read, and what a run wrote."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

from megatron_completep.config import Config, config_from_mapping
from megatron_completep.data.writer import IndexedWriter
from megatron_completep.telemetry.metrics import read_metrics

VOCABULARY = 64
TIMES = (
    "tokens_per_second",
    "step_seconds",
    "data_wait_seconds",
    "memory_bytes",
    "mfu",
)  # what two equal runs do not share


def write_tokens(prefix: Path, documents: int, seed: int) -> None:
    """Documents that count up in steps of 1 to 3: easy to learn."""
    generator = np.random.default_rng(seed)
    with IndexedWriter(str(prefix), np.uint16) as writer:
        for _ in range(documents):
            ramp = np.arange(generator.integers(5, 60)) * generator.integers(1, 4)
            writer.add_document([(ramp + generator.integers(0, VOCABULARY)) % VOCABULARY])


def tiny_config(
    folder: Path, *overrides: str, output: str = "run", **sections: dict[str, Any]
) -> Config:
    """A run of 12 steps in float64 on one thread, over token files in `folder` that are written when missing."""
    for name, documents in (("train", 120), ("validation", 20)):
        if not (folder / f"{name}.idx").exists():
            write_tokens(folder / name, documents, seed=documents)
    values: dict[str, Any] = {
        "model": {
            "hidden_size": 16,
            "num_layers": 2,
            "num_attention_heads": 2,
            "ffn_hidden_size": 32,
            "vocab_size": VOCABULARY,
            "vocab_multiple": 8,
            "seq_length": 16,
        },
        "completep": {"base_hidden_size": 8, "base_num_layers": 1},
        "optimizer": {"base_lr": 0.03, "warmup_fraction": 0.2},
        "data": {
            "train": [{"prefix": str(folder / "train")}],
            "validation": [{"prefix": str(folder / "validation")}],
        },
        "training": {
            "micro_batch_size": 4,
            "global_batch_size": 8,
            "train_steps": 12,
            "precision": "float64",
            "device": "cpu",
            "cpu_threads": 1,
            "output_dir": str(folder / output),
            "validation_interval": 6,
            "validation_samples": 10,
        },
        "checkpoint": {"interval": 6, "async_save": False},
        "logging": {"interval": 6, "tensorboard": False},
    }
    for section, changes in sections.items():
        values[section] = {**values.get(section, {}), **changes}
    return config_from_mapping(values, overrides)


def rows_of(config: Config) -> list[dict[str, Any]]:
    """What a run wrote of every step, without times."""
    rows = read_metrics(Path(config.training.output_dir) / "metrics.jsonl")
    return [
        {
            name: value
            for name, value in row.items()
            if name not in TIMES and not name.endswith("_seconds")
        }
        for row in rows
    ]


def launched_as(rank: int, world_size: int) -> None:
    """Set what a launcher tells a process of a pool, which has joined its process group already: nothing listens at the address."""
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_RANK=str(rank),
        LOCAL_WORLD_SIZE=str(world_size),
    )
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="1")

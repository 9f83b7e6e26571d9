"""Checkpoints of small models with multipliers far from 1, and what the tests of export and import do with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from megatron_completep.config import Config
from megatron_completep.parallel.context import ParallelContext
from tests.support.checkpoints import TinyRun, tiny_config

LLAMA: dict[str, Any] = {"num_query_groups": 2}
TIED_LLAMA: dict[str, Any] = {
    "tied_embeddings": True,
    "bias": True,
    "head_dim": 6,
    "num_attention_heads": 8,
}
QWEN3: dict[str, Any] = {"qk_norm": True, "num_query_groups": 2, "head_dim": 12}
GPT2: dict[str, Any] = {
    "norm": "layernorm",
    "activation": "gelu",
    "position": "learned",
    "bias": True,
}
# Tunable factors far from 1, so that none hides behind the table's.
FACTORS = {
    "input_multiplier": 3.0,
    "logit_multiplier": 0.6,
    "residual_multiplier": 0.8,
    "attention_multiplier": 4.0,
}


def export_config(
    folder: Path | str, alpha: float = 1.0, factors: bool = True, **changes: Any
) -> Config:
    """m_N = 4, m_L = 3 and heads 3 times as large as the proxy's."""
    sections = {
        section: changes.pop(section)
        for section in ("data", "training", "parallel")
        if section in changes
    }
    model = {
        "hidden_size": 32,
        "num_layers": 3,
        "num_attention_heads": 4,
        "ffn_hidden_size": 40,
        "vocab_size": 93,
        "seq_length": 96,
        **(FACTORS if factors else {}),
        **changes,
    }
    completep = {"alpha": alpha, "base_hidden_size": 8, "base_num_layers": 1, "base_head_dim": 2}
    training = {
        "micro_batch_size": 2,
        "global_batch_size": 4,
        "train_steps": 10,
        "precision": "float32",
        "device": "cpu",
    }
    sections["training"] = {**training, "output_dir": str(folder), **sections.get("training", {})}
    return tiny_config(
        folder,
        model=model,
        completep=completep,
        optimizer={"base_lr": 1e-2, "base_init_std": 0.3},
        **sections,
    )


def save_checkpoint(config: Config, context: ParallelContext | None = None) -> str:
    """A checkpoint whose gains and biases are off 1 and 0, so that no term hides; returns the run's folder."""
    run = TinyRun(config, context)
    if context is None:
        generator = torch.Generator().manual_seed(1)
        run.optimizer.shards.master += 0.2 * torch.randn(
            run.optimizer.shards.master.shape, generator=generator
        )
    run.save()
    run.checkpointer.close()
    return config.training.output_dir


def checkpoint(folder: Path, alpha: float = 1.0, factors: bool = True, **changes: Any) -> str:
    return save_checkpoint(export_config(folder, alpha, factors, **changes))

"""Checkpoints of small models with multipliers far from 1, which tests export."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from megatron_completep.config import Config
from megatron_completep.parallel.context import ParallelContext
from tests.support.checkpoints import TinyRun, checkpointed_config
from tests.support.configs import merged

LLAMA: dict[str, Any] = {"num_query_groups": 2}
TIED_LLAMA: dict[str, Any] = {
    "tied_embeddings": True,
    "bias": True,
    "head_dim": 6,
    "num_attention_heads": 8,
}
QWEN3: dict[str, Any] = {"qk_norm": True, "num_query_groups": 2, "head_dim": 12}
EXPERTS: dict[str, Any] = {"num_experts": 4, "top_k": 2, "gate": "softmax", "balance": "none"}
SHARED_EXPERTS: dict[str, Any] = {
    **EXPERTS,
    "ffn_hidden_size": 24,
    "shared_ffn_hidden_size": 16,
    # Losses train and are no part of the function that is exported.
    "balance": "loss",
    "balance_loss": 0.01,
    "router_z_loss": 1e-3,
}
# Tunable factors far from 1, so that none hides behind the table's.
FACTORS = {
    "input_multiplier": 3.0,
    "logit_multiplier": 0.6,
    "residual_multiplier": 0.8,
    "attention_multiplier": 4.0,
}
EXPORTED: dict[str, dict[str, Any]] = {
    "model": {
        "hidden_size": 32,
        "num_layers": 3,
        "ffn_hidden_size": 40,
        "vocab_size": 93,
        "seq_length": 96,
    },
    "completep": {"base_hidden_size": 8, "base_num_layers": 1, "base_head_dim": 2},
    "optimizer": {"base_init_std": 0.3},
}


def export_config(
    folder: Path | str, alpha: float = 1.0, factors: bool = True, **changes: Any
) -> Config:
    """m_N = 4, m_L = 3 and heads 3 times as large as the proxy's.

    changes: settings of `model`, and whole sections of the names data, training and parallel.
    """
    sections: dict[str, dict[str, Any]] = {}
    for name in ("data", "training", "parallel"):
        if name in changes:
            sections[name] = changes.pop(name)
    own = {
        "model": {**(FACTORS if factors else {}), **changes},
        "completep": {"alpha": alpha},
    }
    return checkpointed_config(folder, **merged(EXPORTED, own, sections))


def save_checkpoint(config: Config, context: ParallelContext | None = None) -> str:
    """Save a checkpoint, of one process with noise on all masters; returns the run's folder.

    The noise moves gains and biases off 1 and 0, so that no term hides.
    """
    run = TinyRun(config, context)
    if context is None:
        masters = run.optimizer.shards.master
        generator = torch.Generator().manual_seed(1)
        masters += 0.2 * torch.randn(masters.shape, generator=generator)
    run.save()
    run.checkpointer.close()
    return config.training.output_dir


def checkpoint(folder: Path, alpha: float = 1.0, factors: bool = True, **changes: Any) -> str:
    """`save_checkpoint` of `export_config`."""
    return save_checkpoint(export_config(folder, alpha, factors, **changes))

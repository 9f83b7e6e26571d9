"""Small models, batches and optimizers that the tests of model, optim and analysis share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron_completep.completep import Table, table_of
from megatron_completep.config.bare import bare_config
from megatron_completep.config.schema import (
    CompletePConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
)
from megatron_completep.model.gpt import GPT
from megatron_completep.model.initialize import initialize
from megatron_completep.optim.optimizer import DistributedOptimizer, StepResult
from megatron_completep.parallel.context import ParallelContext
from megatron_completep.parallel.cross_entropy import IGNORED, LossConfig


def model_config(**changes: Any) -> ModelConfig:
    settings: dict[str, Any] = {
        "hidden_size": 32,
        "num_layers": 4,
        "num_attention_heads": 4,
        "ffn_hidden_size": 48,
        "vocab_size": 37,
        "vocab_multiple": 8,
        "seq_length": 12,
        "position": "rope",
    }
    return ModelConfig(**{**settings, **changes})


def completep_config(**changes: Any) -> CompletePConfig:
    return CompletePConfig(
        **{"base_hidden_size": 16, "base_num_layers": 2, "base_head_dim": 4, **changes}
    )


def optimizer_config(**changes: Any) -> OptimizerConfig:
    return OptimizerConfig(
        **{"base_lr": 1e-2, "base_init_std": 0.2, "schedule": "constant", **changes}
    )


def table_for(model: ModelConfig, completep: CompletePConfig) -> Table:
    """The table of a run of which the model and the proxy alone matter."""
    return table_of(bare_config(model, completep=completep))


def plain_table(**changes: Any) -> Table:
    """A table of given multipliers; the proxy's sizes, which modules ask for, are of no model."""
    return Table(**{"base_hidden_size": 1, "base_ffn_hidden_size": 1, **changes})


def build_model(
    model: ModelConfig,
    table: Table,
    dtype: torch.dtype = torch.float64,
    seed: int = 1,
    optimizer: OptimizerConfig | None = None,
    loss: LossConfig | None = None,
    recompute: str = "none",
    random_vectors: bool = True,
) -> GPT:
    """An initialized model; `random_vectors` moves gains and biases off 1 and 0, so that no term hides."""
    gpt = GPT(model, table, ParallelContext.single(), loss=loss, recompute=recompute)
    initialize(gpt, table, optimizer or optimizer_config(), seed)
    gpt.to(dtype)
    if random_vectors:
        generator = torch.Generator().manual_seed(seed)
        for parameter in gpt.parameters():
            if parameter.dim() == 1:
                parameter.data += 0.3 * torch.randn(
                    parameter.shape, generator=generator, dtype=torch.float64
                ).to(dtype)
    return gpt


def build_optimizer(
    gpt: torch.nn.Module,
    table: Table,
    optimizer: OptimizerConfig | None = None,
    precision: torch.dtype = torch.float64,
    parallel: ParallelConfig | None = None,
) -> DistributedOptimizer:
    return DistributedOptimizer(
        [gpt], table, optimizer or optimizer_config(), ParallelContext.single(), parallel, precision
    )


def batch_of(
    model: ModelConfig,
    seed: int = 0,
    batch: int = 3,
    seq_length: int | None = None,
    ignored: float = 0.2,
) -> tuple[Tensor, Tensor]:
    """Tokens and labels [B, S]; about `ignored` of the labels do not count."""
    generator = torch.Generator().manual_seed(seed)
    length = seq_length or model.seq_length
    tokens = torch.randint(model.vocab_size, (batch, length + 1), generator=generator)
    labels = tokens[:, 1:].clone()
    labels[torch.rand(labels.shape, generator=generator) < ignored] = IGNORED
    return tokens[:, :-1].contiguous(), labels


def train_step(
    gpt: GPT, optimizer: DistributedOptimizer, lr: float, *batches: tuple[Tensor, Tensor]
) -> StepResult:
    """One step over micro-batches of (tokens, labels)."""
    optimizer.begin_step(len(batches))
    loss_sum, counted = torch.zeros((), dtype=torch.float64), 0
    for tokens, labels in batches:
        optimizer.wait_for_parameters()
        loss = gpt(tokens, labels=labels)
        loss.backward()
        loss_sum += loss.detach()
        counted += int((labels != IGNORED).sum())
    return optimizer.step(lr, loss_sum, torch.tensor(counted))


def small_setup(
    model: dict[str, Any] | None = None,
    completep: dict[str, Any] | None = None,
    optimizer: dict[str, Any] | None = None,
    dtype: torch.dtype = torch.float64,
) -> tuple[GPT, DistributedOptimizer, Table]:
    """A model with its optimizer, ready to train."""
    shape, settings = model_config(**(model or {})), optimizer_config(**(optimizer or {}))
    table = table_for(shape, completep_config(**(completep or {})))
    gpt = build_model(
        shape, table, torch.float64 if dtype == torch.float64 else torch.float32, optimizer=settings
    )
    return gpt, build_optimizer(gpt, table, settings, dtype), table

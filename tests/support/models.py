"""Small models, batches and optimizers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from functools import partial
from typing import Any, TypeVar

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
from megatron_completep.optim.rule import Rule
from megatron_completep.parallel.context import ParallelContext
from megatron_completep.parallel.cross_entropy import IGNORED, LossConfig
from tests.support.configs import SMALL_MODEL

T = TypeVar("T")

IGNORED_SHARE = 0.2  # of the labels of a batch


def model_config(**changes: Any) -> ModelConfig:
    """4 layers, 32 wide; `changes` replace single fields."""
    return ModelConfig(**{**SMALL_MODEL, **changes})


def completep_config(**changes: Any) -> CompletePConfig:
    """Half the width and half the depth of `model_config`: m_N = 2, m_L = 2."""
    base = {"base_hidden_size": 16, "base_num_layers": 2, "base_head_dim": 4}
    return CompletePConfig(**{**base, **changes})


def optimizer_config(**changes: Any) -> OptimizerConfig:
    """A large learning rate and standard deviation that do not change."""
    settings = {"base_lr": 1e-2, "base_init_std": 0.2, "schedule": "constant"}
    return OptimizerConfig(**{**settings, **changes})


def table_for(
    model: ModelConfig,
    completep: CompletePConfig | None = None,
    optimizer: OptimizerConfig | None = None,
) -> Table:
    """The table of a run of which the model, the proxy and the optimizer alone matter."""
    if completep is None:
        completep = completep_config()
    sections = {} if optimizer is None else {"optimizer": optimizer}
    return table_of(bare_config(model, completep=completep, **sections))


def plain_table(**changes: Any) -> Table:
    """A table of given multipliers; the proxy's sizes, which modules ask for, are of no model."""
    return Table(**{"base_hidden_size": 1, "base_ffn_hidden_size": 1, **changes})


def table_with(table: Table, **properties: Any) -> Table:
    """The same table, of which these properties have other values."""
    members = {name: property(partial(_constant, value)) for name, value in properties.items()}
    return as_class(type("Changed", (type(table),), members), table)


def _constant(value: Any, _table: Table) -> Any:
    return value


def as_class(kind: type[Table], table: Table) -> Table:
    """A table's fields in a class derived from it."""
    return kind(**{field.name: getattr(table, field.name) for field in fields(table)})


def model_on_paper(model: ModelConfig, table: Table | None = None) -> GPT:
    """A model whose parameters have shapes and roles, but no memory."""
    if table is None:
        table = table_for(model)
    return GPT(model, table, ParallelContext.single("meta"))


def build_model(
    model: ModelConfig,
    table: Table | None = None,
    dtype: torch.dtype = torch.float64,
    seed: int = 1,
    optimizer: OptimizerConfig | None = None,
    loss: LossConfig | None = None,
    recompute: str = "none",
    random_vectors: bool = True,
) -> GPT:
    """An initialized model.

    table: that of `completep_config` where none is given. random_vectors: gains and biases are
    moved off 1 and 0, so that no term hides.
    """
    if table is None:
        table = table_for(model)
    gpt = GPT(model, table, ParallelContext.single(), loss=loss, recompute=recompute)
    initialize(gpt, table, optimizer or optimizer_config(), seed)
    gpt.to(dtype)
    if random_vectors:
        generator = torch.Generator().manual_seed(seed)
        for parameter in gpt.parameters():
            if parameter.dim() == 1:
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.data += 0.3 * noise.to(dtype)
    return gpt


def build_optimizer(
    model: torch.nn.Module,
    table: Table,
    optimizer: OptimizerConfig | None = None,
    precision: torch.dtype = torch.float64,
    parallel: ParallelConfig | None = None,
    rule: type[Rule] | None = None,
) -> DistributedOptimizer:
    """The optimizer of one process."""
    return DistributedOptimizer(
        [model],
        table,
        optimizer or optimizer_config(),
        ParallelContext.single(),
        parallel,
        precision,
        rule,
    )


def group_of(groups: Mapping[str, T], name: str) -> T:
    """The group of a parameter; of a fused one, that of its first part."""
    return next(g for n, g in groups.items() if n == name or n.startswith(f"{name}."))


def muon_config(**changes: Any) -> OptimizerConfig:
    """`optimizer_config` with Muon; `muon` replaces fields of its section."""
    muon = {"base_lr": 2e-2, **changes.pop("muon", {})}
    return optimizer_config(type="muon", muon=muon, **changes)


def small_setup(
    model: Mapping[str, Any] | None = None,
    completep: Mapping[str, Any] | None = None,
    optimizer: Mapping[str, Any] | None = None,
    dtype: torch.dtype = torch.float64,
) -> tuple[GPT, DistributedOptimizer, Table]:
    """A model with its optimizer, ready to train; mappings replace single settings."""
    shape = model_config(**(model or {}))
    settings = optimizer_config(**(optimizer or {}))
    table = table_for(shape, completep_config(**(completep or {})), settings)
    # bf16 runs keep their masters in float32, which the model starts from.
    start_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    gpt = build_model(shape, table, start_dtype, optimizer=settings)
    return gpt, build_optimizer(gpt, table, settings, dtype), table


def batch_of(
    model: ModelConfig,
    seed: int = 0,
    batch: int = 3,
    seq_length: int | None = None,
    ignored: float = IGNORED_SHARE,
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
    loss_sum = torch.zeros((), dtype=torch.float64)
    counted_tokens = 0
    for tokens, labels in batches:
        optimizer.wait_for_parameters()
        loss = gpt(tokens, labels=labels)
        loss.backward()
        loss_sum += loss.detach()
        counted_tokens += int((labels != IGNORED).sum())
    return optimizer.step(lr, loss_sum, torch.tensor(counted_tokens))

"""What trains, put together in the one right order.

That is the table, this rank's part of the model, the optimizer and the step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from megatron_completep.completep import Table, table_of
from megatron_completep.config.schema import Config
from megatron_completep.kernels import CompiledDefinitions
from megatron_completep.model.compile import compiled_definitions
from megatron_completep.model.flash import require_flash_attention
from megatron_completep.model.gpt import GPT
from megatron_completep.model.initialize import initialize
from megatron_completep.model.stages import build_chunks
from megatron_completep.optim.optimizer import DistributedOptimizer
from megatron_completep.parallel.context import ParallelContext
from megatron_completep.parallel.cross_entropy import LossConfig
from megatron_completep.parallel.products import choose_products
from megatron_completep.run.precision import choose_precision
from megatron_completep.run.step import TrainingStep


@dataclass(frozen=True)
class Assembly:
    """What trains, before the first step, with initial weights."""

    table: Table
    chunks: Sequence[GPT]  # this rank's part of the model
    optimizer: DistributedOptimizer
    step: TrainingStep
    precision: torch.dtype  # in which the model computes


def assemble(
    config: Config,
    context: ParallelContext,
    table: Table | None = None,
    chunks: Sequence[GPT] | None = None,
) -> Assembly:
    """Put together what a configuration trains, on this rank. Opens no file.

    table, chunks: used in place of those that follow from the configuration. Chunks that are given
        must have their initial weights.

    Communicates over the mesh. Raises ConfigError where a parameter declares no role, or where a
    package that the configuration asks for is not installed.
    """
    precision = choose_precision(config.training.precision, context.device)
    if table is None:
        table = table_of(config)
    if chunks is None:
        chunks = build_model(config, table, context, precision)
    optimizer = DistributedOptimizer(
        chunks, table, config.optimizer, context, config.parallel, precision
    )
    step = TrainingStep(config, context, chunks, optimizer)
    return Assembly(table, chunks, optimizer, step, precision)


def build_model(
    config: Config,
    table: Table,
    context: ParallelContext,
    precision: torch.dtype,
    compiled: CompiledDefinitions | None = None,
) -> list[GPT]:
    """This rank's chunks with their initial weights, in float32 (float64 for float64 runs).

    compiled: used in place of what training.compile asks for.
    """
    training = config.training
    loss = LossConfig.of(training)
    if config.model.attention_backend == "flash_attention":
        require_flash_attention()
    products = choose_products(training.weight_gradient, context.device, precision)
    if compiled is None:
        compiled = compiled_definitions(training.compile, context.device, precision)
    chunks = build_chunks(
        config.model, table, config.parallel, context, loss, training.recompute, products, compiled
    )
    for chunk in chunks:
        initialize(chunk, table, config.optimizer, training.seed)
        if precision == torch.float64:
            chunk.double()
    return chunks

"""What trains, put together in the one right order.

That is the table, this rank's part of the model, the optimizer and the step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from megatron_completep.completep import Table, table_of
from megatron_completep.config.schema import Config
from megatron_completep.errors import ConfigError
from megatron_completep.kernels import CompiledDefinitions
from megatron_completep.model.compile import compiled_definitions
from megatron_completep.model.flash import prepare_backend
from megatron_completep.model.gpt import GPT
from megatron_completep.model.initialize import initialize
from megatron_completep.model.stages import build_chunks
from megatron_completep.optim.float8_weights import WeightScales
from megatron_completep.optim.optimizer import DistributedOptimizer
from megatron_completep.optim.update_stream import CudaUpdateStream, UpdateStream
from megatron_completep.parallel.context import ParallelContext
from megatron_completep.parallel.cross_entropy import LossConfig
from megatron_completep.parallel.float8 import (
    Float8Products,
    float8_settings,
    require_float8,
    require_float8_weights,
)
from megatron_completep.parallel.onednn import read_processor
from megatron_completep.parallel.products import Products, choose_products
from megatron_completep.run.determinism import use_deterministic_algorithms
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
    products: str  # the library that computes its matrix products


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
    package or library that the configuration asks for is missing.
    """
    training = config.training
    if training.deterministic:
        use_deterministic_algorithms()
    precision = choose_precision(training.precision, context.device)
    if table is None:
        table = table_of(config)
    products = Products()  # what chunks have that were made elsewhere
    if chunks is None:
        products = _products_of(config, context, precision)
        chunks = build_model(config, table, context, precision, products)
        if isinstance(products, Float8Products):
            require_float8_weights(products, any(len(chunk.layers) for chunk in chunks))
    elif training.float8 != "none":
        raise ConfigError(
            f"training.float8 = {training.float8} does not reach a model that was made elsewhere. "
            "Use float8 = none."
        )
    optimizer = DistributedOptimizer(
        chunks,
        table,
        config.optimizer,
        context,
        config.parallel,
        precision,
        updates=_update_stream(training.overlap_update, context.device),
    )
    if isinstance(products, Float8Products):
        WeightScales(products, optimizer.shards)
    step = TrainingStep(config, context, chunks, optimizer)
    return Assembly(table, chunks, optimizer, step, precision, products.library)


def _products_of(config: Config, context: ParallelContext, precision: torch.dtype) -> Products:
    """The library that the configuration asks for, with float8 before it."""
    training = config.training
    products = choose_products(
        training.weight_gradient,
        training.matrix_products,
        context.device,
        precision,
        read_processor(),
    )
    if training.float8 == "none":
        return products
    require_float8(context.device)
    return Float8Products(products, float8_settings(training))


def _update_stream(overlap: bool, device: torch.device) -> UpdateStream | None:
    """A second stream for updates where the configuration asks for it and the device has streams.

    A start on a CPU says that the setting changes nothing (training/build.py).
    """
    return CudaUpdateStream(device) if overlap and device.type == "cuda" else None


def build_model(
    config: Config,
    table: Table,
    context: ParallelContext,
    precision: torch.dtype,
    products: Products,
    compiled: CompiledDefinitions | None = None,
) -> list[GPT]:
    """This rank's chunks with their initial weights, in float32 (float64 for float64 runs).

    compiled: used in place of what training.compile asks for.
    """
    training = config.training
    loss = LossConfig.of(training)
    prepare_backend(config.model.attention_backend, context.device)
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

"""What the layout tests compare: a small model trained in one process, and the same one spread over ranks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from megatron_completep.completep import Table
from megatron_completep.config.schema import (
    CompletePConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
)
from megatron_completep.instruments.replay import Replay, Trace, replay
from megatron_completep.model.initialize import initialize
from megatron_completep.model.stages import build_chunks
from megatron_completep.optim.groups import Group
from megatron_completep.optim.optimizer import DistributedOptimizer
from megatron_completep.parallel.context import ParallelContext, data_parallel_size_for
from megatron_completep.parallel.parameter import Spec
from megatron_completep.run.forward_backward import ForwardBackward, MicroBatch
from tests.support.models import table_for

GLOBAL_BATCH = 16  # sequences, split over data ranks and micro-batches
BASE = CompletePConfig(base_hidden_size=16, base_num_layers=2)


@dataclass(frozen=True)
class Case:
    """One training run: what the model is, how it is laid out, and how many micro-batches each data rank has in a step."""

    layout: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)
    optimizer: dict[str, Any] = field(default_factory=dict)
    micro_batches: int = 1
    steps: int = 1
    precision: str = "float32"
    recompute: str = "none"
    mutation: str = ""


@dataclass(frozen=True)
class Outcome:
    """What one rank saw. Tensors are its own part; `assemble` puts the parts of all ranks together."""

    where: tuple[int, int, int]  # rank on the tensor, data and pipeline axis
    losses: list[float]
    grad_norms: list[float]
    initial: dict[str, Tensor]
    gradients: dict[str, Tensor]  # this data rank's sums in the first step
    moved: dict[str, float]  # largest change of each tensor in the first step
    parameters: dict[str, Tensor]
    placements: dict[str, Spec]
    groups: dict[str, Group]
    runs: int  # weight-gradient contributions that were computed


def model_config(changes: dict[str, Any]) -> ModelConfig:
    settings: dict[str, Any] = {
        "hidden_size": 32,
        "num_layers": 4,
        "num_attention_heads": 4,
        "ffn_hidden_size": 64,
        "vocab_size": 61,
        "vocab_multiple": 4,
        "seq_length": 16,
    }
    return ModelConfig(**{**settings, **changes})


def optimizer_config(changes: dict[str, Any]) -> OptimizerConfig:
    settings: dict[str, Any] = {
        "base_lr": 1e-2,
        "base_eps": 1e-8,
        "base_init_std": 0.2,
        "schedule": "constant",
    }
    return OptimizerConfig(**{**settings, **changes})


def batch_of(step: int, model: ModelConfig) -> tuple[Tensor, Tensor]:
    """Tokens and labels [GLOBAL_BATCH, S]; some labels do not count, unevenly over the batch."""
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(
        model.vocab_size, (GLOBAL_BATCH, model.seq_length + 1), generator=generator
    )
    labels = tokens[:, 1:].clone()
    labels[torch.rand(labels.shape, generator=generator) < 0.2] = -100
    labels[0, : model.seq_length // 2] = -100
    return tokens[:, :-1].contiguous(), labels


def context_for(rank: int, layout: dict[str, Any]) -> tuple[ParallelContext, ParallelConfig]:
    world_size = layout.get("world_size", 1)
    parallel = ParallelConfig(
        **{key: value for key, value in layout.items() if key != "world_size"}
    )
    if world_size == 1:
        return ParallelContext.single(), parallel
    data_size = data_parallel_size_for(parallel, world_size)
    return ParallelContext.over_world(
        parallel, torch.device("cpu"), rank, world_size, data_size
    ), parallel


def train(rank: int, case: Case) -> Outcome:
    """Train as `case` says, in the process group at hand, or in this process alone when the layout is empty."""
    context, parallel = context_for(rank, case.layout)
    model, settings = model_config(case.model), optimizer_config(case.optimizer)
    table = table_for(model, BASE)
    dtype = torch.float64 if case.precision == "float64" else torch.float32
    chunks = build_chunks(
        model, mutated_table(table, case), parallel, context, recompute=case.recompute
    )
    for chunk in chunks:
        initialize(chunk, table, settings, seed=7)
        chunk.to(dtype)
    optimizer = DistributedOptimizer(chunks, table, settings, context, parallel, dtype)
    MUTATIONS.get(case.mutation, lambda _: None)(optimizer)
    run = ForwardBackward(
        chunks, model, parallel, context, GLOBAL_BATCH // context.data.size // case.micro_batches
    )
    initial = copies(optimizer)
    losses, norms, gradients, moved, runs = [], [], {}, {}, 0
    for step in range(case.steps):
        tokens, labels = (
            x.chunk(context.data.size)[context.data.rank] for x in batch_of(step, model)
        )
        parts = zip(tokens.chunk(case.micro_batches), labels.chunk(case.micro_batches), strict=True)
        optimizer.begin_step(case.micro_batches)
        total = run([MicroBatch(t, y) for t, y in parts])
        if step == 0:
            gradients = {
                name: p.main_grad.clone() for name, p in optimizer.shards.parameters.items()
            }
            runs = sum(queue.runs for queue in optimizer.shards.queues)
        counted = (labels != -100).sum() * (context.pipeline.rank == 0)
        result = optimizer.step(settings.base_lr, total, counted)
        losses.append(result.loss.item())
        norms.append(result.grad_norm.item())
        if step == 0:
            optimizer.wait_for_parameters()
            moved = {
                name: (value - initial[name]).abs().max().item()
                for name, value in copies(optimizer).items()
            }
    optimizer.wait_for_parameters()
    where = context.tensor.rank, context.data.rank, context.pipeline.rank
    placements = optimizer.shards.specs
    return Outcome(
        where,
        losses,
        norms,
        initial,
        gradients,
        moved,
        copies(optimizer),
        placements,
        optimizer.groups,
        runs,
    )


def copies(optimizer: DistributedOptimizer) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in optimizer.shards.parameters.items()}


def replay_trace(rank: int, stem: str, precision: str, layout: dict[str, Any]) -> Replay:
    context, parallel = context_for(rank, layout)
    return replay(Trace.load(stem), precision, context, parallel)


# --- mistakes that the tests must catch ---------------------------------------------------------------------------------------


def _forget_partial_sums(optimizer: DistributedOptimizer) -> None:
    optimizer.shards.partial_segments = []


def _count_replicated_twice(optimizer: DistributedOptimizer) -> None:
    optimizer.shards.counted_table = optimizer.shards.segment_table


MUTATIONS: dict[str, Callable[[DistributedOptimizer], None]] = {
    "forget the tensor-parallel sum of norm gradients": _forget_partial_sums,
    "count replicated parameters on every rank": _count_replicated_twice,
}


def mutated_table(table: Table, case: Case) -> Table:
    if case.mutation != "take m_L from the stage":
        return table
    stages = case.layout.get("pipeline_parallel_size", 1)
    return Table(**{**vars(table), "depth_multiplier": table.depth_multiplier / stages})


# --- putting the ranks together -----------------------------------------------------------------------------------------------


def assemble(outcomes: list[Outcome], what: str, name: str) -> Tensor:
    """The logical tensor `what` (initial, gradients or parameters) of a name; gradients are summed as the optimizer sums them."""
    holders = [o for o in outcomes if name in getattr(o, what)]
    by_tensor: dict[int, list[Outcome]] = {}
    for outcome in holders:
        by_tensor.setdefault(outcome.where[0], []).append(outcome)
    summed = what == "gradients"
    local = {
        t: (
            torch.stack([getattr(o, what)[name] for o in os]).sum(0)
            if summed
            else getattr(os[0], what)[name]
        )
        for t, os in by_tensor.items()
    }
    placement = holders[0].placements[name]
    if placement.replicated:
        return (
            torch.stack(list(local.values())).sum(0)
            if summed and placement.partial_gradient
            else local[0]
        )
    whole = torch.zeros(placement.shape, dtype=local[0].dtype)
    ((dim, _),) = placement.split.items()
    for tensor_rank, part in local.items():
        position = 0
        for start, stop in by_tensor[tensor_rank][0].placements[name].local_ranges(dim):
            held = max(0, min(stop, whole.shape[dim]) - start)
            if held:
                whole.narrow(dim, start, held).copy_(part.narrow(dim, position, held))
            position += stop - start
    return whole


def relative_error(outcomes: list[Outcome], truth: Outcome, what: str) -> dict[str, float]:
    """||layout - truth|| / ||truth|| of every logical parameter."""
    errors = {}
    for name in truth.parameters:
        expected = assemble([truth], what, name).double()
        found = assemble(outcomes, what, name).double()
        if what == "gradients" and tied_elsewhere(outcomes, name):
            found = found + assemble(outcomes, what, "unembedding.weight").double()
        errors[name] = ((found - expected).norm() / expected.norm().clamp_min(1e-30)).item()
    return errors


def tied_elsewhere(outcomes: list[Outcome], name: str) -> bool:
    return any(p.tied_to == name and n != name for o in outcomes for n, p in o.placements.items())

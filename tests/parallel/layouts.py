"""A small model trained in one process, and the same one spread over ranks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from megatron_completep.completep import Table, table_of
from megatron_completep.config import Config
from megatron_completep.config.derived import micro_batches_per_step
from megatron_completep.config.schema import ModelConfig, ParallelConfig
from megatron_completep.instruments.replay import Replay, Trace, replay
from megatron_completep.optim.groups import Group
from megatron_completep.optim.optimizer import DistributedOptimizer
from megatron_completep.parallel.context import ParallelContext
from megatron_completep.parallel.cross_entropy import IGNORED
from megatron_completep.parallel.gradients import main_grad_of
from megatron_completep.parallel.parameter import Spec
from megatron_completep.run.assemble import Assembly, assemble
from megatron_completep.run.forward_backward import MicroBatch
from tests.support.configs import small_config
from tests.support.ranks import context_on

GLOBAL_BATCH = 16  # sequences, split over data ranks and micro-batches
# Four tensor ranks hold unequal numbers of real columns of the vocabulary.
SPREAD_MODEL = {
    "ffn_hidden_size": 64,
    "vocab_size": 61,
    "vocab_multiple": 4,
    "seq_length": 16,
}


@dataclass(frozen=True)
class Case:
    """One training run.

    layout: settings of `parallel`, and world_size where it is not 1. micro_batches: of each data
    rank in a step. mutation: a mistake of `MUTATIONS`, or one of the table.
    """

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
    """What one rank saw; tensors are this rank's, and `joined` puts those of all ranks together."""

    position: tuple[int, int, int]  # rank on the tensor, data and pipeline axis
    losses: list[float]
    grad_norms: list[float]
    initial: dict[str, Tensor]
    gradients: dict[str, Tensor]  # this data rank's sums in the first step
    moved: dict[str, float]  # largest change of each tensor in the first step
    parameters: dict[str, Tensor]
    specs: dict[str, Spec]
    groups: dict[str, Group]
    runs: int  # weight-gradient contributions that were computed


def config_of(case: Case) -> Config:
    """The configuration of a case."""
    parallel = {name: value for name, value in case.layout.items() if name != "world_size"}
    sizes = ParallelConfig(**parallel)
    model_ranks = sizes.tensor_parallel_size * sizes.pipeline_parallel_size
    data_ranks = case.layout.get("world_size", 1) // model_ranks
    return small_config(
        model={**SPREAD_MODEL, **case.model},
        optimizer={
            "base_eps": 1e-8,
            "base_init_std": 0.2,
            "schedule": "constant",
            **case.optimizer,
        },
        parallel=parallel,
        training={
            "micro_batch_size": GLOBAL_BATCH // data_ranks // case.micro_batches,
            "global_batch_size": GLOBAL_BATCH,
            "precision": case.precision,
            "recompute": case.recompute,
            "seed": 7,
        },
    )


def assembled(rank: int, case: Case) -> tuple[Config, ParallelContext, Assembly]:
    """A case in the process group at hand, or in this process alone without a group."""
    config = config_of(case)
    context = context_on(rank, config.parallel)
    table = mutated_table(table_of(config), case)
    return config, context, assemble(config, context, table)


def batch_of(step: int, model: ModelConfig) -> tuple[Tensor, Tensor]:
    """Tokens and labels [GLOBAL_BATCH, S]; labels that do not count lie unevenly in the batch."""
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(
        model.vocab_size, (GLOBAL_BATCH, model.seq_length + 1), generator=generator
    )
    labels = tokens[:, 1:].clone()
    labels[torch.rand(labels.shape, generator=generator) < 0.2] = IGNORED
    labels[0, : model.seq_length // 2] = IGNORED
    return tokens[:, :-1].contiguous(), labels


def micro_batches_of(step: int, config: Config, context: ParallelContext) -> list[MicroBatch]:
    """This data rank's share of the batch of a step."""
    batch = batch_of(step, config.model)
    tokens, labels = (tensor.chunk(context.data.size)[context.data.rank] for tensor in batch)
    count = micro_batches_per_step(config, context.world_size)
    pairs = zip(tokens.chunk(count), labels.chunk(count), strict=True)
    return [MicroBatch(*pair) for pair in pairs]


def counted_tokens(batches: list[MicroBatch], context: ParallelContext) -> Tensor:
    """How many labels count; only the first pipeline rank adds them."""
    labels = torch.cat([batch.labels for batch in batches])
    return (labels != IGNORED).sum() * (context.pipeline.rank == 0)


def train(rank: int, case: Case) -> Outcome:
    """Train as `case` says."""
    config, context, assembly = assembled(rank, case)
    optimizer = assembly.optimizer
    if case.mutation in MUTATIONS:
        MUTATIONS[case.mutation](optimizer)
    initial = copies(optimizer)
    losses: list[float] = []
    norms: list[float] = []
    gradients: dict[str, Tensor] = {}
    moved: dict[str, float] = {}
    runs = 0
    for step in range(case.steps):
        batches = micro_batches_of(step, config, context)
        optimizer.begin_step(len(batches))
        loss_sum = assembly.step.forward_backward(batches)
        if step == 0:
            for name, parameter in optimizer.shards.parameters.items():
                gradients[name] = main_grad_of(parameter).clone()
            runs = sum(queue.runs for queue in optimizer.shards.queues)
        result = optimizer.step(
            config.optimizer.base_lr, loss_sum, counted_tokens(batches, context)
        )
        losses.append(result.loss.item())
        norms.append(result.grad_norm.item())
        if step == 0:
            optimizer.wait_for_parameters()
            for name, tensor in copies(optimizer).items():
                moved[name] = (tensor - initial[name]).abs().max().item()
    optimizer.wait_for_parameters()
    return Outcome(
        (context.tensor.rank, context.data.rank, context.pipeline.rank),
        losses,
        norms,
        initial,
        gradients,
        moved,
        copies(optimizer),
        optimizer.shards.specs,
        optimizer.groups,
        runs,
    )


def copies(optimizer: DistributedOptimizer) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in optimizer.shards.parameters.items()}


def replay_trace(rank: int, stem: str, precision: str, layout: dict[str, Any]) -> Replay:
    """Replay a golden trace in a layout."""
    parallel = config_of(Case(layout)).parallel
    return replay(Trace.load(stem), precision, context_on(rank, parallel), parallel)


# Mistakes that the tests must catch.


def _forget_partial_sums(optimizer: DistributedOptimizer) -> None:
    optimizer.shards.partial_segments = []


def _count_replicated_twice(optimizer: DistributedOptimizer) -> None:
    optimizer.shards.grad_norm_table = optimizer.shards._table(optimizer.shards.segments)


MUTATIONS: dict[str, Callable[[DistributedOptimizer], None]] = {
    "forget the tensor-parallel sum of norm gradients": _forget_partial_sums,
    "count replicated parameters on every rank": _count_replicated_twice,
}


def mutated_table(table: Table, case: Case) -> Table:
    if case.mutation != "take m_L from the stage":
        return table
    stages = case.layout.get("pipeline_parallel_size", 1)
    return Table(**{**vars(table), "depth_multiplier": table.depth_multiplier / stages})


# Putting the ranks together.


def joined(outcomes: list[Outcome], field_name: str, name: str) -> Tensor:
    """The logical tensor of a parameter: initial, gradients or parameters.

    Gradients are summed as the optimizer sums them: over data ranks, and over tensor ranks where
    the parameter is replicated and its gradient is not.
    """
    by_tensor_rank: dict[int, list[Outcome]] = {}
    for outcome in outcomes:
        if name in getattr(outcome, field_name):
            # Of what is split: the rank along the axis that splits it, be it tensor or expert.
            shares = list(outcome.specs[name].split.values())
            holder = shares[0].rank if shares else outcome.position[0]
            by_tensor_rank.setdefault(holder, []).append(outcome)
    is_summed = field_name == "gradients"
    local: dict[int, Tensor] = {}
    for tensor_rank, holders in by_tensor_rank.items():
        tensors = [getattr(holder, field_name)[name] for holder in holders]
        local[tensor_rank] = torch.stack(tensors).sum(0) if is_summed else tensors[0]
    spec = by_tensor_rank[0][0].specs[name]
    if spec.replicated:
        if is_summed and spec.partial_gradient:
            return torch.stack(list(local.values())).sum(0)
        return local[0]
    logical = torch.zeros(spec.shape, dtype=local[0].dtype)
    ((dim, _),) = spec.split.items()
    for tensor_rank, tensor in local.items():
        position = 0
        for start, stop in by_tensor_rank[tensor_rank][0].specs[name].local_ranges(dim):
            # Padding of the vocabulary lies behind the logical tensor.
            real = max(0, min(stop, logical.shape[dim]) - start)
            if real:
                logical.narrow(dim, start, real).copy_(tensor.narrow(dim, position, real))
            position += stop - start
    return logical


def relative_error(outcomes: list[Outcome], truth: Outcome, field_name: str) -> dict[str, float]:
    """||layout - truth|| / ||truth|| of every logical parameter."""
    errors = {}
    for name in truth.parameters:
        expected = joined([truth], field_name, name).double()
        tensor = joined(outcomes, field_name, name).double()
        if field_name == "gradients" and tied_elsewhere(outcomes, name):
            tensor = tensor + joined(outcomes, field_name, "unembedding.weight").double()
        errors[name] = ((tensor - expected).norm() / expected.norm().clamp_min(1e-30)).item()
    return errors


def tied_elsewhere(outcomes: list[Outcome], name: str) -> bool:
    """Whether another parameter of some rank is tied to this one."""
    for outcome in outcomes:
        for other_name, spec in outcome.specs.items():
            if spec.tied_to == name and other_name != name:
                return True
    return False

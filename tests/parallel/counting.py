"""Workers that count what a step communicates and how much memory it needs at most."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_completep.benchmarks.training_benchmark import BenchmarkSettings, random_batch
from megatron_completep.completep import table_of
from megatron_completep.config.derived import micro_batches_per_step
from megatron_completep.config.schema import Config
from megatron_completep.data.loader import Batch
from megatron_completep.kernels import CompiledDefinitions
from megatron_completep.model.routing import fixing
from megatron_completep.parallel.context import ParallelContext
from megatron_completep.parallel.products import Products
from megatron_completep.planning.communication import (
    ALL_GATHER,
    ALL_REDUCE,
    ALL_TO_ALL,
    REDUCE_SCATTER,
    SEND,
    collectives_per_step,
)
from megatron_completep.planning.sizes import micro_batch_sizes
from megatron_completep.run.assemble import assemble, build_model
from megatron_completep.run.step import TrainingStep
from tests.parallel.layouts import SPREAD_MODEL
from tests.support.configs import Sections, merged, small_config
from tests.support.ranks import context_on

# (process group, operation, bytes of the whole tensor) -> calls
Calls = Counter[tuple[str, str, int]]

# What torch.distributed dispatches to -> the operation, and which argument holds the whole tensor.
OPERATIONS = {
    "allreduce_": (ALL_REDUCE, 0),
    "_allgather_base_": (ALL_GATHER, 0),
    "_reduce_scatter_base_": (REDUCE_SCATTER, 1),
    "send": (SEND, 0),
    "alltoall_base_": (ALL_TO_ALL, 1),
}
RECEIVES = {"recv_"}  # the other end of a send
AXES = ("tensor", "context", "shard", "replica", "pipeline", "world")


class CountCollectives(TorchDispatchMode):
    """Sees every collective of this process, whoever calls it;
    one that it does not know is an error.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: Calls = Counter()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function.namespace == "c10d":
            self._count(function._schema.name.removeprefix("c10d::"), args)
        return function(*args, **(kwargs or {}))

    def _count(self, name: str, args: Any) -> None:
        if name in RECEIVES:
            return
        operation, position = OPERATIONS[name]
        tensors = args[position] if isinstance(args[position], list | tuple) else [args[position]]
        group = next(
            dist.ProcessGroup.unbox(a)
            for a in args
            if isinstance(a, torch.ScriptObject) and "ProcessGroup" in str(a._type())
        )
        self.calls[
            group.group_name, operation, sum(t.numel() * t.element_size() for t in tensors)
        ] += 1


def run_config(sections: Sections) -> Config:
    """A small run of several buckets; `sections` replace single settings."""
    base = {
        "model": SPREAD_MODEL,
        "parallel": {"bucket_megabytes": 0.03},
        "optimizer": {"schedule": "constant"},
    }
    return small_config(**merged(base, sections))


def build_step(
    rank: int, config: Config, compiled: CompiledDefinitions | None = None
) -> tuple[TrainingStep, list[Batch], ParallelContext]:
    """The training step of `pretrain` in the process group at hand, and this rank's batches.

    compiled: in place of what training.compile asks for.
    """
    context = context_on(rank, config.parallel)
    table = table_of(config)
    chunks = None
    if compiled:
        chunks = build_model(config, table, context, torch.float32, Products(), compiled)
    step = assemble(config, context, table, chunks).step
    batch = random_batch(BenchmarkSettings(config.model, config.training.micro_batch_size))
    return step, [batch] * micro_batches_per_step(config, context.world_size), context


def planned_and_counted(
    rank: int, sections: dict[str, dict[str, Any]], forgotten: str = ""
) -> tuple[dict[Any, int], dict[Any, int]]:
    """What the plan says of this rank's second step, and what happened.

    `forgotten`: calls that the plan leaves out, for controls.
    """
    config = run_config(sections)
    step, batches, context = build_step(rank, config)
    with equal_loads(step):
        step.run(batches, 1)
        step.optimizer.wait_for_parameters()
        with CountCollectives() as counted:
            step.run(batches, 2)
    step.optimizer.wait_for_parameters()
    axes = {name: getattr(context, name) for name in AXES}
    if config.model.moe is not None:
        axes |= {"expert": context.expert, "expert_data": context.expert_data}
    if config.optimizer.type == "muon" or config.training.float8 != "none":
        axes["stage"] = context.stage
    planned: Calls = Counter()
    for c in collectives_per_step(
        config,
        context.world_size,
        context.pipeline.rank,
        context.shard.rank,
        context.tensor.rank,
    ):
        if c.purpose != forgotten:
            group = axes[c.axis].group
            assert group is not None, c
            planned[group.group_name, c.operation, c.payload] += c.count
    return named(planned, axes), named(counted.calls, axes)


@contextmanager
def equal_loads(step: TrainingStep) -> Iterator[None]:
    """Deal the tokens out to the experts in turn, as the plan takes them to be."""
    model = step.config.model
    with ExitStack() as fixed:
        if model.moe is not None:
            (chunk,) = step.chunks
            tokens = micro_batch_sizes(step.config).local_tokens
            slots = torch.arange(tokens * model.moe.top_k) % model.moe.num_experts
            experts = slots.view(tokens, -1).sort().values
            fixed.enter_context(fixing(chunk, dict.fromkeys(range(model.num_layers), experts)))
        yield


def named(calls: Calls, axes: dict[str, Any]) -> dict[Any, int]:
    """Axes instead of process groups; axes that are one group share a name."""
    groups: dict[str, list[str]] = {}
    for name, axis in axes.items():
        if axis.group is not None:
            groups.setdefault(axis.group.group_name, []).append(name)
    return {
        ("/".join(groups[group]), operation, size): count
        for (group, operation, size), count in calls.items()
    }

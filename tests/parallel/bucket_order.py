"""Workers for the tests of the order in which gradients are reduced."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

from torch import nn

from megatron_completep.optim import reduction as reduction_module
from megatron_completep.optim.shards import Shards
from megatron_completep.parallel.collectives import (
    Pending,
    start_all_reduce,
    start_reduce_scatter,
)
from tests.parallel.layouts import Case, assembled, counted_tokens, micro_batches_of

MICRO_BATCHES = 4


@dataclass
class Seen:
    """What one rank reduced in one step."""

    buckets: int
    # (buckets that are complete, buckets whose reduction has started) after every parameter whose
    # last gradient arrived during backward
    counts: list[tuple[int, int]] = field(default_factory=list)
    started: list[int] = field(default_factory=list)  # in order, when backward had ended
    started_in_step: list[int] = field(default_factory=list)  # in order, when the step had ended


def watch(shards: Shards) -> list[tuple[int, int]]:
    """The list that `Seen.counts` is made from; it grows with every parameter."""
    missing = Counter(shards._bucket_of.values())
    counts: list[tuple[int, int]] = []

    def watched(original: Any) -> Any:
        def on_complete(parameter: nn.Parameter) -> None:
            original(parameter)
            missing[shards._bucket_of[parameter]] -= 1
            complete = sum(count == 0 for count in missing.values())
            counts.append((complete, len(shards.started)))

        return on_complete

    for queue in shards.queues:
        queue.on_complete = watched(queue.on_complete)
    return counts


def reductions(
    rank: int, layout: dict[str, Any], model_changes: dict[str, Any], frozen: str = ""
) -> Seen:
    """One step of a small model; what contains `frozen` in its name is not trained."""
    case = Case(layout, model_changes, micro_batches=MICRO_BATCHES)
    config, context, assembly = assembled(rank, case)
    optimizer = assembly.optimizer
    for name, parameter in optimizer.shards.parameters.items():
        parameter.requires_grad_(not frozen or frozen not in name)
    batches = micro_batches_of(0, config, context)
    seen = Seen(len(optimizer.shards.layout.buckets))
    counts = watch(optimizer.shards)
    optimizer.begin_step(MICRO_BATCHES)
    loss_sum = assembly.step.forward_backward(batches)
    seen.counts = list(counts)
    seen.started = list(optimizer.shards.started)
    optimizer.step(config.optimizer.base_lr, loss_sum, counted_tokens(batches, context))
    seen.started_in_step = list(optimizer.shards.started)
    optimizer.wait_for_parameters()
    return seen


def most_under_way(rank: int, shards: int, overlapped: int) -> tuple[int, int]:
    """The most collectives of gradients that nobody had waited for at once, and the buckets.

    Each holds a copy of its bucket in the type that is sent: NCCL lets go of it at the wait.
    """
    layout = {
        "world_size": 2,
        "bucket_megabytes": 0.005,
        "gradient_dtype": "bf16",
        "optimizer_shard_size": shards,
    }
    case = Case(layout, {"num_layers": 8}, micro_batches=MICRO_BATCHES)
    config, context, assembly = assembled(rank, case)
    started: list[Pending] = []
    most = 0

    def watched(start: Callable[..., Pending]) -> Callable[..., Pending]:
        def call(*arguments: Any) -> Pending:
            nonlocal most
            started.append(start(*arguments))
            most = max(most, sum(pending.work is not None for pending in started))
            return started[-1]

        return call

    with (
        mock.patch.object(reduction_module, "start_reduce_scatter", watched(start_reduce_scatter)),
        mock.patch.object(reduction_module, "start_all_reduce", watched(start_all_reduce)),
        mock.patch.object(reduction_module, "OVERLAPPED", overlapped),
    ):
        batches = micro_batches_of(0, config, context)
        assembly.optimizer.begin_step(MICRO_BATCHES)
        loss_sum = assembly.step.forward_backward(batches)
        tokens = counted_tokens(batches, context)
        assembly.optimizer.step(config.optimizer.base_lr, loss_sum, tokens)
    assembly.optimizer.wait_for_parameters()
    return most, len(assembly.optimizer.shards.layout.buckets)

"""Workers for the tests of the order in which gradients are reduced."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from megatron_completep.optim import shards as shards_module
from megatron_completep.optim.shards import Shards
from megatron_completep.parallel.axis import Axis
from megatron_completep.parallel.collectives import Pending, start_reduce_scatter
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
    loss_sum = assembly.step.passes(batches)
    seen.counts = list(counts)
    seen.started = list(optimizer.shards.started)
    optimizer.step(config.optimizer.base_lr, loss_sum, counted_tokens(batches, context))
    seen.started_in_step = list(optimizer.shards.started)
    optimizer.wait_for_parameters()
    return seen


def copies_alive(rank: int, overlapped: int) -> tuple[int, int]:
    """The most copies of buckets in the type that is sent that lived at once, and the buckets."""
    layout = {"world_size": 2, "bucket_megabytes": 0.005, "gradient_dtype": "bf16"}
    case = Case(layout, {"num_layers": 8}, micro_batches=MICRO_BATCHES)
    config, context, assembly = assembled(rank, case)
    copies: list[StorageWeakRef] = []
    most = 0

    def watched(gradients: Tensor, axis: Axis, *out: Tensor) -> Pending:
        nonlocal most
        copies.append(StorageWeakRef(gradients.untyped_storage()))
        most = max(most, sum(not copy.expired() for copy in copies))
        return start_reduce_scatter(gradients, axis, *out)

    with (
        mock.patch.object(shards_module, "start_reduce_scatter", watched),
        mock.patch.object(shards_module, "OVERLAPPED", overlapped),
    ):
        batches = micro_batches_of(0, config, context)
        assembly.optimizer.begin_step(MICRO_BATCHES)
        loss_sum = assembly.step.passes(batches)
        tokens = counted_tokens(batches, context)
        assembly.optimizer.step(config.optimizer.base_lr, loss_sum, tokens)
    assembly.optimizer.wait_for_parameters()
    return most, len(assembly.optimizer.shards.layout.buckets)

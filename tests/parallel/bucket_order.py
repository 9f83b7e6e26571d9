"""Workers for the tests of the order in which gradients are reduced."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from megatron_completep.model.initialize import initialize
from megatron_completep.model.stages import build_chunks
from megatron_completep.optim.optimizer import DistributedOptimizer
from megatron_completep.optim.shards import Shards
from megatron_completep.run.forward_backward import ForwardBackward, MicroBatch
from tests.parallel.layouts import (
    BASE,
    GLOBAL_BATCH,
    batch_of,
    context_for,
    model_config,
    optimizer_config,
)
from tests.support.models import table_for

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
    context, parallel = context_for(rank, layout)
    model, settings = model_config(model_changes), optimizer_config({})
    table = table_for(model, BASE)
    chunks = build_chunks(model, table, parallel, context)
    for chunk in chunks:
        initialize(chunk, table, settings, seed=7)
    optimizer = DistributedOptimizer(chunks, table, settings, context, parallel)
    for name, parameter in optimizer.shards.parameters.items():
        parameter.requires_grad_(not frozen or frozen not in name)
    run = ForwardBackward(
        chunks, model, parallel, context, GLOBAL_BATCH // context.data.size // MICRO_BATCHES
    )
    tokens, labels = (x.chunk(context.data.size)[context.data.rank] for x in batch_of(0, model))
    parts = zip(tokens.chunk(MICRO_BATCHES), labels.chunk(MICRO_BATCHES), strict=True)
    seen = Seen(len(optimizer.shards.layout.buckets))
    counts = watch(optimizer.shards)
    optimizer.begin_step(MICRO_BATCHES)
    total = run([MicroBatch(t, y) for t, y in parts])
    seen.counts = list(counts)
    seen.started = list(optimizer.shards.started)
    counted = (labels != -100).sum() * (context.pipeline.rank == 0)
    optimizer.step(settings.base_lr, total, counted)
    seen.started_in_step = list(optimizer.shards.started)
    optimizer.wait_for_parameters()
    return seen

"""Workers for the tests of `parallel.sharding: gradients`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import Parameter

from megatron_completep.guards.hooks import SkippedSteps
from megatron_completep.optim import gradient_buckets
from megatron_completep.optim.balance import gather_loads
from megatron_completep.optim.optimizer import DistributedOptimizer
from megatron_completep.parallel.exchange import Exchange
from megatron_completep.parallel.gradients import main_grad_of
from megatron_completep.planning.scaling import rank_memory
from megatron_completep.training.build import describe_run
from tests.parallel.layouts import Case, assembled, copies, counted_tokens, micro_batches_of


@dataclass(frozen=True)
class Trained:
    """What one rank has after some steps."""

    parameters: dict[str, Tensor]
    grad_norms: list[float]
    loads: dict[str, list[float]]  # of each layer's experts in the last step, over all ranks
    live_bytes: int  # the most that full gradients took at once
    bucket_bytes: list[int]
    planned_bytes: int  # of full gradients
    reused_bytes: int  # of the buckets whose parameters a micro-batch uses twice


class LiveStorages:
    """Storages of main gradients that still exist, whoever holds them."""

    def __init__(self) -> None:
        self._seen: dict[int, tuple[StorageWeakRef, int]] = {}
        self.most = 0

    def see(self, parameter: Parameter) -> None:
        main_grad = getattr(parameter, "main_grad", None)
        if not isinstance(main_grad, Tensor):
            return
        storage = main_grad.untyped_storage()
        self._seen[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self._seen = {key: seen for key, seen in self._seen.items() if not seen[0].expired()}
        self.most = max(self.most, sum(size for _, size in self._seen.values()))

    def watch(self, optimizer: DistributedOptimizer) -> None:
        """Look whenever a parameter has its gradient, and whenever a buffer was made."""
        for queue in optimizer.shards.queues:
            queue.on_complete = self._before(queue.on_complete)
            if queue.allocate is not None:
                queue.allocate = self._behind(queue.allocate)

    def _before(self, call: Any) -> Callable[[Parameter], None]:
        def watched(parameter: Parameter) -> None:
            self.see(parameter)
            call(parameter)

        return watched

    def _behind(self, call: Any) -> Callable[[Parameter], None]:
        def watched(parameter: Parameter) -> None:
            call(parameter)
            self.see(parameter)

        return watched


def train(rank: int, case: Case, live: int = gradient_buckets.LIVE) -> Trained:
    """Train as `case` says. live: buckets that may be live, for a control."""
    config, context, assembly = assembled(rank, case)
    optimizer = assembly.optimizer
    storages = LiveStorages()
    storages.watch(optimizer)
    norms = []
    with mock.patch.object(gradient_buckets, "LIVE", live):
        for step in range(case.steps):
            batches = micro_batches_of(step, config, context)
            optimizer.begin_step(len(batches))
            run = assembly.step.forward_backward
            loss_sum = run(batches, optimizer.next_micro_batch)
            tokens = counted_tokens(batches, context)
            norms.append(optimizer.step(1e-2, loss_sum, tokens).grad_norm.item())
    optimizer.wait_for_parameters()
    shards = optimizer.shards
    loads = gather_loads(shards, optimizer.loads)
    size = shards.master.element_size()
    reused = {p.bucket for p in shards.layout.pieces if shards.specs[p.name].uses > 1}
    bucket_bytes = [bucket.size * size for bucket in shards.layout.buckets]
    return Trained(
        copies(optimizer),
        norms,
        {name: load.tolist() for name, load in loads.items()},
        storages.most,
        [n for number, n in enumerate(bucket_bytes) if number not in reused],
        rank_memory(config, 0, context.gradient.size, len(batches)).gradients,
        sum(bucket_bytes[number] for number in reused),
    )


def reads_of_freed_gradients(rank: int, case: Case) -> list[str]:
    """What is raised, on one rank, by everything that must not reach a kernel."""
    config, context, assembly = assembled(rank, case)
    optimizer = assembly.optimizer
    batches = micro_batches_of(0, config, context)
    parameter = assembly.chunks[0].layers["0"].mlp.down.weight
    queue = assembly.chunks[0].queue

    def add(main_grad: Tensor, first: bool) -> None:
        raise AssertionError("a kernel saw a freed gradient")

    def without_next_micro_batch() -> None:
        optimizer.begin_step(len(batches))
        assembly.step.forward_backward(batches)

    messages = []
    for call in (
        lambda: main_grad_of(parameter),  # before the first step
        without_next_micro_batch,
        lambda: queue.push(parameter, add),  # one contribution too many
    ):
        try:
            with torch.no_grad():
                call() if call is not without_next_micro_batch else torch.enable_grad()(call)()
            messages.append("")
        except (AssertionError, RuntimeError) as error:
            messages.append(str(error))
    return messages


def origin_of_a_gradient_that_is_not_finite(rank: int, case: Case) -> tuple[str, str]:
    """(the name of a parameter of one rank's shard, what every rank says of a NaN in its sum)."""
    config, context, assembly = assembled(rank, case)
    optimizer = assembly.optimizer
    batches = micro_batches_of(0, config, context)
    optimizer.begin_step(len(batches))
    loss_sum = assembly.step.forward_backward(batches, optimizer.next_micro_batch)
    optimizer.step(1e-2, loss_sum, counted_tokens(batches, context))
    segment = optimizer.shards.segments[0]
    if rank == 1:
        optimizer.shards.grad_shard[segment.in_shard][0] = torch.nan
    hook = SkippedSteps(
        optimizer, context, config.training, Exchange(context, 1.0), 3, lambda text: None
    )
    return segment.name, hook._origin_of_sums("0-7")


def warnings_of_a_start(rank: int, case: Case) -> str:
    """What a start says of the run."""
    config, context, assembly = assembled(rank, case)
    return describe_run(config, context, assembly.precision, 1, assembly.chunks, assembly.products)

"""Workers for the tests of the distributed optimizer:
an artificially slow network in counted time, and counted collectives.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from megatron_completep.parallel import collectives
from tests.parallel.layouts import Case, assembled, counted_tokens, micro_batches_of


class Timeline:
    """Time that passes where it is told to:
    a rank computes, and a network carries its collectives, one at a time.
    """

    def __init__(self, delay: int):
        self.now, self.network_free_at, self.delay = 0, 0, delay

    def compute(self, ticks: int) -> None:
        self.now += ticks

    def send(self) -> int:
        """A collective starts; returns when it is done."""
        self.network_free_at = max(self.now, self.network_free_at) + self.delay
        return self.network_free_at

    def wait_until(self, done_at: int) -> int:
        """Ticks that were waited."""
        waited = max(0, done_at - self.now)
        self.now += waited
        return waited


class SlowWork:
    """A collective on that network: what it moves is there at once,
    and may be used when its time is over.
    """

    def __init__(self, timeline: Timeline, exposed: list[int]):
        self._timeline, self._exposed, self._done_at = timeline, exposed, timeline.send()

    def wait(self) -> None:
        self._exposed.append(self._timeline.wait_until(self._done_at))


def slow_down(timeline: Timeline, exposed: dict[str, list[int]], monkey: Any) -> None:
    """Replace the two data-parallel collectives;
    `exposed` collects how long anybody waited for each.
    """

    def slowed(name: str, real: Any) -> Any:
        def start(out: torch.Tensor, x: torch.Tensor, group: Any, async_op: bool) -> SlowWork:
            real(out, x, group=group)
            return SlowWork(timeline, exposed[name])

        return start

    for name in ("_all_gather", "_reduce_scatter"):
        setattr(monkey, name, slowed(name, getattr(monkey, name)))


def occupy(layer: nn.Module, timeline: Timeline, ticks: int) -> None:
    """What a layer costs: forward when it is entered, backward when its gradient arrives."""
    layer.register_forward_pre_hook(lambda *_: timeline.compute(ticks))
    layer.register_full_backward_pre_hook(lambda *_: timeline.compute(ticks))


def exposed_communication(
    rank: int, layer_ticks: int, delay: int, wait_early: bool
) -> dict[str, Any]:
    """Ticks for which one step waited for gradients, and the next forward pass for parameters."""
    layout = {"world_size": 2, "bucket_megabytes": 0.04}
    config, context, assembly = assembled(rank, Case(layout, {"num_layers": 10}))
    optimizer = assembly.optimizer
    timeline = Timeline(delay)
    for _, block in assembly.chunks[0].blocks():
        occupy(block, timeline, layer_ticks)
    batches = micro_batches_of(0, config, context)
    tokens = counted_tokens(batches, context)
    exposed: dict[str, list[int]] = {"_all_gather": [], "_reduce_scatter": []}
    originals = {name: getattr(collectives, name) for name in exposed}
    slow_down(timeline, exposed, collectives)
    try:
        for step in range(2):
            for waits in exposed.values():
                waits.clear()
            optimizer.begin_step(1)
            if wait_early and step:
                optimizer.wait_for_parameters()
            optimizer.step(1e-3, assembly.step.forward_backward(batches), tokens)
        optimizer.wait_for_parameters()
    finally:
        for name, original in originals.items():
            setattr(collectives, name, original)
    # Step 2's gathers are waited for after it; step 1's were waited for inside its forward pass.
    gathers = exposed["_all_gather"][: len(optimizer.shards.layout.buckets)]
    return {
        "buckets": len(optimizer.shards.layout.buckets),
        "gradients": sum(exposed["_reduce_scatter"]),
        "parameters": sum(gathers),
    }


def shard_sizes(rank: int, layout: dict[str, Any]) -> tuple[int, int]:
    """Elements of the flat buffer, and of this rank's share of one optimizer moment."""
    _, _, assembly = assembled(rank, Case(layout))
    optimizer = assembly.optimizer
    return optimizer.shards.flat.numel(), optimizer.states["exp_avg"].numel()

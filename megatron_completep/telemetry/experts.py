"""How a mixture of experts routes tokens: loads, entropy of the scores, experts without a token.

    expert_load/layers.N     largest load of an expert over the mean load: 1 if all are equal, at
                             most E / k
    expert_entropy/layers.N  mean entropy of the tokens' scores over log E: 1 if they are equal
    dead_experts             experts of all layers without a token
    dropped_tokens           places of tokens with no expert, which is 0: nothing is dropped

With `balance: bias` loads are those of the last step's global batch, as the bias sees them. Without
it they are of the probe, as the entropy always is. E experts, k of them a token.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron_completep.model.routing import Routing, observing
from megatron_completep.optim.balance import gather_loads
from megatron_completep.optim.optimizer import DistributedOptimizer
from megatron_completep.parallel.collectives import all_reduce
from megatron_completep.parallel.context import ParallelContext

LOAD = "expert_load/"
ENTROPY = "expert_entropy/"
DEAD = "dead_experts"
DROPPED = "dropped_tokens"

Rows = Mapping[int, Tensor]  # one row of sums by layer, float64
SUMS_BESIDE_LOADS = 3  # at the end of a row of RoutingTaps


class RoutingTaps:
    """Sums over the tokens of this rank, by layer.

    Attributes:
        sums: layer -> float64 [E + 3]: the load of each expert, the sum of the tokens' entropies,
            tokens, and places of tokens at experts, of the forward passes inside of `recording`.
    """

    def __init__(self, chunks: Sequence[nn.Module]):
        self.sums: dict[int, Tensor] = {}
        self._chunks = chunks

    @contextmanager
    def recording(self) -> Iterator[RoutingTaps]:
        """Record the forward passes inside the block, and nothing from before it."""
        self.sums = {}
        with ExitStack() as stack:
            for chunk in self._chunks:
                stack.enter_context(observing(chunk, self._add))
            yield self

    def _add(self, layer: int, routing: Routing) -> None:
        load = routing.load().double()
        entropies = routing.entropy().detach().double()
        counts = load.new_tensor([entropies.numel(), routing.experts.numel()])
        row = torch.cat([load, entropies.sum()[None], counts])
        self.sums[layer] = self.sums[layer] + row if layer in self.sums else row


def expert_figures(sums: Rows, optimizer: DistributedOptimizer) -> dict[str, float]:
    """The figures of all layers, the same on every rank; none for a model without experts.

    sums: of RoutingTaps. Communicates over every axis.
    """
    context = optimizer.context
    of_probe = sum_by_layer(sums, context)
    loads = of_last_step(optimizer)
    figures: dict[str, float] = {}
    entropies: dict[str, float] = {}
    dead = 0
    dropped = 0.0
    for layer, (*load, entropy, tokens, places) in of_probe.items():
        dropped += places - sum(load)
        # Of the step where it was counted, or of the probe.
        counted = loads.get(layer, load)
        figures[f"{LOAD}layers.{layer}"] = max_over_mean(counted)
        entropies[f"{ENTROPY}layers.{layer}"] = entropy / tokens / math.log(max(2, len(load)))
        dead += sum(tokens_of_expert == 0 for tokens_of_expert in counted)
    if not figures:
        return {}
    return {**figures, **entropies, DEAD: float(dead), DROPPED: dropped}


def max_over_mean(load: Sequence[float]) -> float:
    """The largest load over the mean; nan where no token counted."""
    total = sum(load)
    return max(load) * len(load) / total if total else math.nan


def of_last_step(optimizer: DistributedOptimizer) -> dict[int, list[float]]:
    """Counted tokens of each expert in the last step's global batch, by layer of the whole model.

    Empty without balance: bias, and before the first step. Communicates over shards and pipeline.
    """
    of_stage = {}
    for name, load in gather_loads(optimizer.shards, optimizer.loads).items():
        # Names are those of the whole model: layers.N.mlp.router.bias.
        layer = int(name.split(".")[1])
        of_stage[layer] = load.tolist()
    by_layer = gather_stages(of_stage, optimizer.context)
    # Before a first step there are none, and nothing was counted.
    return {layer: load for layer, load in by_layer.items() if any(load)}


def sum_by_layer(rows: Rows, context: ParallelContext) -> dict[int, list[float]]:
    """Sums over all tokens of rows [c] by layer, the same on every rank, in the order of layers.

    Communicates over data and context, over tensor ranks that have tokens of their own, and over
    the pipeline. Ranks of a stage have the same layers.
    """
    of_stage: dict[int, list[float]] = {}
    if rows:
        table = torch.stack(list(rows.values())).to(context.device)
        if context.sequence.split:
            table = all_reduce(table, context.tensor)
        table = all_reduce(table, context.gradient)
        of_stage = dict(zip(rows, table.tolist(), strict=True))
    return gather_stages(of_stage, context)


def gather_stages(
    of_stage: dict[int, list[float]], context: ParallelContext
) -> dict[int, list[float]]:
    """The rows of all pipeline stages, in the order of layers."""
    stages = [of_stage]
    if context.pipeline.group is not None:
        stages = [{} for _ in range(context.pipeline.size)]
        dist.all_gather_object(stages, of_stage, group=context.pipeline.group)
    by_layer = {layer: row for stage in stages for layer, row in stage.items()}
    return {layer: by_layer[layer] for layer in sorted(by_layer)}

"""Balancing experts by a bias on their scores, without a loss (arXiv 2408.15664).

In every step the bias of an expert that got fewer tokens than its share grows by the rate, and that
of one that got more falls by it. The loads are those of the global batch: they arrive where the
gradient of the bias would, summed over micro-batches and ranks by the same collectives, so that no
layout and no micro-batch size changes them. Nothing of them enters the gradient norm.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from megatron_completep.optim.layout import Segment
from megatron_completep.optim.shards import Shards
from megatron_completep.parallel.collectives import all_reduce
from megatron_completep.parallel.parameter import Balance


class Loads(NamedTuple):
    """What the experts of one segment of a bias got: counted tokens of the step, float."""

    segment: Segment
    balance: Balance
    tokens: Tensor


def take_loads(shards: Shards) -> list[Loads]:
    """Take the loads out of this rank's shard of the gradients, and leave zeros behind.

    Called when gradients are summed, before their norm. With a zero gradient and no decay, no
    update rule moves a bias.
    """
    loads = []
    for segment in shards.segments:
        balance = shards.specs[segment.name].balance
        if balance is not None:
            arrived = shards.grad_shard[segment.in_shard]
            loads.append(Loads(segment, balance, arrived.clone()))
            arrived.zero_()
    return loads


def gather_loads(shards: Shards, loads: list[Loads]) -> dict[str, Tensor]:
    """Tokens of each expert [E] in the step, over all ranks, by the name of the layer's bias.

    Of the layers of this pipeline stage, the same on all of its ranks. Communicates over the shard
    axis; where a stage has no bias, on none of its ranks.
    """
    by_name = {
        name: shards.master.new_zeros(spec.shape)
        for name, spec in shards.specs.items()
        if spec.balance is not None
    }
    if not by_name:
        return {}
    for segment, _, tokens in loads:
        start = segment.parameter_start
        by_name[segment.name][start : start + segment.size] = tokens
    summed = all_reduce(torch.cat(list(by_name.values())), shards.reductions["gradient"].shard)
    sizes = [len(load) for load in by_name.values()]
    return dict(zip(by_name, summed.split(sizes), strict=True))


@torch.no_grad()
def move_biases(
    shards: Shards, loads: list[Loads], counted_tokens: Tensor, skipped: Tensor
) -> None:
    """Move this rank's shard of the biases by the rate, towards equal loads.

    Called before the rule's update, which rounds the masters and sends them on.

    counted_tokens: [] of the step, over all ranks. skipped: [] 1 where the step changes nothing.
    """
    for segment, balance, tokens in loads:
        missing = counted_tokens * balance.share - tokens.double()
        step = balance.rate * missing.sign() * (1 - skipped)
        shards.master[segment.in_shard].add_(step)

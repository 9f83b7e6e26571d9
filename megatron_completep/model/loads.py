"""How many tokens each expert of a layer gets.

T tokens of this rank, E experts of the layer, k of them a token.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_completep.parallel.axis import Axis
from megatron_completep.parallel.collectives import all_reduce

SMALLEST_SUM = 1e-19  # added to the sum of a token's scores; its inverse square is a float32


def load_of(experts: Tensor, num_experts: int, counted: Tensor | None = None) -> Tensor:
    """int64 [num_experts]: how many of the tokens with these experts [T, k] each expert gets.

    counted: bool [T], of the tokens that count; None: all do.
    """
    load = torch.zeros(num_experts, dtype=torch.int64, device=experts.device)
    ones = torch.ones_like(experts)
    if counted is not None:
        ones = ones * counted[:, None]
    return load.scatter_add_(0, experts.flatten(), ones.flatten())


def loads_of_sequences(
    experts: Tensor,
    num_experts: int,
    counted: Tensor | None,
    sequences: int,
    axes: Sequence[Axis],
) -> Tensor:
    """int64 [sequences, E]: the loads of each whole sequence of a micro-batch.

    experts [T, k], counted [T]: of the residual stream, in which the tokens of all sequences at one
    place lie side by side. axes: whose ranks share a sequence; communicates over each of them.
    """
    places = torch.arange(len(experts), device=experts.device)
    # A sequence's experts have numbers of their own, so that one count tells all of them apart.
    numbers = experts + (places % sequences * num_experts)[:, None]
    loads = load_of(numbers, sequences * num_experts, counted).view(sequences, num_experts)
    for axis in axes:
        loads = all_reduce(loads, axis)
    return loads


def shares_of(scores: Tensor) -> Tensor:
    """Scores [T, E] of tokens, scaled to a sum of 1; 0 if all of them have fallen to 0."""
    # Changes no bit of a sum above 1e-2, in float64 either, and keeps nothing for backward.
    return scores / (scores.sum(-1, keepdim=True) + SMALLEST_SUM)

"""Whether a router tells experts apart at the start of a run.

Where all scores are equal, ties go to the lowest numbers: a fixed part of the network trains, the
others never do, and the loss still falls.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack

import torch
from torch import Tensor

from megatron_completep.config.derived import expert_layers
from megatron_completep.config.schema import Config
from megatron_completep.data.loader import Batch
from megatron_completep.errors import ConfigError
from megatron_completep.model.routing import Routing, observing
from megatron_completep.parallel.collectives import all_reduce
from megatron_completep.parallel.context import ParallelContext
from megatron_completep.run.step import TrainingStep, naming_work

SHOWN = 8  # layers in the warning


class FirstRoutings:
    """What the routers of all layers do with the first batch, summed over ranks.

    loads: tokens by layer and expert, [layers, E]. spreads: [layers], the highest score less the
    lowest, summed over tokens.
    """

    def __init__(self, config: Config, context: ParallelContext):
        moe = config.model.moe
        assert moe is not None
        self._context = context
        self.layers = expert_layers(config.model)
        size = len(self.layers), moe.num_experts + 1
        self._sums = torch.zeros(size, dtype=torch.float64, device=context.device)

    def add(self, layer: int, routing: Routing) -> None:
        """One more micro-batch of a layer."""
        row = self._sums[self.layers.index(layer)]
        row[:-1] += routing.load()
        row[-1] += (routing.scores.amax(-1) - routing.scores.amin(-1)).double().sum()

    def gather(self) -> tuple[Tensor, Tensor]:
        """(loads, spreads). Communicates over the whole mesh."""
        sums = all_reduce(self._sums, self._context.world).cpu()
        return sums[:, :-1], sums[:, -1]


def check_routing(
    config: Config,
    context: ParallelContext,
    step: TrainingStep,
    batches: Sequence[Batch],
    say: Callable[[str], None],
) -> None:
    """Route the first batch without training on it, and look at the scores and loads.

    Raises ConfigError, on every rank, if the scores of a layer are equal over its experts; warns of
    experts without a token. Communicates as an evaluation does, and over the whole mesh. Does
    nothing without model.moe.
    """
    if config.model.moe is None:
        return
    routings = FirstRoutings(config, context)
    with ExitStack() as observed:
        for chunk in step.chunks:
            observed.enter_context(observing(chunk, routings.add))
        with naming_work("check of the first batch"):
            step.evaluate(batches)
    loads, spreads = routings.gather()
    tied = [layer for layer, spread in zip(routings.layers, spreads, strict=True) if spread == 0]
    if tied and config.model.moe.num_experts > 1:
        raise ConfigError(
            f"model.moe: the router of layer {', '.join(map(str, tied))} gives all experts the "
            "same score, so that ties would send every token to the first of them and the others "
            "would never train. Start from router weights that are not zero."
        )
    empty_experts = []
    for layer, load in zip(routings.layers, loads.tolist(), strict=True):
        empty = [str(expert) for expert, tokens in enumerate(load) if tokens == 0]
        if empty:
            empty_experts.append(f"layer {layer}: {', '.join(empty)}")
    if empty_experts:
        more = len(empty_experts) - SHOWN
        further = f"; and in {more} more layers" if more > 0 else ""
        say(
            "warning: experts without a token in the first batch, "
            f"{'; '.join(empty_experts[:SHOWN])}{further}"
        )

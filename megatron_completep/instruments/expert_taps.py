"""What instruments read off the layers with experts.

T tokens of this rank, E experts, k of them a token, H hidden.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_completep.model.experts import MixtureOfExperts
from megatron_completep.model.loads import load_of
from megatron_completep.model.routing import Router, Routing
from megatron_completep.parallel.context import ParallelContext
from megatron_completep.telemetry.experts import (
    SUMS_BESIDE_LOADS,
    RoutingTaps,
    max_over_mean,
    sum_by_layer,
)
from megatron_completep.telemetry.measure import SumOfSquares, reduce_stream_sums


class LoadTaps:
    """The loads of experts, step by step, in one process; a model without experts has none."""

    def __init__(self, chunks: Sequence[nn.Module]):
        self._taps = RoutingTaps(chunks)
        self._steps: list[dict[int, float]] = []  # by layer

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Count the forward passes inside the block as one step."""
        with self._taps.recording() as taps:
            yield
        ratios = {}
        for layer, row in taps.sums.items():
            ratios[layer] = max_over_mean(row[:-SUMS_BESIDE_LOADS].tolist())
        self._steps.append(ratios)

    def largest(self, part: float) -> float | None:
        """The largest load over the mean load, of the layer where it is largest.

        The mean over the last `part` of the steps, at least one. None without experts.
        """
        if not self._steps or not self._steps[-1]:
            return None
        steps = self._steps[-max(1, round(part * len(self._steps))) :]
        return max(sum(step[layer] for step in steps) / len(steps) for layer in steps[0])


@dataclass
class ExpertProbe:
    """What a forward pass computes in the layers with experts, by the layer's number.

    Lists are of the forward passes; the tensors are those of this rank.
    """

    branches: dict[int, list[Tensor]] = field(default_factory=dict)  # before the depth multiplier
    logits: dict[int, list[Tensor]] = field(default_factory=dict)  # [T, E]
    scores: dict[int, list[Tensor]] = field(default_factory=dict)  # [T, E]
    choices: dict[int, list[Tensor]] = field(default_factory=dict)  # int64 [T, k]


class ExpertTaps:
    """Reads mixtures of experts and their routers in forward passes."""

    def __init__(self, chunks: Sequence[nn.Module]):
        self._probe: ExpertProbe | None = None  # of the forward passes at hand
        for chunk in chunks:
            for module in chunk.modules():
                # The hooks stay for good and do nothing until `recording` asks for them.
                if isinstance(module, MixtureOfExperts):
                    module.register_forward_hook(self._see_branch)
                elif isinstance(module, Router):
                    module.register_forward_hook(self._see_routing)

    @contextmanager
    def recording(self) -> Iterator[ExpertProbe]:
        """Record the forward passes inside the block."""
        self._probe = ExpertProbe()
        try:
            yield self._probe
        finally:
            self._probe = None

    def _see_branch(self, mixture: nn.Module, _: Any, branch: Any) -> None:
        if self._probe is not None:
            assert isinstance(mixture, MixtureOfExperts)
            self._probe.branches.setdefault(mixture.layer, []).append(branch.out.detach())

    @torch.no_grad()
    def _see_routing(self, router: nn.Module, inputs: tuple[Any, ...], routing: Routing) -> None:
        if self._probe is None:
            return
        assert isinstance(router, Router)
        tokens = inputs[0].detach()
        dtype = torch.promote_types(tokens.dtype, torch.float32)
        # The scores of a softmax, or of a sigmoid far from 0, do not give the logits back.
        logits = F.linear(tokens.to(dtype), router.weight.detach().to(dtype))
        self._probe.logits.setdefault(router.layer, []).append(logits)
        self._probe.scores.setdefault(router.layer, []).append(routing.scores.detach())
        self._probe.choices.setdefault(router.layer, []).append(routing.experts)


def expert_figures(
    start: ExpertProbe, before_last: ExpertProbe, last: ExpertProbe, context: ParallelContext
) -> dict[str, float]:
    """What the coordinate check reports of experts; empty for a model without any.

    start: at the initial weights. before_last, last: before and after the last step. Figures are
    root mean squares over all layers, but for loads and choices. Communicates over all ranks of the
    layout, and gives the same on every rank.
    """
    tensors: dict[str, list[Tensor]] = {}
    for layer in start.branches:
        tensors[f"experts at init/{layer}"] = start.branches[layer]
        tensors[f"experts' change/{layer}"] = _differences(last.branches, start.branches, layer)
        tensors[f"router logits change/{layer}"] = _differences(last.logits, start.logits, layer)
        tensors[f"score spread at init/{layer}"] = [
            scores - scores.mean(-1, keepdim=True) for scores in start.scores[layer]
        ]
    sums = {name: SumOfSquares.of(outputs) for name, outputs in tensors.items()}
    squares: dict[str, list[float]] = {}
    for name, rms in reduce_stream_sums(sums, context).items():
        squares.setdefault(name.partition("/")[0], []).append(rms**2)
    figures = {name: _mean(of_layers) ** 0.5 for name, of_layers in squares.items()}
    return {**figures, **_loads_and_choices(before_last, last, context)}


def _differences(
    now: dict[int, list[Tensor]], before: dict[int, list[Tensor]], layer: int
) -> list[Tensor]:
    return [a - b for a, b in zip(now[layer], before[layer], strict=True)]


def _loads_and_choices(
    before_last: ExpertProbe, last: ExpertProbe, context: ParallelContext
) -> dict[str, float]:
    """Loads and experts without a token at the end, and the share of tokens that went elsewhere."""
    rows = {}
    for layer, choices in last.choices.items():
        num_experts = last.scores[layer][0].shape[1]
        now = torch.cat(choices)
        moved = (now != torch.cat(before_last.choices[layer])).any(-1)
        counts = torch.stack([moved.sum(), torch.full_like(moved.sum(), len(moved))])
        rows[layer] = torch.cat([load_of(now, num_experts), counts]).double()
    loads = []
    dead = []
    moved_shares = []
    for *load, moved_tokens, tokens in sum_by_layer(rows, context).values():
        loads.append(max_over_mean(load))
        dead.append(float(load.count(0.0)))
        moved_shares.append(moved_tokens / tokens)
    if not loads:
        return {}
    return {
        "load, largest over mean": _mean(loads),
        "experts without a token": _mean(dead),
        "choices changed by a step": _mean(moved_shares),
    }


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)

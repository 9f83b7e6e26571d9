"""Workers for the tests of float8 products."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from megatron_completep import kernels
from megatron_completep.config import Config
from megatron_completep.parallel import float8
from megatron_completep.parallel.axis import Axis
from megatron_completep.parallel.float8 import Dynamic, Float8Matrix
from megatron_completep.parallel.linear import ColumnParallelLinear, RowParallelLinear
from megatron_completep.run.assemble import Assembly, assemble
from tests.parallel.layouts import SPREAD_MODEL, counted_tokens, micro_batches_of
from tests.support.configs import merged, small_config
from tests.support.ranks import context_on

FLOAT8 = {"float8": "tensorwise", "float8_least_size": 16, "precision": "float32"}
BASE = {
    "model": {**SPREAD_MODEL, "seq_length": 16, "num_layers": 2},
    "optimizer": {"base_init_std": 0.2, "schedule": "constant", "base_eps": 1e-8},
    "training": {"micro_batch_size": 8, "global_batch_size": 16, "seed": 7, **FLOAT8},
}


def config_of(sections: dict[str, dict[str, Any]]) -> Config:
    return small_config(**merged(BASE, sections))


def matrices_of(assembly: Assembly) -> dict[str, Float8Matrix]:
    """By the name of the weight."""
    matrices = {}
    for chunk in assembly.chunks:
        for name, module in chunk.named_modules():
            if not isinstance(module, ColumnParallelLinear | RowParallelLinear):
                continue
            products = module.context.products
            if isinstance(products, Float8Matrix):
                products.name = name
                matrices[f"{name}.weight"] = products
    return matrices


class Magnitudes(Dynamic):
    """Remembers what it said, in order; without the axis it is a control."""

    def __init__(self, forget_axis: bool = False) -> None:
        self.forget_axis = forget_axis
        self.said: dict[str, list[float]] = {}

    def largest(self, matrix: Float8Matrix, kind: str, x: Tensor, axis: Axis | None) -> Tensor:
        amax = super().largest(matrix, kind, x, None if self.forget_axis else axis)
        self.said.setdefault(f"{matrix.name} {kind}", []).append(amax.item())
        return amax


@dataclass(frozen=True)
class Outcome:
    """What one rank saw."""

    tensor_rank: int
    losses: list[float]
    rounded: dict[str, Tensor]  # bytes of the rounded weights, behind the last step
    scales: dict[str, float]
    weights: dict[str, Any]  # their specs
    magnitudes: dict[str, list[float]]


def train(
    rank: int, sections: dict[str, dict[str, Any]], steps: int = 2, forget_axis: bool = False
) -> Outcome:
    """Train in the process group at hand, or alone. forget_axis: a mistake, for a control."""
    config = config_of(sections)
    context = context_on(rank, config.parallel)
    assembly = assemble(config, context)
    matrices = matrices_of(assembly)
    scaling = Magnitudes(forget_axis)
    for matrix in matrices.values():
        matrix.scaling = scaling
    losses = []
    for step in range(steps):
        batches = micro_batches_of(step, config, context)
        assembly.optimizer.begin_step(len(batches))
        run = assembly.step.forward_backward
        loss_sum = run(batches, assembly.optimizer.next_micro_batch)
        tokens = counted_tokens(batches, context)
        losses.append(assembly.optimizer.step(1e-2, loss_sum, tokens).loss.item())
    assembly.optimizer.wait_for_parameters()
    shards = assembly.optimizer.shards
    return Outcome(
        context.tensor.rank,
        losses,
        {name: m.rounded().data.view(torch.uint8) for name, m in matrices.items()},
        {name: m.rounded().scale.item() for name, m in matrices.items()},
        {name: shards.specs[name] for name in matrices},
        scaling.said,
    )


def casts_of_weights(steps: int, micro_batches: int) -> tuple[int, int]:
    """(casts of weights in some steps, matrices)."""
    config = config_of({"training": {"micro_batch_size": 16 // micro_batches}})
    context = context_on(0, config.parallel)
    assembly = assemble(config, context)
    shapes = {tuple(m._parameter.shape) for m in matrices_of(assembly).values()}
    casts = 0

    def counted(x: Tensor, amax: Tensor, gradient: bool, transpose: bool) -> Any:
        nonlocal casts
        casts += transpose and tuple(x.shape) in shapes
        return true_cast(x, amax, gradient, transpose)

    true_cast = kernels.float8_cast
    with mock.patch.object(float8.kernels, "float8_cast", counted):
        for step in range(steps):
            batches = micro_batches_of(step, config, context)
            assembly.optimizer.begin_step(len(batches))
            loss_sum = assembly.step.forward_backward(batches)
            assembly.optimizer.step(1e-2, loss_sum, counted_tokens(batches, context))
    return casts, len(matrices_of(assembly))


def loss_after_loading(renews: bool) -> tuple[float, float, set[str]]:
    """(loss of the third step, the same in a new run that took over the states, their names).

    renews: whether the new run learns that its weights are others, else a control.
    """
    config = config_of({})
    context = context_on(0, config.parallel)
    batches = micro_batches_of(2, config, context)
    assemblies = [assemble(config, context) for _ in range(2)]
    first, second = (assembly.optimizer for assembly in assemblies)
    for step in range(2):
        earlier = micro_batches_of(step, config, context)
        first.begin_step(len(earlier))
        loss_sum = assemblies[0].step.forward_backward(earlier)
        first.step(1e-2, loss_sum, counted_tokens(earlier, context))
    # As long as nothing was rounded, nothing can be out of date.
    with torch.no_grad():
        assemblies[1].step.forward_backward.evaluate(batches)
    for name, state in first.states.items():
        second.states[name].copy_(state)
    if not renews:
        second.shards.on_new_parameters.clear()
    second.shards.load_from_masters()
    losses = [a.step.forward_backward.evaluate(batches).item() for a in assemblies]
    return losses[0], losses[1], set(second.states)

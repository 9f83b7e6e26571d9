"""How the best learning rate falls with the length of a run, and how well it transfers over sizes.

The exponent of the length is contested (docs/parameterization.md), so that it is fitted to a
recipe: with the best peak rate proportional to tokens^-d at a fixed batch, d is what
completep.duration_exponent takes. A proxy that names completep.base_total_tokens scales its rates
with the length already: the peak counts, and not the base rate of the grid.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_completep.instruments.fits import Estimate, loss_at, slope
from megatron_completep.instruments.lr_curves import (
    Curve,
    Family,
    order_of_shapes,
    slope_of_optima,
)

LEAST_LENGTHS = 3  # two always lie on a line
WIDEST = 0.2  # an exponent with a wider interval chooses between no published ones
AT_EDGE = "unresolved: an optimum lies at the edge of the grid"


@dataclass(frozen=True)
class Horizon:
    """The exponent d of best peak learning rate ~ tokens^-d, of one shape under one rule.

    error: its standard error. verdict: `fitted`, or `unresolved` with a reason.
    """

    parameterization: str
    hidden_size: int
    num_layers: int
    base_weight_decay: float
    lengths: list[int]  # train_steps
    exponent: Estimate
    error: float
    verdict: str


@dataclass(frozen=True)
class Quality:
    """Transfer over sizes in three numbers, after arXiv 2605.21486.

    fit_error: octaves (root mean square) of the optima from their line over log2(parameters of the
    blocks). robustness: exponent of the curvature of the loss in log2(lr) over the same size; the
    lower it is, the less a miss costs at scale. penalty: nats that the largest shape loses at the
    smallest one's best learning rate. behind: nats of the largest shape's best loss over the best
    of any rule at that shape.
    """

    parameterization: str
    train_steps: int
    base_weight_decay: float
    base_init_std: float
    shapes: int
    fit_error: float | None  # None for fewer than three shapes
    robustness: float | None  # None where a curve has no parabola
    penalty: float
    behind: float


def horizons(curves: Sequence[Curve]) -> list[Horizon]:
    """One exponent for every shape and rule that was swept at three lengths or more."""
    by_shape: dict[tuple[str, int, int, int, float, float], list[Curve]] = {}
    for curve in curves:
        if curve.swept:
            key = (
                curve.parameterization,
                *order_of_shapes(curve),
                curve.base_weight_decay,
                curve.base_init_std,
            )
            by_shape.setdefault(key, []).append(curve)
    results = []
    for of_shape in by_shape.values():
        if len(of_shape) >= LEAST_LENGTHS:
            results.append(horizon(sorted(of_shape, key=lambda curve: curve.train_steps)))
    return results


def horizon(curves: Sequence[Curve]) -> Horizon:
    """The exponent of curves of one shape by ascending length."""
    lengths = [math.log2(curve.train_steps) for curve in curves]
    # d is the negative of the slope.
    falling = [-length for length in lengths]
    of_base = slope_of_optima(curves, falling)
    # What the length does to the peak at one base rate; it has no noise.
    of_scale = slope(falling, [curve.log2_scale for curve in curves])
    estimate = Estimate(of_base.value + of_scale, of_base.low + of_scale, of_base.high + of_scale)
    at_edge = any(curve.optimum().at_edge for curve in curves)
    shortest = curves[0]
    return Horizon(
        shortest.parameterization,
        shortest.hidden_size,
        shortest.num_layers,
        shortest.base_weight_decay,
        [curve.train_steps for curve in curves],
        estimate,
        (estimate.high - estimate.low) / (2 * 1.96),
        horizon_verdict(estimate, at_edge),
    )


def horizon_verdict(estimate: Estimate, at_edge: bool) -> str:
    """`fitted` only if no optimum lies at an edge and the interval is narrow enough to use."""
    if at_edge:
        return AT_EDGE
    if not estimate.repeated:
        return "unresolved: no interval, of one seed or of optima near an edge of the grid"
    if estimate.wider_than(WIDEST):
        return f"unresolved: the interval is wider than {WIDEST}"
    return "fitted"


def qualities(curves: Sequence[Curve]) -> list[Quality]:
    """The three numbers of every rule, length, decay and initial std with two shapes or more."""
    families: dict[Family, list[Curve]] = {}
    for curve in curves:
        if curve.swept:
            families.setdefault(curve.family, []).append(curve)
    return [
        quality(sorted(family, key=_size), curves)
        for family in families.values()
        if len(family) > 1
    ]


def quality(family: Sequence[Curve], curves: Sequence[Curve]) -> Quality:
    """The three numbers of one family's curves by ascending size; curves: those of all rules."""
    smallest = family[0]
    largest = family[-1]
    sizes = [math.log2(_size(curve)) for curve in family]
    optima = [curve.optimum() for curve in family]
    rates = [optimum.log2_lr for optimum in optima]
    fit_error = None
    if len(family) > 2:
        line = np.polyfit(sizes, rates, 1)
        fit_error = float(np.sqrt(np.mean((np.polyval(line, sizes) - rates) ** 2)))
    curvatures = [optimum.fit[0] for optimum in optima if optimum.fit is not None]
    robustness = None
    if len(curvatures) == len(family):
        robustness = slope(sizes, np.log2(curvatures).tolist())
    at_smallest = loss_at(largest.log2_lr, largest.mean, optima[-1], rates[0])
    same_size = [
        curve.optimum().loss
        for curve in curves
        if order_of_shapes(curve) == order_of_shapes(largest)
        and curve.train_steps == largest.train_steps
    ]
    return Quality(
        *smallest.family,
        len(family),
        fit_error,
        robustness,
        float(np.maximum(at_smallest - optima[-1].loss, 0.0)),
        optima[-1].loss - min(same_size),
    )


def _size(curve: Curve) -> float:
    """Proportional to the parameters of the blocks, of which experts are nearly all."""
    return float(curve.num_layers * curve.hidden_size**2 * max(1, curve.num_experts))

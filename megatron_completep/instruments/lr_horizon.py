"""How the best learning rate falls with the length of a run, and how well it transfers over sizes.

The exponent of the length is contested (docs/parameterization.md), so that it is fitted to a
recipe: with the best peak rate proportional to tokens^-d at a fixed batch, d is what
completep.duration_exponent takes. A proxy that names completep.base_total_tokens scales its rates
with the length already: the peak counts, and not the base rate of the grid.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_completep.instruments import lr_curves
from megatron_completep.instruments.fits import Array, Estimate, bootstrap, loss_at, slope
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
    """Transfer over sizes in three numbers, after arXiv 2605.21486, with intervals over seeds.

    fit_error: octaves (root mean square) of the optima from their line over log2(parameters of the
    blocks). robustness: exponent of the curvature of the loss in log2(lr) over the same size; the
    lower it is, the less a miss costs at scale. penalty: nats that the largest shape loses at the
    smallest one's best learning rate. behind: nats of the largest shape's best loss over the best
    of any rule at that shape. verdict: `measured`, or `unresolved` with a reason.
    """

    parameterization: str
    train_steps: int
    base_weight_decay: float
    base_init_std: float
    shapes: int
    fit_error: Estimate | None  # None for fewer than three shapes
    robustness: Estimate | None  # None where a curve has no parabola
    penalty: Estimate
    behind: Estimate
    verdict: str


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
    same_size = []
    for curve in curves:
        same_shape = order_of_shapes(curve) == order_of_shapes(largest)
        if same_shape and curve.train_steps == largest.train_steps:
            same_size.append(curve)

    def over_seeds(
        statistic: Callable[[list[Array]], float], of_curves: Sequence[Curve]
    ) -> Estimate:
        return bootstrap(statistic, [curve.losses for curve in of_curves], lr_curves.REPLICATES)

    def fit_error(means: list[Array]) -> float:
        rates = [curve.optimum(mean).log2_lr for curve, mean in zip(family, means, strict=True)]
        line = np.polyfit(sizes, rates, 1)
        return float(np.sqrt(np.mean((np.polyval(line, sizes) - rates) ** 2)))

    def robustness(means: list[Array]) -> float:
        fits = [curve.optimum(mean).fit for curve, mean in zip(family, means, strict=True)]
        curvatures = [math.nan if fit is None else fit[0] for fit in fits]
        return slope(sizes, np.log2(curvatures).tolist())

    def penalty(means: list[Array]) -> float:
        optimum = largest.optimum(means[1])
        at_smallest = loss_at(
            largest.log2_lr, means[1], optimum, smallest.optimum(means[0]).log2_lr
        )
        return float(np.maximum(at_smallest - optimum.loss, 0.0))

    def behind(means: list[Array]) -> float:
        best = [curve.optimum(mean).loss for curve, mean in zip(same_size, means[1:], strict=True)]
        return largest.optimum(means[0]).loss - min(best)

    used = [*family, *same_size]
    curved = over_seeds(robustness, family)
    return Quality(
        *smallest.family,
        len(family),
        over_seeds(fit_error, family) if len(family) > 2 else None,
        None if math.isnan(curved.value) else curved,
        over_seeds(penalty, [smallest, largest]),
        # A curve that is compared with itself is drawn once.
        Estimate(0.0, 0.0, 0.0)
        if len(same_size) == 1
        else over_seeds(behind, [largest, *same_size]),
        quality_verdict(used),
    )


def quality_verdict(curves: Sequence[Curve]) -> str:
    """`measured`, or `unresolved` with a reason."""
    if any(curve.swept and curve.optimum().at_edge for curve in curves):
        return AT_EDGE
    if any(curve.losses.shape[1] < 2 for curve in curves):
        return "unresolved: one seed gives no interval"
    return "measured"


def _size(curve: Curve) -> float:
    """Proportional to the parameters of the blocks, of which experts are nearly all."""
    return float(curve.num_layers * curve.hidden_size**2 * max(1, curve.num_experts))

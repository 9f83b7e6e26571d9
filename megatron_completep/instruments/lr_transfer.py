"""Learning-rate transfer: from the points of a sweep to optima, drift, regret, savings, a report, and the target's configuration.

Optima are compared, not losses: per shape a parabola in log2(lr) gives the best learning rate, a bootstrap over seeds its interval,
which is never narrower than the grid allows. What an interval cannot tell is called unresolved.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_completep.errors import DataError
from megatron_completep.instruments import fits, sweep
from megatron_completep.instruments.fits import (
    Array,
    Estimate,
    bootstrap,
    bootstrap_located,
    loss_at,
    mean_curve,
    parabola_optimum,
    slope,
)

EDGE_NATS = 0.3  # a curve this far above its best, or not finite, is over the divergence edge
DRIFT_BAND = 0.15  # octaves per doubling of depth that count as no drift
REGRET_BAND = 0.02  # nats
REPLICATES = 1000
AT_EDGE = "unresolved: an optimum lies at the edge of the grid"
Say = Callable[[str], None]
Family = tuple[
    str, int, float, float
]  # parameterization, train_steps, base_weight_decay, base_init_std


@dataclass(frozen=True)
class Curve:
    """Losses of one shape over the learning rates, seeds that are complete only."""

    parameterization: str
    hidden_size: int
    num_layers: int
    train_steps: int
    base_weight_decay: float
    base_init_std: float
    log2_lr: Array  # [n] ascending
    losses: Array  # [n, seeds], infinite where a run diverged
    flops: float  # of one run

    @property
    def family(self) -> Family:
        return self.parameterization, self.train_steps, self.base_weight_decay, self.base_init_std

    @property
    def mean(self) -> Array:
        return mean_curve(self.losses)

    @property
    def swept(self) -> bool:
        """Whether there are learning rates to choose from."""
        return len(self.log2_lr) > 1

    def optimum(self, mean: Array | None = None) -> fits.Optimum:
        """The best learning rate of the mean curve, or of one that stands for it."""
        return parabola_optimum(self.log2_lr, self.mean if mean is None else mean)

    def same_runs(self, other: Curve) -> bool:
        """Whether the other's runs are these: at the base depth rules coincide, and share them."""
        shapes = [
            (c.hidden_size, c.num_layers, c.train_steps, c.base_weight_decay, c.base_init_std)
            for c in (self, other)
        ]
        return (
            shapes[0] == shapes[1]
            and np.array_equal(self.log2_lr, other.log2_lr)
            and np.array_equal(self.losses, other.losses)
        )


@dataclass(frozen=True)
class Optimum:
    """What one shape came to."""

    parameterization: str
    hidden_size: int
    num_layers: int
    train_steps: int
    base_weight_decay: float
    base_init_std: float
    seeds: int
    log2_lr: Estimate
    grid_log2_lr: float  # the grid's best point
    grid_step: (
        float | None
    )  # octaves from there to the nearer neighbour; None where one learning rate was run
    loss: Estimate
    at_edge: bool
    drift: Estimate | None  # octaves from the base shape's optimum; None for the base shape itself
    regret: Estimate | None  # nats lost at the base shape's optimum; None for the base shape itself
    regret_verdict: str  # small | large | unresolved | not on the grid | base shape
    divergence_log2_lr: (
        float | None
    )  # the smallest learning rate above the optimum that is over the edge
    flops: float
    tau: float | None  # 1 / (lr * wd * steps) at the optimum


@dataclass(frozen=True)
class Drift:
    """Drift of the optimum over depth under one rule, and what it says."""

    parameterization: str
    hidden_size: int
    train_steps: int
    base_weight_decay: float
    base_init_std: float
    per_doubling: Estimate
    verdict: str  # transfers | drifts | unresolved


@dataclass(frozen=True)
class Saving:
    """FLOPs to the loss of another rule, or of another shape: 1 - (ours / theirs), in percent."""

    parameterization: str
    num_layers: int
    hidden_size: int
    against: str  # the other's parameterization
    against_num_layers: int
    against_hidden_size: int
    percent: Estimate
    verdict: str  # saves | costs | unresolved


def curves_of(results: Iterable[tuple[sweep.Point, dict[str, Any]]]) -> list[Curve]:
    """Gather points into curves. Only seeds for which every learning rate of the curve is done count."""
    gathered: dict[tuple[Any, ...], dict[tuple[float, int], dict[str, Any]]] = {}
    for p, result in results:
        shape = (
            p.parameterization,
            p.hidden_size,
            p.num_layers,
            p.train_steps,
            p.base_weight_decay,
            p.base_init_std,
        )
        gathered.setdefault(shape, {})[p.base_lr, p.seed] = result
    curves = []
    for shape, runs in gathered.items():
        rates = sorted({rate for rate, _ in runs})
        seeds = [
            s
            for s in sorted({seed for _, seed in runs})
            if all((rate, s) in runs for rate in rates)
        ]
        if not seeds:
            continue
        losses = np.array([[sweep.loss_of(runs[rate, seed]) for seed in seeds] for rate in rates])
        flops = max(result["flops"] for result in runs.values())
        curves.append(Curve(*shape, np.log2(rates), losses, flops))
    return curves


def base_curve(curve: Curve, curves: Sequence[Curve]) -> Curve:
    """The smallest shape of the same family: least depth, then least width."""
    return min(
        (c for c in curves if c.family == curve.family), key=lambda c: (c.num_layers, c.hidden_size)
    )


def regret(own: Curve, base: Curve, own_mean: Array, base_mean: Array) -> float:
    """Loss at the base's optimum minus the loss at one's own, both on one's own curve; nan where its grid does not reach that far."""
    chosen, best = base.optimum(base_mean), own.optimum(own_mean)
    return float(np.maximum(loss_at(own.log2_lr, own_mean, best, chosen.log2_lr) - best.loss, 0.0))


def regret_verdict(estimate: Estimate) -> str:
    """Only an interval wholly below, or wholly above, REGRET_BAND decides."""
    if math.isnan(estimate.value):
        return "not on the grid"
    if estimate.high <= REGRET_BAND:
        return "small"
    return "large" if estimate.low > REGRET_BAND else "unresolved"


def best_loss(curve: Curve) -> Estimate:
    """The loss at the optimum, with what seeds do to the whole curve in its interval."""
    return bootstrap(lambda m: curve.optimum(m[0]).loss, [curve.losses], REPLICATES, of_level=True)


def divergence(curve: Curve) -> float | None:
    """The smallest log2(lr) above the optimum whose mean loss is EDGE_NATS over the best, or not finite."""
    mean = curve.mean
    best = int(np.argmin(mean))
    over = [
        rate
        for rate, loss in zip(curve.log2_lr[best:], mean[best:], strict=True)
        if not loss <= mean[best] + EDGE_NATS
    ]
    return float(over[0]) if over else None


def optimum_of(curve: Curve, base: Curve) -> Optimum:
    """Everything of one shape, with intervals."""
    x, point = curve.log2_lr, curve.optimum()
    shape = (
        curve.parameterization,
        curve.hidden_size,
        curve.num_layers,
        curve.train_steps,
        curve.base_weight_decay,
        curve.base_init_std,
    )
    drift = lost = None
    says = "base shape"
    if curve is not base:
        pair = [curve.losses, base.losses]
        drift = bootstrap_located(
            lambda m: _weighted([curve, base], m, [1.0, -1.0]), pair, REPLICATES
        )
        lost = bootstrap(lambda m: regret(curve, base, m[0], m[1]), pair, REPLICATES)
        clipped = any(c.swept and c.optimum().at_edge for c in (curve, base))
        says = AT_EDGE if clipped and not math.isnan(lost.value) else regret_verdict(lost)
    decay = 2**point.log2_lr * curve.base_weight_decay * curve.train_steps
    return Optimum(
        *shape,
        seeds=curve.losses.shape[1],
        log2_lr=bootstrap_located(
            lambda m: curve.optimum(m[0]).located, [curve.losses], REPLICATES
        ),
        grid_log2_lr=float(x[point.grid_index]),
        grid_step=grid_step(x, point.grid_index),
        loss=best_loss(curve),
        at_edge=point.at_edge,
        drift=drift,
        regret=lost,
        regret_verdict=says,
        divergence_log2_lr=divergence(curve),
        flops=curve.flops,
        tau=1 / decay if decay else None,
    )


def grid_step(log2_lr: Array, index: int) -> float | None:
    """Octaves from a point of the grid to its nearer neighbour."""
    steps = np.diff(log2_lr)[max(0, index - 1) : index + 1]
    return float(steps.min()) if len(steps) else None


def _weighted(
    curves: Sequence[Curve], means: Sequence[Array], weights: Sequence[float]
) -> Estimate:
    """The weighted sum of the optima of mean curves, and between what values it may lie, each optimum being where its grid allows."""
    optima = [curve.optimum(mean).located for curve, mean in zip(curves, means, strict=True)]
    used = [(weight, optimum) for weight, optimum in zip(weights, optima, strict=True) if weight]
    return Estimate(
        sum(weight * optimum.value for weight, optimum in used),
        sum(min(weight * optimum.low, weight * optimum.high) for weight, optimum in used),
        sum(max(weight * optimum.low, weight * optimum.high) for weight, optimum in used),
    )


def drift_over_depth(curves: Sequence[Curve]) -> Drift:
    """Slope of the optimum's log2(lr) over log2(depth), octaves per doubling. curves: one family, one width, several depths."""
    depths = [math.log2(c.num_layers) for c in curves]
    # The least-squares slope is a weighted sum of the optima; its weights are the slopes over unit vectors.
    weights = [
        slope(depths, [float(i == j) for j in range(len(curves))]) for i in range(len(curves))
    ]
    estimate = bootstrap_located(
        lambda means: _weighted(curves, means, weights), [c.losses for c in curves], REPLICATES
    )
    clipped = any(c.optimum().at_edge for c in curves)
    first = curves[0]
    shape = (
        first.parameterization,
        first.hidden_size,
        first.train_steps,
        first.base_weight_decay,
        first.base_init_std,
    )
    return Drift(*shape, estimate, drift_verdict(estimate, clipped))


def drift_verdict(estimate: Estimate, at_edge: bool) -> str:
    """Only an interval wholly inside, or wholly outside, the band decides; an optimum at the edge of the grid never does."""
    if at_edge:
        return AT_EDGE
    if estimate.inside(-DRIFT_BAND, DRIFT_BAND):
        return "transfers"
    return "drifts" if estimate.outside(-DRIFT_BAND, DRIFT_BAND) else "unresolved"


def drifts(curves: Sequence[Curve]) -> list[Drift]:
    """One a rule, width and setting that has at least two depths."""
    groups: dict[tuple[Any, ...], list[Curve]] = {}
    for curve in curves:
        groups.setdefault((*curve.family, curve.hidden_size), []).append(curve)
    swept = [[c for c in group if c.swept] for group in groups.values()]
    return [
        drift_over_depth(sorted(group, key=lambda c: c.num_layers))
        for group in swept
        if len(group) > 1
    ]


def flops_to_reach(target: float, flops: Sequence[float], losses: Sequence[float]) -> float:
    """FLOPs at which a loss falls to `target`: linear in log(FLOPs) between measured lengths, and along the last two beyond them."""
    order = np.argsort(flops)
    x, y = (
        np.log(np.asarray(flops, dtype=np.float64)[order]),
        np.minimum.accumulate(np.asarray(losses, dtype=np.float64)[order]),
    )
    below = np.flatnonzero(y <= target)
    right = max(1, int(below[0])) if len(below) else len(x) - 1
    left = right - 1
    if y[left] == y[right]:
        return math.nan
    return float(np.exp(x[left] + (y[left] - target) / (y[left] - y[right]) * (x[right] - x[left])))


def savings(curves: Sequence[Curve], baseline: str) -> list[Saving]:
    """FLOPs to the loss that another reached in its longest runs: for every shape under both rules against the baseline, and under every
    rule for every shape against the shallowest one. Only of what was trained to at least two lengths."""
    found = []
    for setting in sorted({(c.base_weight_decay, c.base_init_std) for c in curves}):
        runs: dict[tuple[str, int, int], list[Curve]] = {}
        for c in sorted(curves, key=lambda c: (c.num_layers, c.hidden_size, c.train_steps)):
            if (c.base_weight_decay, c.base_init_std) == setting:
                runs.setdefault((c.parameterization, c.num_layers, c.hidden_size), []).append(c)
        for (rule, *shape), own in runs.items():
            shallowest = min(key for key in runs if key[0] == rule)
            others = [(baseline, *shape)] if rule != baseline else []
            others += [shallowest] if shallowest != (rule, *shape) else []
            against = [runs[other][-1] for other in others if other in runs and len(own) > 1]
            found += [
                _saving(own, longest)
                for longest in against
                if not any(longest.same_runs(c) for c in own)
            ]
    return found


def _saving(own: Sequence[Curve], longest: Curve) -> Saving:
    def percent(means: list[Array]) -> float:
        best = [c.optimum(m).loss for c, m in zip([*own, longest], means, strict=True)]
        return 100 * (
            1 - flops_to_reach(best[-1], [c.flops for c in own], best[:-1]) / longest.flops
        )

    estimate = bootstrap(percent, [c.losses for c in [*own, longest]], REPLICATES, of_level=True)
    verdict = "saves" if estimate.low > 0 else "costs" if estimate.high < 0 else "unresolved"
    if any(c.swept and c.optimum().at_edge for c in [*own, longest]):
        verdict = AT_EDGE
    one, other = own[0], longest
    shapes = (
        one.num_layers,
        one.hidden_size,
        other.parameterization,
        other.num_layers,
        other.hidden_size,
    )
    return Saving(one.parameterization, *shapes, estimate, verdict)


@dataclass(frozen=True)
class Analysis:
    """Everything a sweep says."""

    curves: list[Curve]
    optima: list[Optimum]
    drifts: list[Drift]
    savings: list[Saving]
    points_done: int
    points_missing: int

    def to_json(self) -> dict[str, Any]:
        """Plain values; learning rates as exponents of two, losses in nats."""
        plain = asdict(self)
        for curve in plain["curves"]:
            curve["log2_lr"], curve["losses"] = curve["log2_lr"].tolist(), curve["losses"].tolist()
        return plain


def analyse(folder: Path, baseline: str = "mup") -> Analysis:
    """Read a sweep's folder. DataError where no curve is complete."""
    points = sweep.load_points(folder)
    results = list(sweep.read_results(points, folder))
    curves = sorted(
        curves_of(results),
        key=lambda c: (
            c.base_weight_decay,
            c.parameterization,
            c.hidden_size,
            c.num_layers,
            c.train_steps,
        ),
    )
    if not curves:
        raise DataError(
            f"{folder}: no curve is complete for any seed; {len(results)} of {len(points)} points are done. Finish the sweep."
        )
    optima = [optimum_of(curve, base_curve(curve, curves)) for curve in curves]
    return Analysis(
        curves,
        optima,
        drifts(curves),
        savings(curves, baseline),
        len(results),
        len(points) - len(results),
    )

"""Learning-rate transfer: from the points of a sweep to optima, drift, regret and savings.

Optima are compared, not losses. A parabola in log2(lr) gives the best learning rate of each shape.
A bootstrap over seeds gives its interval, which is never narrower than the grid spacing allows. If
the interval does not decide, the verdict is "unresolved".
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from megatron_completep.errors import DataError
from megatron_completep.instruments import sweep
from megatron_completep.instruments.fits import (
    Array,
    Estimate,
    bootstrap,
    bootstrap_with_range,
    loss_at,
)
from megatron_completep.instruments.lr_curves import (
    REPLICATES,
    Curve,
    curves_of,
    order_of_shapes,
    setting_of,
    slope_of_optima,
    weighted_sum_of_optima,
)
from megatron_completep.instruments.lr_horizon import Horizon, Quality, horizons, qualities

# A mean loss this far above the best of its curve, or not finite, counts as diverged.
DIVERGENCE_NATS = 0.3
DRIFT_BAND = 0.15  # a drift of fewer octaves per doubling of depth counts as none
REGRET_BAND = 0.02  # a regret of up to this many nats is small
AT_EDGE = "unresolved: an optimum lies at the edge of the grid"
Say = Callable[[str], None]


@dataclass(frozen=True)
class CurveSummary:
    """The figures of one curve: its optimum, and its drift and regret against the base curve."""

    parameterization: str
    hidden_size: int
    num_layers: int
    train_steps: int
    base_weight_decay: float
    base_init_std: float
    seeds: int
    log2_lr: Estimate
    grid_log2_lr: float  # the grid's best point
    # Octaves from that point to its nearer neighbour; None if only one learning rate was run.
    grid_step: float | None
    loss: Estimate
    at_edge: bool
    drift: Estimate | None  # octaves from the base shape's optimum; None for the base shape itself
    # Extra loss in nats at the base shape's best learning rate; None for the base shape itself.
    regret: Estimate | None
    regret_verdict: str  # small | large | unresolved | not on the grid | base shape
    # The smallest learning rate above the optimum that diverged.
    divergence_log2_lr: float | None
    flops: float
    # AdamW's timescale as a fraction of the run (`completep.tau`), at the optimum.
    tau: float | None
    num_experts: int = 0
    expert_load: float | None = None  # at the grid's best point: the largest over the mean


@dataclass(frozen=True)
class Drift:
    """Drift of the optimum over depth under one parameterization, with its verdict."""

    parameterization: str
    hidden_size: int
    train_steps: int
    base_weight_decay: float
    base_init_std: float
    per_doubling: Estimate
    verdict: str  # transfers | drifts | unresolved


@dataclass(frozen=True)
class Saving:
    """How many percent fewer FLOPs a shape needs than a reference to reach the reference's loss.

    The reference is the same shape under another parameterization, or another shape under the same
    one. Its loss is that of its longest runs, at their best learning rate.
    """

    parameterization: str
    num_layers: int
    hidden_size: int
    against: str  # the reference's parameterization
    against_num_layers: int
    against_hidden_size: int
    percent: Estimate
    verdict: str  # saves | costs | unresolved
    num_experts: int = 0
    against_num_experts: int = 0


def base_curve(curve: Curve, curves: Sequence[Curve]) -> Curve:
    """The smallest shape of the same family: the least depth, then width, then experts."""
    members = [member for member in curves if member.family == curve.family]
    return min(members, key=order_of_shapes)


def regret(curve: Curve, base: Curve, mean: Array, base_mean: Array) -> float:
    """Loss of `curve` at the best learning rate of `base`, minus its loss at its own best one.

    mean, base_mean: the mean curves, or replicates of them. NaN if the curve's grid does not reach
    as far as the base's optimum.
    """
    optimum = curve.optimum(mean)
    base_optimum = base.optimum(base_mean)
    loss_at_base = loss_at(curve.log2_lr, mean, optimum, base_optimum.log2_lr)
    # np.maximum keeps NaN; with max() that would depend on the order of the arguments.
    return float(np.maximum(loss_at_base - optimum.loss, 0.0))


def regret_verdict(estimate: Estimate, at_edge: bool) -> str:
    """`small` or `large` only if the whole interval is on one side of REGRET_BAND.

    at_edge: whether an optimum lies at the edge of its grid. It may then lie beyond the grid, and
    the verdict is AT_EDGE, unless the regret has no value at all.
    """
    if math.isnan(estimate.value):
        return "not on the grid"
    if at_edge:
        return AT_EDGE
    if estimate.high <= REGRET_BAND:
        return "small"
    return "large" if estimate.low > REGRET_BAND else "unresolved"


def best_loss(curve: Curve) -> Estimate:
    """The loss at the optimum.

    The interval includes the part of the seed's effect that shifts the whole curve (its data and
    initial weights).
    """

    def loss_of_replicate(means: list[Array]) -> float:
        return curve.optimum(means[0]).loss

    return bootstrap(loss_of_replicate, [curve.losses], REPLICATES, include_shared_seed_effect=True)


def divergence(curve: Curve) -> float | None:
    """The smallest log2(lr) above the optimum that diverged, or None.

    There the mean loss is more than DIVERGENCE_NATS above the best, or not finite.
    """
    mean = curve.mean
    best = int(np.argmin(mean))
    highest_loss = mean[best] + DIVERGENCE_NATS
    for rate, loss in zip(curve.log2_lr[best:], mean[best:], strict=True):
        # `not <=` also catches NaN.
        if not loss <= highest_loss:
            return float(rate)
    return None


def summarize(curve: Curve, base: Curve) -> CurveSummary:
    """The figures of one curve, with intervals; drift and regret against the base shape's curve."""
    optimum = curve.optimum()

    def optimum_with_range(means: list[Array]) -> Estimate:
        return curve.optimum(means[0]).log2_lr_estimate

    drift: Estimate | None = None
    lost_nats: Estimate | None = None
    verdict = "base shape"
    if curve is not base:
        drift, lost_nats = _against_base(curve, base)
        at_edge = any(c.swept and c.optimum().at_edge for c in (curve, base))
        verdict = regret_verdict(lost_nats, at_edge)

    return CurveSummary(
        **setting_of(curve)._asdict(),
        seeds=curve.losses.shape[1],
        log2_lr=bootstrap_with_range(optimum_with_range, [curve.losses], REPLICATES),
        grid_log2_lr=float(curve.log2_lr[optimum.grid_index]),
        grid_step=grid_step(curve.log2_lr, optimum.grid_index),
        loss=best_loss(curve),
        at_edge=optimum.at_edge,
        drift=drift,
        regret=lost_nats,
        regret_verdict=verdict,
        divergence_log2_lr=divergence(curve),
        flops=curve.flops,
        tau=curve.tau_at(optimum.log2_lr),
        expert_load=curve.expert_loads[optimum.grid_index] if curve.expert_loads else None,
    )


def _against_base(curve: Curve, base: Curve) -> tuple[Estimate, Estimate]:
    """(drift in octaves, regret in nats) of a curve against its base shape."""
    losses = [curve.losses, base.losses]

    def drift(means: list[Array]) -> Estimate:
        return weighted_sum_of_optima([curve, base], means, [1.0, -1.0])

    def lost_nats(means: list[Array]) -> float:
        return regret(curve, base, means[0], means[1])

    return (
        bootstrap_with_range(drift, losses, REPLICATES),
        bootstrap(lost_nats, losses, REPLICATES),
    )


def grid_step(log2_lr: Array, index: int) -> float | None:
    """Octaves from a point of the grid to its nearer neighbour; None without one."""
    steps = np.diff(log2_lr)[max(0, index - 1) : index + 1]
    return float(steps.min()) if len(steps) else None


def drift_over_depth(curves: Sequence[Curve]) -> Drift:
    """The slope of the optimum's log2(lr) over log2(depth), in octaves per doubling.

    curves: of one family and one width, over several depths.
    """
    depths = [math.log2(curve.num_layers) for curve in curves]
    estimate = slope_of_optima(curves, depths)
    at_edge = any(curve.optimum().at_edge for curve in curves)
    shallowest = curves[0]
    return Drift(
        shallowest.parameterization,
        shallowest.hidden_size,
        shallowest.train_steps,
        shallowest.base_weight_decay,
        shallowest.base_init_std,
        estimate,
        drift_verdict(estimate, at_edge),
    )


def drift_verdict(estimate: Estimate, at_edge: bool) -> str:
    """`transfers` or `drifts` only if the whole interval is inside or outside of DRIFT_BAND.

    If an optimum is at the edge of its grid, the verdict is AT_EDGE.
    """
    if at_edge:
        return AT_EDGE
    if estimate.inside(-DRIFT_BAND, DRIFT_BAND):
        return "transfers"
    return "drifts" if estimate.outside(-DRIFT_BAND, DRIFT_BAND) else "unresolved"


def drifts(curves: Sequence[Curve]) -> list[Drift]:
    """One drift for every family, width and number of experts swept at two depths or more."""
    swept_curves: dict[tuple[Any, ...], list[Curve]] = {}
    for curve in curves:
        key = (*curve.family, curve.hidden_size, curve.num_experts)
        same_width = swept_curves.setdefault(key, [])
        if curve.swept:
            same_width.append(curve)
    results = []
    for same_width in swept_curves.values():
        if len(same_width) > 1:
            results.append(drift_over_depth(sorted(same_width, key=lambda c: c.num_layers)))
    return results


def flops_to_reach(target: float, flops: Sequence[float], losses: Sequence[float]) -> float:
    """FLOPs at which a loss falls to `target`.

    Interpolates linearly in log(FLOPs) between measured run lengths. Below the shortest or above
    the longest run length it extrapolates from the two nearest ones. NaN if the loss does not fall
    between the two points used.
    """
    order = np.argsort(flops)
    x = np.log(np.asarray(flops, dtype=np.float64)[order])
    # The lowest loss so far: what was reached stays reached if a longer run ends higher.
    y = np.minimum.accumulate(np.asarray(losses, dtype=np.float64)[order])
    reached = np.flatnonzero(y <= target)
    # If even the shortest run reached the target, the first two points extrapolate below it.
    after = max(1, int(reached[0])) if len(reached) else len(x) - 1
    before = after - 1
    if y[before] == y[after]:
        return math.nan
    fraction = (y[before] - target) / (y[before] - y[after])
    return float(np.exp(x[before] + fraction * (x[after] - x[before])))


class RunKey(NamedTuple):
    """A shape under one parameterization, trained to one or several lengths."""

    parameterization: str
    num_layers: int
    hidden_size: int
    num_experts: int


def savings(curves: Sequence[Curve], baseline: str) -> list[Saving]:
    """Savings of every shape that was trained for at least two run lengths.

    Each is compared with the same shape under the baseline, and with the shallowest shape under its
    own parameterization, by the FLOPs needed to reach the loss of the other's longest runs.
    """
    results = []
    for decay, std in sorted({(c.base_weight_decay, c.base_init_std) for c in curves}):
        runs = _runs_by_key(curves, decay, std)
        for key, own_curves in runs.items():
            # A single run length gives no curve of the loss over FLOPs.
            if len(own_curves) < 2:
                continue
            for reference_key in _compared_with(key, runs, baseline):
                reference = runs[reference_key][-1]
                # Skip: parameterizations that coincide at the base depth share their runs.
                if not any(reference.same_runs(curve) for curve in own_curves):
                    results.append(_saving(own_curves, reference))
    return results


def _runs_by_key(
    curves: Sequence[Curve], base_weight_decay: float, base_init_std: float
) -> dict[RunKey, list[Curve]]:
    """The curves of one base weight decay and initial std by key, each list by ascending length."""
    runs: dict[RunKey, list[Curve]] = {}
    for curve in sorted(curves, key=lambda c: (*order_of_shapes(c), c.train_steps)):
        same_decay = curve.base_weight_decay == base_weight_decay
        if same_decay and curve.base_init_std == base_init_std:
            key = RunKey(curve.parameterization, *order_of_shapes(curve))
            runs.setdefault(key, []).append(curve)
    return runs


def _compared_with(key: RunKey, runs: Iterable[RunKey], baseline: str) -> list[RunKey]:
    """Keys of the runs that `key` is compared with."""
    keys = list(runs)
    compared: list[RunKey] = []
    at_baseline = key._replace(parameterization=baseline)
    if at_baseline != key and at_baseline in keys:
        compared.append(at_baseline)
    same_one = [run for run in keys if run.parameterization == key.parameterization]
    shallowest = min(same_one, key=lambda run: run[1:])
    if shallowest != key:
        compared.append(shallowest)
    return compared


def _saving(own_curves: Sequence[Curve], reference: Curve) -> Saving:
    """The saving of one shape.

    own_curves: of the shape, by ascending run length. reference: the curve that the shape is
    compared with, at its longest run length.
    """
    curves = [*own_curves, reference]
    flops = [curve.flops for curve in own_curves]

    def percent(means: list[Array]) -> float:
        best_losses = [curve.optimum(mean).loss for curve, mean in zip(curves, means, strict=True)]
        needed = flops_to_reach(best_losses[-1], flops, best_losses[:-1])
        return 100 * (1 - needed / reference.flops)

    estimate = bootstrap(
        percent, [curve.losses for curve in curves], REPLICATES, include_shared_seed_effect=True
    )
    # If the optimum may lie beyond the grid, its loss is unknown.
    at_edge = any(curve.swept and curve.optimum().at_edge for curve in curves)
    shortest = own_curves[0]
    return Saving(
        shortest.parameterization,
        shortest.num_layers,
        shortest.hidden_size,
        reference.parameterization,
        reference.num_layers,
        reference.hidden_size,
        estimate,
        AT_EDGE if at_edge else _saving_verdict(estimate),
        shortest.num_experts,
        reference.num_experts,
    )


def _saving_verdict(estimate: Estimate) -> str:
    """`saves` or `costs` only if the whole interval is on one side of zero."""
    if estimate.low > 0:
        return "saves"
    return "costs" if estimate.high < 0 else "unresolved"


@dataclass(frozen=True)
class Analysis:
    """The curves of a sweep and all figures that follow from them."""

    curves: list[Curve]
    optima: list[CurveSummary]
    drifts: list[Drift]
    savings: list[Saving]
    horizons: list[Horizon]
    qualities: list[Quality]
    points_done: int
    points_missing: int

    def to_json(self) -> dict[str, Any]:
        """Plain values; learning rates as exponents of two, losses in nats."""
        fields = asdict(self)
        for curve in fields["curves"]:
            curve["log2_lr"] = curve["log2_lr"].tolist()
            curve["losses"] = curve["losses"].tolist()
        return fields


def analyse(folder: Path, baseline: str = "mup") -> Analysis:
    """Read and analyse a sweep's folder.

    baseline: the parameterization that savings are counted against.

    Raises DataError if the folder holds no sweep or no curve is complete.
    """
    points = sweep.load_points(folder)
    results = list(sweep.read_results(points, folder))
    curves = sorted(curves_of(results), key=_report_order)
    if not curves:
        raise DataError(
            f"{folder}: no curve is complete for any seed; "
            f"{len(results)} of {len(points)} points are done. Finish the sweep."
        )
    return analysis_of(curves, baseline, len(results), len(points) - len(results))


def analysis_of(curves: list[Curve], baseline: str, done: int, missing: int) -> Analysis:
    """All figures that follow from curves; done, missing: the points of their sweep."""
    optima = [summarize(curve, base_curve(curve, curves)) for curve in curves]
    return Analysis(
        curves,
        optima,
        drifts(curves),
        savings(curves, baseline),
        horizons(curves),
        qualities(curves),
        done,
        missing,
    )


def _report_order(curve: Curve) -> tuple[float, str, int, int, int, int]:
    return (
        curve.base_weight_decay,
        curve.parameterization,
        curve.hidden_size,
        curve.num_layers,
        curve.num_experts,
        curve.train_steps,
    )

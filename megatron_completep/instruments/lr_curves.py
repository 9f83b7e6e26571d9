"""The curves of a learning-rate sweep: loss over learning rate and seed, one curve a setting."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from megatron_completep.completep.batch import batch_scaling_of
from megatron_completep.instruments import fits, sweep
from megatron_completep.instruments.fits import (
    Array,
    Estimate,
    bootstrap_with_range,
    mean_curve,
    parabola_optimum,
    slope,
)

REPLICATES = 1000  # of a bootstrap over seeds


class Setting(NamedTuple):
    """What tells curves apart: the settings that all runs of one curve share."""

    parameterization: str
    hidden_size: int
    num_layers: int
    train_steps: int
    base_weight_decay: float
    base_init_std: float
    num_experts: int = 0  # 0: without any


class Family(NamedTuple):
    """The settings that a base shape and all shapes compared with it have in common."""

    parameterization: str
    train_steps: int
    base_weight_decay: float
    base_init_std: float


@dataclass(frozen=True)
class Curve:
    """Losses of one setting at every learning rate, for the seeds that completed all of them.

    The shape is the hidden size and the number of layers of the setting.
    """

    parameterization: str
    hidden_size: int
    num_layers: int
    train_steps: int
    base_weight_decay: float
    base_init_std: float
    log2_lr: Array  # [n] ascending
    losses: Array  # [n, seeds], infinite for a run that diverged
    flops: float  # of one run
    num_experts: int = 0
    # By learning rate, mean over seeds: `expert_load` of sweep.run_point. None without experts.
    expert_loads: Sequence[float] | None = None
    # log2 of S (completep.batch), by which the peak rate differs from the base rate of the grid.
    log2_scale: float = 0.0
    # By learning rate: the time scale of decay; infinite without decay. None: not known.
    taus: Sequence[float] | None = None

    @property
    def family(self) -> Family:
        """The settings that this curve shares with its base curve."""
        return Family(
            self.parameterization, self.train_steps, self.base_weight_decay, self.base_init_std
        )

    @property
    def mean(self) -> Array:
        """The mean over seeds [n], infinite if one diverged."""
        return mean_curve(self.losses)

    @property
    def swept(self) -> bool:
        """Whether there are learning rates to choose from."""
        return len(self.log2_lr) > 1

    def optimum(self, mean: Array | None = None) -> fits.Optimum:
        """The best learning rate of the mean curve, or of a replicate of it (`mean`)."""
        return parabola_optimum(self.log2_lr, self.mean if mean is None else mean)

    def tau_at(self, log2_lr: float) -> float | None:
        """The time scale of decay at a learning rate of the grid's range; None: none, or unknown.

        It is inverse to the rate, or the same at all rates, so a line in logarithms.
        """
        if self.taus is None or not np.isfinite(self.taus).all():
            return None
        return float(2 ** np.interp(log2_lr, self.log2_lr, np.log2(self.taus)))

    def same_runs(self, other: Curve) -> bool:
        """Whether both curves come from the same runs.

        Two parameterizations that coincide at the base depth share their runs.
        """
        as_other = setting_of(self)._replace(parameterization=other.parameterization)
        return (
            as_other == setting_of(other)
            and np.array_equal(self.log2_lr, other.log2_lr)
            and np.array_equal(self.losses, other.losses)
        )


def weighted_sum_of_optima(
    curves: Sequence[Curve], means: Sequence[Array], weights: Sequence[float]
) -> Estimate:
    """The weighted sum of the optima of mean curves, with the range that their grids allow."""
    terms = []
    for curve, mean, weight in zip(curves, means, weights, strict=True):
        # Skip: 0 * inf, from an optimum at the edge of its grid, would be NaN.
        if weight == 0:
            continue
        optimum = curve.optimum(mean).log2_lr_estimate
        # A negative weight swaps the ends of the range.
        ends = (weight * optimum.low, weight * optimum.high)
        terms.append(Estimate(weight * optimum.value, min(ends), max(ends)))
    total = sum(term.value for term in terms)
    low = sum(term.low for term in terms)
    high = sum(term.high for term in terms)
    return Estimate(total, low, high)


def slope_of_optima(curves: Sequence[Curve], sizes: Sequence[float]) -> Estimate:
    """The least-squares slope of the optima's log2(lr) over some size of the curves.

    The interval is over seeds, with the range that the grids allow.
    """
    # The slope is linear in y, so the weight of y_i is the slope for y = e_i.
    weights = [slope(sizes, unit) for unit in np.eye(len(curves)).tolist()]

    def weighted(means: list[Array]) -> Estimate:
        return weighted_sum_of_optima(curves, means, weights)

    return bootstrap_with_range(weighted, [curve.losses for curve in curves], REPLICATES)


def setting_of(record: Curve | sweep.Point) -> Setting:
    """The setting of a curve, or of the curve that a point belongs to."""
    return Setting(
        record.parameterization,
        record.hidden_size,
        record.num_layers,
        record.train_steps,
        record.base_weight_decay,
        record.base_init_std,
        record.num_experts,
    )


def shape_text(num_layers: int, hidden_size: int, num_experts: int) -> str:
    """A shape as reports name it: layers x width, and the number of experts where there are any."""
    shape = f"{num_layers} x {hidden_size}"
    return f"{shape}, {num_experts} experts" if num_experts else shape


def order_of_shapes(curve: Curve) -> tuple[int, int, int]:
    """A key that sorts shapes: by depth, then by width, then by the number of experts."""
    return curve.num_layers, curve.hidden_size, curve.num_experts


def curves_of(results: Iterable[tuple[sweep.Point, dict[str, Any]]]) -> list[Curve]:
    """Gather points into curves.

    A seed is used only if it has a run at every learning rate of its curve.
    """
    runs_by_setting: dict[Setting, dict[tuple[float, int], dict[str, Any]]] = {}
    scales: dict[Setting, float] = {}
    taus: dict[Setting, dict[float, float]] = {}
    for point, result in results:
        runs = runs_by_setting.setdefault(setting_of(point), {})
        runs[point.base_lr, point.seed] = result
        scales[setting_of(point)] = batch_scaling_of(point.config).scale
        taus.setdefault(setting_of(point), {})[point.base_lr] = point.tau

    curves = []
    for setting, runs in runs_by_setting.items():
        rates = sorted({rate for rate, _ in runs})
        # Averaging over different seeds at different learning rates would distort the curve.
        seeds = [seed for seed in _seeds_of(runs) if _is_complete(runs, rates, seed)]
        if not seeds:
            continue
        losses = np.empty((len(rates), len(seeds)))
        for row, rate in enumerate(rates):
            losses[row] = [sweep.loss_of(runs[rate, seed]) for seed in seeds]
        # A run that diverged ended early and has fewer FLOPs than the others.
        flops = max(result["flops"] for result in runs.values())
        curve = Curve(
            **setting._asdict(),
            log2_lr=np.log2(rates),
            losses=losses,
            flops=flops,
            expert_loads=_mean_loads(runs, rates, seeds),
            log2_scale=float(np.log2(scales[setting])),
            taus=[taus[setting][rate] for rate in rates],
        )
        curves.append(curve)
    return curves


def _mean_loads(
    runs: Mapping[tuple[float, int], Mapping[str, Any]],
    rates: Sequence[float],
    seeds: Sequence[int],
) -> list[float] | None:
    """The load of experts by learning rate; None where it was not measured."""
    means = []
    for rate in rates:
        loads: list[Any] = [runs[rate, seed].get("expert_load") for seed in seeds]
        if None in loads:
            return None
        means.append(float(np.mean(loads)))
    return means


def _seeds_of(runs: Iterable[tuple[float, int]]) -> list[int]:
    return sorted({seed for _, seed in runs})


def _is_complete(runs: Container[tuple[float, int]], rates: Sequence[float], seed: int) -> bool:
    return all((rate, seed) in runs for rate in rates)

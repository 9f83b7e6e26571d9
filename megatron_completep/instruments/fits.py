"""Lines, parabolas and intervals: the statistics of the instruments. Plain numpy; tested on curves whose answers are known.

Learning rates are in octaves (log2), losses in nats.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]

# Two-sided 95 % quantiles of Student's t by degrees of freedom; beyond the table the normal one.
_T_95 = (
    12.706,
    4.303,
    3.182,
    2.776,
    2.571,
    2.447,
    2.365,
    2.306,
    2.262,
    2.228,
    2.201,
    2.179,
    2.160,
    2.145,
    2.131,
    2.120,
    2.110,
    2.101,
    2.093,
)


def t_95(degrees: int) -> float:
    """The factor of the 95 % interval of a mean; infinite for one value."""
    if degrees < 1:
        return math.inf
    return _T_95[degrees - 1] if degrees <= len(_T_95) else 1.96 + 2.6 / degrees


@dataclass(frozen=True)
class Estimate:
    """A value with its 95 % interval; without repetitions the interval is the whole line."""

    value: float
    low: float
    high: float

    def inside(self, low: float, high: float) -> bool:
        """Whether the whole interval lies in a band."""
        return low <= self.low and self.high <= high

    def outside(self, low: float, high: float) -> bool:
        """Whether the whole interval lies beyond one side of a band."""
        return self.high < low or self.low > high

    @property
    def repeated(self) -> bool:
        """Whether there were repetitions, of which an interval could be made."""
        return self.low > -math.inf or self.high < math.inf

    def wider_than(self, width: float) -> bool:
        """Whether the interval is wider than that."""
        return not self.high - self.low <= width

    def __str__(self) -> str:
        if not self.repeated:
            return f"{self.value:+.3f}"
        return f"{self.value:+.3f} [{self.low:+.3f}, {self.high:+.3f}]"


def mean_estimate(values: Sequence[float]) -> Estimate:
    """Mean of independent repetitions with Student's interval."""
    mean = float(np.mean(values))
    if len(values) < 2 or not math.isfinite(mean):
        return Estimate(mean, -math.inf, math.inf)
    half = t_95(len(values) - 1) * float(np.std(values, ddof=1)) / math.sqrt(len(values))
    return Estimate(mean, mean - half, mean + half)


def slope(x: Sequence[float], y: Sequence[float]) -> float:
    """Slope of the least-squares line; not a number with fewer than two points or with a value that is none."""
    a, b = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    if len(a) < 2 or not np.isfinite(b).all():
        return math.nan
    a = a - a.mean()
    return float((a * b).sum() / (a * a).sum())


def log_log_slope(x: Sequence[float], y: Sequence[float]) -> float:
    """Exponent p of y ~ x^p; infinite where a value is not finite (it diverged), nan where one is zero."""
    if not np.isfinite(np.asarray(y, dtype=np.float64)).all():
        return math.inf
    if min(y) <= 0:
        return math.nan
    return slope(np.log(x).tolist(), np.log(y).tolist())


@dataclass(frozen=True)
class Optimum:
    """The best learning rate of one curve."""

    log2_lr: float  # the vertex of the parabola, or the grid's best point where there is none
    loss: float
    grid_index: int  # the grid's best point
    at_edge: bool  # the grid's best point is its first or last: the optimum may lie beyond
    fit: tuple[float, float, float] | None = (
        None  # a, b, c of a x^2 + b x + c, x in octaves from the grid's best point
    )
    near: tuple[float, float] = (0.0, 0.0)  # the log2(lr) between which the parabola was fitted
    between: tuple[float, float] = (
        -math.inf,
        math.inf,
    )  # log2(lr): where the optimum may lie for all that this grid says

    @property
    def located(self) -> Estimate:
        """The best learning rate, and what the grid leaves open of it."""
        return Estimate(self.log2_lr, *self.between)


def parabola_optimum(
    log2_lr: Array, loss: Array, reach: float = 1.5, rise: float = 0.15
) -> Optimum:
    """Least-squares parabola through the points within `reach` octaves and `rise` nats of the best one, its vertex held inside them.

    log2_lr [n] ascending, loss [n] with infinities where runs diverged. Farther than that, curves are not parabolas: they flatten
    towards small learning rates and rise steeply where training breaks.

    What the grid leaves open: a curve with one valley has its optimum between the neighbours of the grid's best point, and beyond the
    grid where that is its end. A parabola through three points, which fits in any case, halves that; only more points can tell that
    the curve is one, and then its vertex counts.
    """
    best = int(np.nanargmin(np.where(np.isfinite(loss), loss, np.inf)))
    edge = best in (0, len(loss) - 1)
    below = float(log2_lr[best - 1]) if best > 0 else -math.inf
    above = float(log2_lr[best + 1]) if best < len(loss) - 1 else math.inf
    near = (np.abs(log2_lr - log2_lr[best]) <= reach + 1e-9) & (loss <= loss[best] + rise)
    x, y = log2_lr[near] - log2_lr[best], loss[near]
    unfitted = Optimum(float(log2_lr[best]), float(loss[best]), best, edge, between=(below, above))
    if len(x) < 3:
        return unfitted
    powers = np.stack([x**2, x, np.ones_like(x)])
    a, b, c = (float(coefficient) for coefficient in np.linalg.solve(powers @ powers.T, powers @ y))
    if a <= 0:
        return unfitted
    vertex = float(np.clip(-b / (2 * a), x.min(), x.max()))
    ends = float(log2_lr[best] + x.min()), float(log2_lr[best] + x.max())
    at = float(log2_lr[best] + vertex)
    between = (at, at)
    if edge or not x.min() < vertex < x.max():
        between = min(below, at), max(above, at)
    elif len(x) == 3:
        middle = float(log2_lr[best])
        between = min((below + middle) / 2, at), max((above + middle) / 2, at)
    return Optimum(at, a * vertex**2 + b * vertex + c, best, edge, (a, b, c), ends, between)


def loss_at(log2_lr: Array, loss: Array, optimum: Optimum, at: float) -> float:
    """Loss at a learning rate between the points: on the optimum's parabola where that was fitted, else on the straight line between
    two neighbours; nan outside the grid."""
    if optimum.fit is not None and optimum.near[0] <= at <= optimum.near[1]:
        a, b, c = optimum.fit
        x = at - log2_lr[optimum.grid_index]
        return float(a * x**2 + b * x + c)
    return float(np.interp(at, log2_lr, loss, left=np.nan, right=np.nan))


def resampled(losses: Array, generator: np.random.Generator, of_level: bool = False) -> Array:
    """One bootstrap replicate of the mean curve, [n] from losses [n, seeds].

    What all runs of a seed share (its data and initial weights) moves no optimum and stays as it was, unless the statistic is of the
    curve's level (`of_level`); the rest is drawn from the residuals of the whole curve, pooled so that three seeds suffice, about the
    observed means. Points where a seed diverged stay infinite.
    """
    points, seeds = losses.shape
    finite, mean = _finite_rows(losses), mean_curve(losses)
    rows = int(finite.sum())
    if seeds < 2 or rows == 0:
        return mean
    kept = losses[finite]
    shared = kept.mean(axis=0) - kept.mean()
    drawn = np.zeros(points)
    if rows > 1:
        residuals = kept - kept.mean(axis=1, keepdims=True) - shared
        scale = math.sqrt(rows * seeds / ((rows - 1) * (seeds - 1)))
        drawn += generator.choice(residuals.ravel() * scale, size=(points, seeds)).mean(axis=1)
    if of_level:
        drawn += generator.choice(shared * math.sqrt(seeds / (seeds - 1)), size=seeds).mean()
    return np.where(finite, mean + drawn, np.inf)


def bootstrap(
    statistic: Callable[[list[Array]], float],
    curves: Sequence[Array],
    replicates: int = 1000,
    seed: int = 0,
    of_level: bool = False,
) -> Estimate:
    """A statistic of several mean curves with its percentile interval; curves [n, seeds] each, resampled independently.

    With one seed there is nothing to resample, and the interval is the whole line.
    """

    def exact(means: list[Array]) -> Estimate:
        value = statistic(means)
        return Estimate(value, value, value)

    return bootstrap_located(exact, curves, replicates, seed, of_level)


def bootstrap_located(
    statistic: Callable[[list[Array]], Estimate],
    curves: Sequence[Array],
    replicates: int = 1000,
    seed: int = 0,
    of_level: bool = False,
) -> Estimate:
    """As `bootstrap`, of a statistic that says itself between which values it may lie: the interval is never narrower than that."""
    point = statistic([mean_curve(curve) for curve in curves]).value
    if any(curve.shape[1] < 2 for curve in curves):
        return Estimate(point, -math.inf, math.inf)
    generator = np.random.default_rng(seed)
    drawn = [
        statistic([resampled(curve, generator, of_level) for curve in curves])
        for _ in range(replicates)
    ]
    known = [one for one in drawn if math.isfinite(one.value)]
    if len(known) < replicates / 2:
        return Estimate(point, -math.inf, math.inf)
    return Estimate(
        point,
        _quantile([one.low for one in known], 0.025),
        _quantile([one.high for one in known], 0.975),
    )


def _quantile(values: Sequence[float], share: float) -> float:
    """Outward to the next value where some are infinite, between which nothing can be interpolated."""
    if np.isfinite(values).all():
        return float(np.quantile(values, share))
    return float(
        np.quantile(values, share, method="lower")
        if share < 0.5
        else np.quantile(values, share, method="higher")
    )


def mean_curve(losses: Array) -> Array:
    """Mean over seeds [n] of losses [n, seeds], infinite where one diverged."""
    finite = _finite_rows(losses)
    return np.where(finite, np.where(finite[:, np.newaxis], losses, 0.0).mean(axis=1), np.inf)


def _finite_rows(losses: Array) -> npt.NDArray[np.bool_]:
    return np.array([bool(np.isfinite(row).all()) for row in losses], dtype=np.bool_)

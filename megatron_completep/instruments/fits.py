"""The statistics of the instruments: lines, parabolas, and intervals by Student's t and bootstrap.

Learning rates are in octaves (log2), losses in nats. Tested on curves whose answers are known.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]

# Two-sided 95 % quantiles of Student's t for 1, 2, ... degrees of freedom.
_T_95 = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228,
    2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093,
)  # fmt: skip


def t_95(degrees: int) -> float:
    """The factor of the 95 % interval of a mean, by degrees of freedom; infinite for one value."""
    if degrees < 1:
        return math.inf
    if degrees <= len(_T_95):
        return _T_95[degrees - 1]
    # The normal quantile, with the first term of its correction for finite degrees.
    return 1.96 + 2.6 / degrees


@dataclass(frozen=True)
class Estimate:
    """A value with its 95 % interval, which is the whole line where there are no repetitions."""

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
        """Whether there were repetitions, so that an interval could be computed."""
        return self.low > -math.inf or self.high < math.inf

    def wider_than(self, width: float) -> bool:
        """Whether the interval is wider than `width`; an interval without numbers is."""
        return not self.high - self.low <= width

    def __str__(self) -> str:
        if not self.repeated:
            return f"{self.value:+.3f}"
        return f"{self.value:+.3f} [{self.low:+.3f}, {self.high:+.3f}]"


def mean_estimate(values: Sequence[float]) -> Estimate:
    """The mean of independent repetitions with Student's interval."""
    mean = float(np.mean(values))
    count = len(values)
    if count < 2 or not math.isfinite(mean):
        return Estimate(mean, -math.inf, math.inf)
    standard_error = float(np.std(values, ddof=1)) / math.sqrt(count)
    half_width = t_95(count - 1) * standard_error
    return Estimate(mean, mean - half_width, mean + half_width)


def slope(x: Sequence[float], y: Sequence[float]) -> float:
    """The slope of the least-squares line.

    NaN where there are fewer than two points, or where a y is not finite.
    """
    x_array = np.asarray(x, dtype=np.float64)
    y_array = np.asarray(y, dtype=np.float64)
    if len(x_array) < 2 or not np.isfinite(y_array).all():
        return math.nan
    # With centred x the mean of y drops out of the numerator.
    centred = x_array - x_array.mean()
    return float((centred * y_array).sum() / (centred * centred).sum())


def log_log_slope(x: Sequence[float], y: Sequence[float]) -> float:
    """The exponent p of y ~ x^p.

    Infinite where a y is not finite (the run diverged), NaN where one is zero.
    """
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
    # a, b, c of a x^2 + b x + c, with x in octaves from the grid's best point.
    fit: tuple[float, float, float] | None = None
    near: tuple[float, float] = (0.0, 0.0)  # the log2(lr) between which the parabola was fitted
    # The log2(lr) between which this grid allows the optimum to lie.
    between: tuple[float, float] = (-math.inf, math.inf)

    @property
    def log2_lr_estimate(self) -> Estimate:
        """The best learning rate, with the range that the grid leaves open as its interval."""
        return Estimate(self.log2_lr, *self.between)


def parabola_optimum(
    log2_lr: Array, loss: Array, reach: float = 1.5, rise: float = 0.15
) -> Optimum:
    """The vertex of a least-squares parabola through the points near the best one.

    log2_lr [n] ascending, loss [n] with infinities where runs diverged. Near are the points within
    `reach` octaves and `rise` nats of the best one: farther away, curves are not parabolas, since
    they flatten towards small learning rates and rise steeply where training breaks. The vertex is
    clipped to the range of these points.
    """
    best = int(np.nanargmin(np.where(np.isfinite(loss), loss, np.inf)))
    last_index = len(loss) - 1
    at_edge = best in (0, last_index)
    grid_best = float(log2_lr[best])
    neighbours = (
        float(log2_lr[best - 1]) if best > 0 else -math.inf,
        float(log2_lr[best + 1]) if best < last_index else math.inf,
    )
    unfitted = Optimum(grid_best, float(loss[best]), best, at_edge, between=neighbours)

    # The margin takes in points whose distance is `reach` up to rounding.
    in_reach = np.abs(log2_lr - log2_lr[best]) <= reach + 1e-9
    near = in_reach & (loss <= loss[best] + rise)
    # Octaves from the best point: numbers round zero keep the normal equations well conditioned.
    x = log2_lr[near] - log2_lr[best]
    if len(x) < 3:
        return unfitted
    fit = _parabola(x, loss[near])
    a, b, c = fit
    if a <= 0:
        return unfitted

    vertex = float(np.clip(-b / (2 * a), x.min(), x.max()))
    optimum = float(log2_lr[best] + vertex)
    clipped = not x.min() < vertex < x.max()
    between = _open_range(optimum, grid_best, neighbours, at_edge or clipped, len(x))
    ends = (float(log2_lr[best] + x.min()), float(log2_lr[best] + x.max()))
    lowest_loss = a * vertex**2 + b * vertex + c
    return Optimum(optimum, lowest_loss, best, at_edge, fit, ends, between)


def _parabola(x: Array, y: Array) -> tuple[float, float, float]:
    """The coefficients a, b, c of the least-squares parabola a x^2 + b x + c."""
    powers = np.stack([x**2, x, np.ones_like(x)])
    # The normal equations of a fit with three unknowns.
    a, b, c = np.linalg.solve(powers @ powers.T, powers @ y)
    return float(a), float(b), float(c)


def _open_range(
    optimum: float,
    grid_best: float,
    neighbours: tuple[float, float],
    outermost: bool,
    point_count: int,
) -> tuple[float, float]:
    """The log2(lr) between which the grid allows a parabola's vertex, `optimum`, to lie.

    outermost: the grid's best point is an end of the grid, or the vertex an end of the fitted
    points. point_count: of the points through which the parabola was fitted.

    A curve with one valley has its optimum between the neighbours of the grid's best point, and
    beyond the grid where that point is its end. A parabola through three points, which always
    exists, halves that range. Only more points can show that the curve is a parabola, and then the
    vertex stands alone.
    """
    below, above = neighbours
    if outermost:
        return min(below, optimum), max(above, optimum)
    if point_count == 3:
        half_below = (below + grid_best) / 2
        half_above = (above + grid_best) / 2
        return min(half_below, optimum), max(half_above, optimum)
    return optimum, optimum


def loss_at(log2_lr: Array, loss: Array, optimum: Optimum, at: float) -> float:
    """The loss at a learning rate `at` (log2) between the points of the grid.

    It is read off the optimum's parabola where that was fitted, else off the straight line between
    two neighbours; NaN outside the grid.
    """
    if optimum.fit is not None and optimum.near[0] <= at <= optimum.near[1]:
        a, b, c = optimum.fit
        x = at - log2_lr[optimum.grid_index]
        return float(a * x**2 + b * x + c)
    return float(np.interp(at, log2_lr, loss, left=np.nan, right=np.nan))


def resampled(
    losses: Array, generator: np.random.Generator, include_shared_seed_effect: bool = False
) -> Array:
    """One bootstrap replicate of the mean curve, [n] from losses [n, seeds].

    What all runs of a seed share (its data and initial weights) moves no optimum and stays as it
    was, unless the statistic is of the curve's level (`include_shared_seed_effect`). What remains
    is drawn about the observed means from the residuals of the whole curve, pooled so that three
    seeds suffice. Points where a seed diverged stay infinite.
    """
    points, seeds = losses.shape
    finite = _finite_rows(losses)
    mean = mean_curve(losses)
    finite_losses = losses[finite]
    rows = len(finite_losses)
    if seeds < 2 or rows == 0:
        return mean

    shared = finite_losses.mean(axis=0) - finite_losses.mean()
    noise = np.zeros(points)
    if rows > 1:
        row_means = finite_losses.mean(axis=1, keepdims=True)
        residuals = finite_losses - row_means - shared
        # Fitted row and column means took degrees of freedom, so residuals are too small.
        degrees = (rows - 1) * (seeds - 1)
        scaled = residuals.ravel() * math.sqrt(rows * seeds / degrees)
        noise += generator.choice(scaled, size=(points, seeds)).mean(axis=1)
    if include_shared_seed_effect:
        # One draw a seed for the whole curve, likewise scaled for the mean that was subtracted.
        scaled_shared = shared * math.sqrt(seeds / (seeds - 1))
        noise += generator.choice(scaled_shared, size=seeds).mean()
    return np.where(finite, mean + noise, np.inf)


def bootstrap(
    statistic: Callable[[list[Array]], float],
    curves: Sequence[Array],
    replicates: int = 1000,
    seed: int = 0,
    include_shared_seed_effect: bool = False,
) -> Estimate:
    """A statistic of several mean curves with its percentile interval.

    curves [n, seeds] each, resampled independently. With one seed there is nothing to resample, and
    the interval is the whole line.
    """

    def exact(means: list[Array]) -> Estimate:
        point = statistic(means)
        return Estimate(point, point, point)

    return bootstrap_with_range(exact, curves, replicates, seed, include_shared_seed_effect)


def bootstrap_with_range(
    statistic: Callable[[list[Array]], Estimate],
    curves: Sequence[Array],
    replicates: int = 1000,
    seed: int = 0,
    include_shared_seed_effect: bool = False,
) -> Estimate:
    """As `bootstrap`, for a statistic that gives a range with its value.

    The interval is never narrower than that range.
    """
    point = statistic([mean_curve(curve) for curve in curves]).value
    unknown = Estimate(point, -math.inf, math.inf)
    if any(curve.shape[1] < 2 for curve in curves):
        return unknown

    generator = np.random.default_rng(seed)
    estimates = []
    for _ in range(replicates):
        means = [resampled(curve, generator, include_shared_seed_effect) for curve in curves]
        estimate = statistic(means)
        # A replicate without a value (an optimum off the other's grid) says nothing of the range.
        if math.isfinite(estimate.value):
            estimates.append(estimate)
    if len(estimates) < replicates / 2:
        return unknown
    low = _quantile([estimate.low for estimate in estimates], 0.025)
    high = _quantile([estimate.high for estimate in estimates], 0.975)
    return Estimate(point, low, high)


def _quantile(values: Sequence[float], share: float) -> float:
    """The quantile at `share`, rounded outward to one of the values where some are infinite."""
    if np.isfinite(values).all():
        return float(np.quantile(values, share))
    # Nothing can be interpolated between a finite and an infinite value.
    if share < 0.5:
        return float(np.quantile(values, share, method="lower"))
    return float(np.quantile(values, share, method="higher"))


def mean_curve(losses: Array) -> Array:
    """The mean over seeds [n] of losses [n, seeds], infinite where one diverged."""
    finite = _finite_rows(losses)
    # Zeros in place of infinities, for the mean of infinities may be NaN.
    filled = np.where(finite[:, np.newaxis], losses, 0.0)
    return np.where(finite, filled.mean(axis=1), np.inf)


def _finite_rows(losses: Array) -> npt.NDArray[np.bool_]:
    """Which rows of losses [n, seeds] are finite for every seed."""
    return np.array([bool(np.isfinite(row).all()) for row in losses], dtype=np.bool_)

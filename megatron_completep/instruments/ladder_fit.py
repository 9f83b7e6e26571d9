"""The law of a ladder, L(C) = E + A C^-a, and what it forecasts, with honest intervals.

The interval is a parametric bootstrap: losses are drawn about the fitted law with the noise that
the seeds showed, whose own uncertainty is drawn, too. It holds if the law does, which is tested
against the same noise.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_completep.errors import DataError
from megatron_completep.instruments.fits import Array, Estimate

LEAST_RUNGS = 4  # the law has three unknowns
WIDEST = 0.05  # nats: a forecast with a wider interval is no answer
MISFIT = 0.01  # a law with a smaller chance of such residuals is none
REPLICATES = 1000
EXPONENTS = np.geomspace(0.01, 2.0, 200)


@dataclass(frozen=True)
class Law:
    """E + A (C / C0)^-a. C0, the geometric mean of the rungs' FLOPs, keeps A a loss."""

    floor: float  # E, nats
    scale: float  # A, nats
    exponent: float  # a
    unit: float  # C0, FLOPs

    def loss(self, flops: float) -> float:
        """Nats per token of a run of so many FLOPs."""
        return float(self.floor + self.scale * (flops / self.unit) ** -self.exponent)


@dataclass(frozen=True)
class Noise:
    """Standard deviation of one run's loss over seeds, pooled over rungs; degrees of freedom."""

    sigma: float
    degrees: int


@dataclass(frozen=True)
class Fit:
    """A law with what its forecasts need.

    n: of bootstrap replicates. misfit: the chance of residuals as large as these, were the law
    true.
    """

    flops: Array  # [rungs]
    means: Array  # [rungs], over seeds
    counts: Array  # [rungs], seeds
    noise: Noise
    law: Law
    misfit: float
    replicates: tuple[Array, Array, Array]  # E, A, a [n] of the bootstrap
    sigmas: Array  # [n] of the noise

    @property
    def residuals(self) -> Array:
        """Measured minus law [rungs], nats."""
        law_losses = [self.law.loss(flops) for flops in self.flops]
        return np.asarray(self.means - law_losses)

    @property
    def broken(self) -> bool:
        """Whether the rungs lie off every such law by more than the noise of seeds explains."""
        return self.misfit < MISFIT

    def forecast(self, flops: float, seeds: int = 0, seed: int = 0) -> Estimate:
        """The loss at `flops`, with its 95 % interval.

        seeds: the interval is of the mean of so many runs, with their own noise; 0: of the law.
        """
        value = self.law.loss(flops)
        if self.noise.degrees < 1:
            return Estimate(value, -math.inf, math.inf)
        floors, scales, exponents = self.replicates
        drawn = floors + scales * (flops / self.law.unit) ** -exponents
        if seeds:
            generator = np.random.default_rng(seed)
            drawn = drawn + self.sigmas / math.sqrt(seeds) * generator.standard_normal(len(drawn))
        low, high = np.quantile(drawn, (0.025, 0.975))
        # Where E is near 0, which it cannot pass, replicates fall to one side of the law although
        # the law may be off to both.
        distance = max(value - low, high - value)
        return Estimate(value, float(value - distance), float(value + distance))

    def verdict(self, forecast: Estimate) -> str:
        """`forecast`, or why it is none: `no power law` or `unresolved`."""
        if self.broken:
            return "no power law"
        return "unresolved" if forecast.wider_than(WIDEST) else "forecast"


def pooled_noise(losses: Sequence[Sequence[float]]) -> Noise:
    """The noise of one run, from the losses of every rung's seeds."""
    squares = 0.0
    degrees = 0
    for rung in losses:
        squares += float(np.var(rung)) * len(rung)
        degrees += len(rung) - 1
    return Noise(math.sqrt(squares / degrees) if degrees else math.nan, degrees)


def fit(
    flops: Sequence[float],
    losses: Sequence[Sequence[float]],
    seed: int = 0,
    replicates: int = REPLICATES,
) -> Fit:
    """The law through the rungs' mean losses, weighted by their numbers of seeds.

    flops: of one run a rung. losses: of its seeds. Raises DataError for fewer rungs than the law
    needs, and for a loss that is no number.
    """
    if len(flops) < LEAST_RUNGS:
        raise DataError(
            f"{len(flops)} rungs give no law of three unknowns: finish at least {LEAST_RUNGS}."
        )
    if not all(np.isfinite(rung).all() for rung in losses):
        raise DataError(
            "a run of the ladder diverged, so that its rung has no loss. "
            "Tune the proxy's learning rate lower, and plan again."
        )
    x = np.asarray(flops, dtype=np.float64)
    means = np.array([float(np.mean(rung)) for rung in losses])
    counts = np.array([len(rung) for rung in losses], dtype=np.float64)
    noise = pooled_noise(losses)
    unit = float(np.exp(np.log(x).mean()))
    solver = _Solver(x / unit, counts)
    values, squares = solver.solve(means[np.newaxis])
    law = Law(float(values[0][0]), float(values[1][0]), float(values[2][0]), unit)

    if noise.degrees < 1:
        return Fit(x, means, counts, noise, law, 1.0, values, np.full(1, math.nan))
    generator = np.random.default_rng(seed)
    # What the noise may be, given what it was measured to be on few degrees of freedom.
    spread = generator.chisquare(noise.degrees, replicates) / noise.degrees
    sigmas = noise.sigma / np.sqrt(spread)
    drawn = generator.standard_normal((replicates, len(x))) / np.sqrt(counts)
    centres = np.array([law.loss(flops) for flops in x])
    refitted, squares_drawn = solver.solve(centres + sigmas[:, np.newaxis] * drawn)
    # In units of a noise that is measured anew each time, as the rungs' own was.
    measured = sigmas**2 * generator.chisquare(noise.degrees, replicates) / noise.degrees
    drawn_ratios = squares_drawn / np.maximum(measured, np.finfo(float).tiny)
    misfit = _share_above(drawn_ratios, squares[0], noise)
    return Fit(x, means, counts, noise, law, misfit, refitted, sigmas)


def _share_above(drawn: Array, squares: float, noise: Noise) -> float:
    # Equal seeds have no noise to compare with: the grid's rounding is no misfit.
    if noise.sigma == 0:
        return 1.0
    return float(np.mean(drawn >= squares / noise.sigma**2))


class _Solver:
    """Least squares for many sets of losses on the same rungs.

    For a given exponent the law is linear in E and A, so the exponent is searched on a grid, and
    the rest solved exactly: with E >= 0, for a loss has no negative floor.
    """

    def __init__(self, x: Array, weights: Array) -> None:
        self.weights = weights
        self.columns = x[np.newaxis] ** -EXPONENTS[:, np.newaxis]  # [exponents, rungs]

    def solve(self, losses: Array) -> tuple[tuple[Array, Array, Array], Array]:
        """((E, A, a) [n] each, the weighted squares left over [n]) of losses [n, rungs]."""
        w = self.weights
        columns = self.columns
        column_means = columns @ w / w.sum()
        loss_means = losses @ w / w.sum()
        centred = columns - column_means[:, np.newaxis]
        centred_losses = losses - loss_means[:, np.newaxis]
        # Slopes and floors of the straight lines over C^-a: [n, exponents].
        products = (centred_losses * w) @ centred.T
        scales = products / (centred**2 @ w)
        floors = loss_means[:, np.newaxis] - scales * column_means
        squares = (centred_losses**2 @ w)[:, np.newaxis] - scales * products
        # The same without a floor.
        products = (losses * w) @ columns.T
        scales_alone = products / (columns**2 @ w)
        squares_alone = (losses**2 @ w)[:, np.newaxis] - scales_alone * products

        negative = floors < 0
        scales = np.where(negative, scales_alone, scales)
        squares = np.where(negative, squares_alone, squares)
        floors = np.where(negative, 0.0, floors)
        # A loss that rises with compute is no law of this kind.
        squares = np.where(scales > 0, squares, np.inf)
        best = squares.argmin(axis=1)
        rows = np.arange(len(losses))
        parameters = (floors[rows, best], scales[rows, best], EXPONENTS[best])
        return parameters, squares[rows, best]

"""The law of a ladder, L(C) = E + A C^-a, and what it forecasts, with honest intervals.

The interval is a parametric bootstrap: losses are drawn about the fitted law with the noise that
the seeds showed, whose own uncertainty is drawn, too. It holds if the law does, which is tested
against the same noise.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from megatron_completep.errors import DataError
from megatron_completep.instruments.fits import Array, Estimate

LEAST_RUNGS = 4  # the law has three unknowns
WIDEST = 0.05  # nats: a forecast with a wider interval is no answer
MISFIT = 0.01  # a law with a smaller chance of such residuals is none
REPLICATES = 1000
EXPONENTS = np.geomspace(0.01, 2.0, 200)
BySeed = Mapping[int, float]  # losses of one rung's runs, by the number of the seed


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
    """Of one run's loss, as the seeds show it.

    What a seed does to all rungs alike (its order of the data and its weights) is told apart from
    the rest. sigma: standard deviation of the rest, on so many degrees of freedom. shared: that of
    the seeds' effects, which are 0 in the mean.
    """

    sigma: float
    degrees: int
    shared: float = 0.0
    effects: dict[int, float] = field(default_factory=dict)  # by the seed's number


@dataclass(frozen=True)
class Fit:
    """A law with what its forecasts need.

    n: of bootstrap replicates. misfit: the chance of residuals as large as these, were the law
    true.
    """

    flops: Array  # [rungs]
    means: Array  # [rungs], at the average seed
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
        """Whether losses do not fall, or lie off every law by more than the noise explains."""
        return self.misfit < MISFIT or self.law.scale <= 0

    def forecast(self, flops: float, seeds: int = 0) -> Estimate:
        """The loss at `flops`, with its 95 % interval.

        seeds: the interval is of the mean of so many runs with seeds of their own; 0: of the law.
        """
        noise = self.noise
        # The rungs' seeds are a sample of all seeds, and so are those of the run.
        shared = noise.shared**2 / max(1, len(noise.effects))
        if not seeds:
            return self._interval(flops, 0.0, 0.0, shared)
        return self._interval(flops, 0.0, 1 / seeds, shared + noise.shared**2 / seeds)

    def forecast_of(self, flops: float, seeds: Sequence[int]) -> Estimate:
        """The mean loss at `flops` of these seeds, of which the rungs show the effects."""
        count = len(seeds)
        effects = [self.noise.effects[seed] for seed in seeds if seed in self.noise.effects]
        shared = (count - len(effects)) * (self.noise.shared / count) ** 2
        return self._interval(flops, sum(effects) / count, 1 / count, shared)

    def _interval(self, flops: float, shift: float, runs: float, shared: float) -> Estimate:
        """The law's loss plus `shift`.

        runs, shared: variances beside the law's own, in units of the noise's and in nats squared.
        """
        value = self.law.loss(flops) + shift
        if self.noise.degrees < 1:
            return Estimate(value, -math.inf, math.inf)
        floors, scales, exponents = self.replicates
        drawn = floors + scales * (flops / self.law.unit) ** -exponents + shift
        generator = np.random.default_rng(0)
        deviations = generator.standard_normal(len(drawn))
        # What a seed does is known of a few seeds alone, and its spread as badly.
        degrees = max(1, len(self.noise.effects) - 1)
        spread = generator.chisquare(degrees, len(drawn)) / degrees
        drawn = drawn + np.sqrt(runs * self.sigmas**2 + shared / spread) * deviations
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


def means_and_noise(losses: Sequence[BySeed]) -> tuple[Array, Noise]:
    """The rungs' losses at the average seed [rungs], and the noise, by least squares.

    losses: by rung and seed; any rung may lack some seeds.
    """
    seeds = sorted({seed for rung in losses for seed in rung})
    rows = []
    values = []
    for number, rung in enumerate(losses):
        for seed, loss in rung.items():
            row = np.zeros(len(losses) + len(seeds))
            row[number] = 1.0
            row[len(losses) + seeds.index(seed)] = 1.0
            rows.append(row)
            values.append(loss)
    # One row more holds the effects' sum at 0: rungs and seeds could trade a constant without it.
    rows.append(np.concatenate([np.zeros(len(losses)), np.ones(len(seeds))]))
    design = np.stack(rows)
    measured = np.array([*values, 0.0])
    solution, _, rank, _ = np.linalg.lstsq(design, measured)
    degrees = len(measured) - int(rank)
    means = solution[: len(losses)]
    effects = solution[len(losses) :]
    if degrees < 1:
        return np.array([mean_of(rung) for rung in losses]), Noise(math.nan, 0)
    residual = design @ solution - measured
    variance = float(residual @ residual) / degrees
    shared = 0.0
    if len(seeds) > 1:
        # The effects are means over rungs, whose own noise is in their spread.
        shared = max(0.0, float(np.var(effects, ddof=1)) - variance / len(losses))
    seed_effects = dict(zip(seeds, effects.tolist(), strict=True))
    return means, Noise(math.sqrt(variance), degrees, math.sqrt(shared), seed_effects)


def mean_of(losses: BySeed) -> float:
    """The plain mean over a rung's seeds."""
    return float(np.mean(list(losses.values())))


def _share_no_seed(losses: Sequence[BySeed]) -> bool:
    """Whether some rungs cannot be compared with the others: no seed links them, however long."""
    linked = set(losses[0])
    for _ in losses:
        for rung in losses:
            if linked & rung.keys():
                linked |= rung.keys()
    return any(not linked & rung.keys() for rung in losses)


def fit(
    flops: Sequence[float],
    losses: Sequence[BySeed],
    seed: int = 0,
    replicates: int = REPLICATES,
) -> Fit:
    """The law through the rungs' mean losses, weighted by their numbers of seeds.

    flops: of one run a rung. losses: of its seeds, by their numbers. Raises DataError for fewer
    rungs than the law needs, rungs without a common seed, and a loss that is no number.
    """
    if len(flops) < LEAST_RUNGS:
        raise DataError(
            f"{len(flops)} rungs give no law of three unknowns: finish at least {LEAST_RUNGS}."
        )
    if not all(math.isfinite(loss) for rung in losses for loss in rung.values()):
        raise DataError(
            "a run of the ladder diverged, so that its rung has no loss. "
            "Tune the proxy's learning rate lower, and plan again."
        )
    if _share_no_seed(losses):
        raise DataError(
            "the finished runs of some rungs share no seed with those of the others, so that what "
            "a seed does cannot be told from what size does. Finish the missing runs."
        )
    x = np.asarray(flops, dtype=np.float64)
    means, noise = means_and_noise(losses)
    counts = np.array([len(rung) for rung in losses], dtype=np.float64)
    unit = float(np.exp(np.log(x).mean()))
    solver = _Solver(x / unit, counts)
    parameters, squares = solver.solve(means[np.newaxis])
    law = Law(float(parameters[0][0]), float(parameters[1][0]), float(parameters[2][0]), unit)

    if noise.degrees < 1:
        return Fit(x, means, counts, noise, law, 1.0, parameters, np.full(1, math.nan))
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
        # To losses that rise with compute the nearest of these laws is a constant.
        rising = scales <= 0
        scales = np.where(rising, 0.0, scales)
        floors = np.where(rising, loss_means[:, np.newaxis], floors)
        squares = np.where(rising, (centred_losses**2 @ w)[:, np.newaxis], squares)
        best = squares.argmin(axis=1)
        rows = np.arange(len(losses))
        parameters = (floors[rows, best], scales[rows, best], EXPONENTS[best])
        return parameters, squares[rows, best]

"""What a ladder's finished runs say: law, miss of the top rung, moved optima, collapse, shapes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_completep.completep import table_of
from megatron_completep.completep.tau import timescales
from megatron_completep.errors import DataError
from megatron_completep.instruments import sweep
from megatron_completep.instruments.fits import Array, Estimate, t_95
from megatron_completep.instruments.ladder import Ladder, Run, runs
from megatron_completep.instruments.ladder_fit import (
    Fit,
    Noise,
    fit,
    mean_of,
    means_and_noise,
)
from megatron_completep.instruments.run_shape import Shape

CURVE_GROUPS = 20  # parts of a run, of whose means collapse is judged
COLLAPSES = 0.02  # largest spread of scaled curves in the last half that counts as one curve
SAME_TAU = 1.1  # the largest ratio of two rungs' tau that counts as one
DIFFERS = 0.04  # the smallest that counts as several
# Verdicts. The last two: what the law says of other sizes is not to be trusted, however narrow its
# interval.
FORECAST = "forecast"
MOVED = "moved"  # of a learning rate
RATE_MOVED = "learning rate moved"
TOP_MISSED = "top rung missed"


@dataclass(frozen=True)
class Finished:
    """A rung's finished runs at the proxy's learning rate under one rule."""

    name: str
    shape: Shape
    flops: float  # of one run
    by_seed: dict[int, float]  # losses by the seed's number; infinite: diverged
    tau: float | None  # of the hidden weights' decay
    curve: Array | None  # [CURVE_GROUPS] training losses, mean over seeds

    @property
    def loss(self) -> float:
        """The mean over seeds."""
        return mean_of(self.by_seed)

    @property
    def losses(self) -> tuple[float, ...]:
        """Those of the seeds that are finished, in order."""
        return tuple(self.by_seed.values())


@dataclass(frozen=True)
class Holdout:
    """The top rung forecast from those below it, and what it came to."""

    rung: str
    forecast: Estimate  # of the mean of its seeds
    measured: float
    verdict: str  # forecast | unresolved | no power law

    @property
    def miss(self) -> float:
        """Measured minus forecast, nats."""
        return self.measured - self.forecast.value

    @property
    def is_inside(self) -> bool:
        """Whether the measured loss lies in the interval."""
        return self.forecast.low <= self.measured <= self.forecast.high


@dataclass(frozen=True)
class End:
    """Three learning rates at one end of the ladder, seed 0: has the optimum moved?

    losses: by octaves from the proxy's rate. gain: nats that the best of them is below the
    proxy's. verdict: `holds`, or `moved` if the gain is more than noise.
    """

    rung: str
    losses: dict[float, float]
    best_octaves: float
    gain: float
    verdict: str


@dataclass(frozen=True)
class Studied:
    """A shape of another ratio at a rung's compute; the rung's own shape is among them."""

    rung: str
    shape: Shape
    flops: float
    losses: tuple[float, ...]


@dataclass(frozen=True)
class RuleAnalysis:
    """All that the runs under one rule say. What there are too few runs for is None."""

    rule: str
    rungs: tuple[Finished, ...]
    noise: Noise
    law: Fit | None
    reason: str  # why there is no law; empty: there is one
    holdout: Holdout | None
    ends: tuple[End, ...]
    spread: float | None  # of the scaled curves
    collapse: str
    study: tuple[Studied, ...]
    target: Estimate | None

    def verdict(self, forecast: Estimate) -> str:
        """`forecast`, or the first reason why it is none; without a law `unresolved`."""
        if self.law is None:
            return "unresolved"
        verdict = self.law.verdict(forecast)
        if verdict != FORECAST:
            return verdict
        if any(end.verdict == MOVED for end in self.ends):
            return RATE_MOVED
        if self.holdout is not None and not self.holdout.is_inside:
            return TOP_MISSED
        return FORECAST

    @property
    def target_verdict(self) -> str:
        """That of the target's forecast; what is missing where there is none."""
        if self.target is not None:
            return self.verdict(self.target)
        return self.reason or "no target was planned"


Results = dict[str, dict[str, Any]]  # by a point's key


def analyse(ladder: Ladder, folder: Path) -> list[RuleAnalysis]:
    """The analysis of every rule that has a finished rung.

    Raises DataError where no run is finished, or a file is no result.
    """
    planned = runs(ladder)
    results: Results = {}
    for point, result in sweep.read_results([run.point for run in planned], folder):
        results[point.key] = result
    if not results:
        raise DataError(
            f"{folder}: no run is finished. Start them with tools/ladder.py run {folder}."
        )
    analyses = []
    for rule in ladder.rules:
        rule_runs = [run for run in planned if run.point.parameterization == rule]
        analyses.append(_of_rule(ladder, rule, rule_runs, results))
    return analyses


def _of_rule(ladder: Ladder, rule: str, planned: Sequence[Run], results: Results) -> RuleAnalysis:
    rungs = tuple(_finished(ladder, planned, results))
    finite = [rung.by_seed for rung in rungs if np.isfinite(rung.losses).all()]
    noise = means_and_noise(finite)[1] if finite else Noise(math.nan, 0)
    law, reason = _law(rungs)
    target: Estimate | None = None
    if ladder.target is not None and law is not None:
        target = law.forecast(ladder.target.flops, seeds=1)
    spread = curve_spread(rungs, law.law.floor if law is not None else 0.0)
    return RuleAnalysis(
        rule,
        rungs,
        noise,
        law,
        reason,
        holdout(rungs),
        tuple(_ends(ladder, planned, results, noise)),
        spread,
        collapse_verdict(rungs, spread),
        tuple(_studied(ladder, planned, results, rungs)),
        target,
    )


def _finished(ladder: Ladder, planned: Sequence[Run], results: Results) -> list[Finished]:
    """The rungs that have a finished run, in order."""
    rungs = []
    for rung in ladder.rungs:
        rung_runs = [run for run in planned if run.rung == rung.name and run.kind == "rung"]
        done = {}
        for run in rung_runs:
            if run.point.key in results:
                done[run.point.seed] = results[run.point.key]
        if not done:
            continue
        config = rung_runs[0].point.config
        scales = list(timescales(config, table_of(config)))
        losses = {seed: sweep.loss_of(result) for seed, result in done.items()}
        # A run that diverged ended early.
        flops = max(result["flops"] for result in done.values())
        tau = scales[0].run if scales else None
        curve = _mean_curve(list(done.values()))
        rungs.append(Finished(rung.name, rung.shape, flops, losses, tau, curve))
    return rungs


def _mean_curve(results: Sequence[dict[str, Any]]) -> Array | None:
    """The mean over seeds of the grouped training losses; None for runs that are too short."""
    curves = [np.asarray(result.get("curve", ())) for result in results]
    usable = [curve for curve in curves if len(curve) >= CURVE_GROUPS and np.isfinite(curve).all()]
    if not usable:
        return None
    # Runs that ended early are shorter than the others.
    longest = max(len(curve) for curve in usable)
    mean: Array = np.mean([curve for curve in usable if len(curve) == longest], axis=0)
    return np.array([part.mean() for part in np.array_split(mean, CURVE_GROUPS)])


def _law(rungs: Sequence[Finished]) -> tuple[Fit | None, str]:
    """(the law, ""), or (None, why there is none)."""
    try:
        return fit([rung.flops for rung in rungs], [rung.by_seed for rung in rungs]), ""
    except DataError as error:
        return None, str(error)


def holdout(rungs: Sequence[Finished]) -> Holdout | None:
    """The top rung from those below it; None where they are too few for a law."""
    below = rungs[:-1]
    law, _ = _law(below)
    if law is None:
        return None
    top = rungs[-1]
    forecast = law.forecast_of(top.flops, list(top.by_seed))
    return Holdout(top.name, forecast, top.loss, law.verdict(forecast))


def _ends(ladder: Ladder, planned: Sequence[Run], results: Results, noise: Noise) -> list[End]:
    ends = []
    for rung in (ladder.rungs[0], ladder.rungs[-1]):
        losses: dict[float, float] = {}
        for run in planned:
            done = results.get(run.point.key)
            at_end = run.rung == rung.name and run.kind != "shape" and run.point.seed == 0
            if at_end and done is not None:
                losses[run.octaves] = sweep.loss_of(done)
        if len(losses) == 3:
            ends.append(end_of(rung.name, losses, noise))
    return ends


def end_of(rung: str, losses: dict[float, float], noise: Noise) -> End:
    """The verdict on three learning rates: a better neighbour must be better than noise makes it.

    losses: by octaves from the proxy's rate, 0 among them.
    """
    best = min(losses, key=lambda octaves: losses[octaves])
    gain = losses[0.0] - losses[best]
    # The difference of two runs, of whose seed's effect nothing is taken to cancel.
    bound = t_95(noise.degrees) * noise.sigma * math.sqrt(2)
    moved = best != 0 and not gain <= bound
    if noise.degrees < 1:
        return End(rung, losses, best, gain, "unresolved: one seed tells no noise")
    return End(rung, losses, best, gain, MOVED if moved else "holds")


def curve_spread(rungs: Sequence[Finished], floor: float) -> float | None:
    """The largest spread of scaled curves in the last half of the runs, as a fraction.

    A curve is scaled to (L - floor) / (last L - floor) (arXiv 2509.25087), with the law's floor.
    None for fewer than two curves, and where one ends at the floor or below it.
    """
    curves = [rung.curve for rung in rungs if rung.curve is not None]
    if len(curves) < 2:
        return None
    if min(curve[-1] for curve in curves) <= floor:
        return None
    scaled = np.stack([(curve - floor) / (curve[-1] - floor) for curve in curves])
    last_half = scaled[:, CURVE_GROUPS // 2 :]
    return float((last_half.max(axis=0) - last_half.min(axis=0)).max())


def collapse_verdict(rungs: Sequence[Finished], spread: float | None) -> str:
    """Whether scaled curves are one curve, which they can be at one tau alone."""
    if spread is None:
        return "not measured"
    if spread <= COLLAPSES:
        return "collapses"
    verdict = "does not collapse" if spread >= DIFFERS else "cannot tell"
    taus = [rung.tau for rung in rungs if rung.tau is not None]
    if taus and max(taus) > SAME_TAU * min(taus):
        return f"{verdict}: tau is {min(taus):.3g} to {max(taus):.3g}"
    return verdict


def _studied(
    ladder: Ladder, planned: Sequence[Run], results: Results, rungs: Sequence[Finished]
) -> list[Studied]:
    """The shapes of the study by rung, each rung's own shape among them, in order of N / L."""
    studied = []
    for rung in ladder.rungs:
        if not ladder.study[rung.name]:
            continue
        entries = [
            Studied(rung.name, done.shape, done.flops, done.losses)
            for done in rungs
            if done.name == rung.name
        ]
        for shape in ladder.study[rung.name]:
            done = _of_shape(planned, rung.name, shape, results)
            if done:
                losses = tuple(sweep.loss_of(result) for result in done)
                entries.append(Studied(rung.name, shape, done[0]["flops"], losses))
        studied += sorted(entries, key=lambda entry: entry.shape.ratio)
    return studied


def _of_shape(
    planned: Sequence[Run], rung: str, shape: Shape, results: Results
) -> list[dict[str, Any]]:
    """The finished runs of one shape of the study."""
    done = []
    for run in planned:
        point = run.point
        same = (point.hidden_size, point.num_layers) == (shape.hidden_size, shape.num_layers)
        if same and run.rung == rung and run.kind == "shape" and point.key in results:
            done.append(results[point.key])
    return done

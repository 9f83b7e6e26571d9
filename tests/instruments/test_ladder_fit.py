"""The ladder's law: recovered where it is known, and intervals that hold what they promise."""

from __future__ import annotations

import math

import numpy as np
import pytest

from megatron_completep.errors import DataError
from megatron_completep.instruments.ladder_fit import fit, means_and_noise

FLOPS = 1e10 * np.geomspace(1, 100, 5)
TARGET = 4e12  # four times the top rung's


def loss_of(flops: float, floor: float = 1.2, scale: float = 0.9, exponent: float = 0.2) -> float:
    return floor + scale * (flops / 1e11) ** -exponent


def noisy(draw: int, sigma: float, seeds: int = 3, law=loss_of) -> list[dict[int, float]]:
    random = np.random.default_rng(draw)
    losses = []
    for flops in FLOPS:
        losses.append(
            {seed: law(flops) + sigma * random.standard_normal() for seed in range(seeds)}
        )
    return losses


def test_a_law_without_noise_is_recovered_and_forecast():
    found = fit(FLOPS, [dict.fromkeys(range(2), loss_of(flops)) for flops in FLOPS]).law
    # As close as the grid of exponents allows.
    assert found.exponent == pytest.approx(0.2, rel=0.03)
    assert found.floor == pytest.approx(1.2, abs=0.03)
    assert found.loss(TARGET) == pytest.approx(loss_of(TARGET), abs=2e-3)


def test_the_forecast_lies_in_its_interval_in_nineteen_of_twenty_draws():
    covered = 0
    outside_of_half = 0
    for draw in range(400):
        result = fit(FLOPS, noisy(draw, 0.005), replicates=200)
        forecast = result.forecast(TARGET)
        truth = loss_of(TARGET)
        covered += forecast.low <= truth <= forecast.high
        # The control: an interval of a quarter of the width does not hold it.
        outside_of_half += abs(truth - forecast.value) > (forecast.high - forecast.low) / 8
    assert 0.90 <= covered / 400 <= 0.99
    assert outside_of_half / 400 > 0.3


def test_forecasts_of_runs_hold_them_whose_seeds_move_all_rungs_alike():
    same = 0
    other = 0
    narrow = 0
    draws = 200
    for draw in range(draws):
        random = np.random.default_rng(1000 + draw)
        effects = 0.01 * random.standard_normal(4)
        losses = []
        for rung in noisy(draw, 0.003):
            losses.append({seed: loss + effects[seed] for seed, loss in rung.items()})
        result = fit(FLOPS, losses, replicates=200)
        # The same seeds, as the top rung has them, and one run of a seed that no rung had.
        own = loss_of(TARGET) + 0.003 * random.standard_normal(4) + effects
        mean = own[:3].mean()
        forecast = result.forecast_of(TARGET, (0, 1, 2))
        same += forecast.low <= mean <= forecast.high
        forecast = result.forecast(TARGET, seeds=1)
        other += forecast.low <= own[3] <= forecast.high
        # The control: an interval without what the seeds do to all rungs alike.
        law = result.forecast_of(TARGET, (0, 1, 2))
        narrow += not law.low <= own[3] <= law.high
    assert 0.90 <= same / draws <= 0.99
    assert 0.90 <= other / draws <= 0.99
    assert narrow / draws > 0.12


def test_what_a_seed_does_to_all_rungs_is_no_noise_between_them():
    random = np.random.default_rng(3)
    effects = (0.05, -0.01, -0.04)
    losses = []
    # The top rung lacks the last seed, so that its plain mean is too high.
    for flops, seeds in zip(FLOPS, (3, 3, 3, 3, 2), strict=True):
        own = [loss_of(flops) + effect + 0.003 * random.standard_normal() for effect in effects]
        losses.append(dict(enumerate(own[:seeds])))
    means, noise = means_and_noise(losses)
    assert noise.sigma == pytest.approx(0.003, rel=0.6)
    assert list(noise.effects.values()) == pytest.approx(effects, abs=0.005)
    assert noise.shared == pytest.approx(np.std(effects, ddof=1), rel=0.1)
    assert means[-1] == pytest.approx(loss_of(FLOPS[-1]), abs=0.006)
    # The control: plain means and deviations.
    assert np.mean(list(losses[-1].values())) > loss_of(FLOPS[-1]) + 0.015
    assert np.std(list(losses[0].values()), ddof=1) > 0.03
    # Runs of these seeds are known better than runs of others.
    result = fit(FLOPS, losses)
    same = result.forecast_of(TARGET, (0, 1))
    others = result.forecast(TARGET, seeds=2)
    assert same.value == pytest.approx(others.value + 0.02, abs=0.005)
    assert others.high - others.low > 2 * (same.high - same.low)


def test_a_missing_seed_of_any_number_leaves_the_others_with_their_effects():
    random = np.random.default_rng(5)
    effects = (0.06, 0.05, -0.11)
    losses = []
    for flops in FLOPS:
        own = [loss_of(flops) + effect + 0.002 * random.standard_normal() for effect in effects]
        losses.append(dict(enumerate(own)))
    whole = fit(FLOPS, losses)
    # As a cluster's array can leave it: the first seed of two rungs is not there.
    gaps = [
        {seed: rung[seed] for seed in rung if n not in (1, 4) or seed}
        for n, rung in enumerate(losses)
    ]
    gappy = fit(FLOPS, gaps)
    assert gappy.noise.sigma < 2 * whole.noise.sigma
    assert gappy.means == pytest.approx(whole.means, abs=0.006)
    own_seeds = gappy.forecast_of(TARGET, (1, 2))
    assert own_seeds.value == pytest.approx(loss_of(TARGET) - 0.03, abs=0.01)
    # The control: seeds by their position, which takes one effect for another.
    shifted = [dict(enumerate(rung.values())) for rung in gaps]
    assert fit(FLOPS, shifted).noise.sigma > 5 * whole.noise.sigma
    # Rungs that no common seed links are no ladder.
    apart = [{0: 2.0, 1: 2.1}, {0: 1.9, 1: 2.0}, {0: 1.8}, {2: 1.7}, {2: 1.6}]
    with pytest.raises(DataError, match="share no seed"):
        fit(FLOPS, apart)


def test_rungs_that_follow_no_power_law_are_flagged_and_others_are_not():
    def broken(flops: float) -> float:
        # The second half of the ladder stops learning.
        return loss_of(min(flops, FLOPS[2]))

    flagged = [fit(FLOPS, noisy(draw, 0.003, law=broken)).broken for draw in range(20)]
    assert all(flagged)
    false_alarms = [fit(FLOPS, noisy(draw, 0.003)).broken for draw in range(20)]
    assert sum(false_alarms) <= 2


@pytest.mark.parametrize("sigma", [0.0, 0.003])
def test_losses_that_rise_with_compute_are_no_power_law(sigma: float):
    rising = fit(FLOPS, noisy(0, sigma, law=lambda flops: 4.0 - loss_of(flops)))
    assert rising.misfit < 0.01
    assert rising.broken
    assert rising.law.scale == 0.0
    assert rising.verdict(rising.forecast(TARGET)) == "no power law"


def test_losses_that_do_not_fall_are_no_power_law_however_small_their_residuals():
    # By so little that a constant fits them within their noise.
    flat = fit(FLOPS, noisy(0, 0.002, law=lambda flops: 2.0 + 0.0015 * math.log10(flops / 1e10)))
    assert flat.law.scale == 0.0 and flat.misfit > 0.01
    assert flat.verdict(flat.forecast(TARGET)) == "no power law"


def test_an_interval_too_wide_to_use_and_one_seed_are_unresolved():
    loud = fit(FLOPS, noisy(0, 0.03))
    assert loud.verdict(loud.forecast(TARGET)) == "unresolved"
    quiet = fit(FLOPS, noisy(0, 0.002))
    assert quiet.verdict(quiet.forecast(TARGET)) == "forecast"
    alone = fit(FLOPS, noisy(0, 0.002, seeds=1)).forecast(TARGET)
    assert not alone.repeated
    assert math.isinf(alone.high)


def test_fewer_than_four_rungs_and_a_run_that_diverged_give_no_law():
    with pytest.raises(DataError, match="3 rungs give no law"):
        fit(FLOPS[:3], noisy(0, 0.01)[:3])
    with pytest.raises(DataError, match="diverged"):
        fit(FLOPS, [*noisy(0, 0.01)[:4], {0: math.inf, 1: 2.0, 2: 2.0}])

"""Fits and intervals on synthetic curves whose answers are known."""

from __future__ import annotations

import math

import numpy as np
import pytest

from megatron_completep.instruments.fits import (
    Estimate,
    bootstrap,
    log_log_slope,
    loss_at,
    mean_curve,
    mean_estimate,
    parabola_optimum,
    slope,
    t_95,
)

GRID = np.arange(-10.0, -4.5, 0.5)


def parabola(vertex: float, curvature: float = 0.1) -> np.ndarray:
    return 2.5 + curvature * (GRID - vertex) ** 2


def test_the_exponent_of_a_power_law_is_found():
    sizes = [2, 4, 8, 16]
    assert log_log_slope(sizes, [3 * size**-0.7 for size in sizes]) == pytest.approx(
        -0.7, abs=1e-12
    )
    assert log_log_slope(sizes, [5.0] * 4) == pytest.approx(0.0, abs=1e-12)


def test_an_exponent_of_what_diverged_is_no_pass():
    assert log_log_slope([2, 4], [1.0, math.nan]) == math.inf
    assert math.isnan(log_log_slope([2, 4], [1.0, 0.0]))
    assert math.isnan(slope([1], [1]))


def test_the_interval_of_a_mean_holds_the_truth_as_often_as_it_says():
    random = np.random.default_rng(1)
    held = 0
    for _ in range(1000):
        estimate = mean_estimate(random.normal(0.3, 1.0, 3).tolist())
        held += estimate.low <= 0.3 <= estimate.high
    assert 930 <= held <= 970
    assert mean_estimate([1.0]) == Estimate(1.0, -math.inf, math.inf)
    assert t_95(2) == 4.303
    assert t_95(30) == pytest.approx(2.042, abs=0.01)


@pytest.mark.parametrize("vertex", [-7.0, -7.3, -6.76])
def test_a_parabolas_vertex_is_found_between_the_points(vertex: float):
    optimum = parabola_optimum(GRID, parabola(vertex))
    assert optimum.log2_lr == pytest.approx(vertex, abs=1e-9)
    assert optimum.loss == pytest.approx(2.5, abs=1e-9)
    assert not optimum.at_edge


def test_an_optimum_at_the_edge_of_the_grid_is_said_to_be_there():
    optimum = parabola_optimum(GRID, parabola(-12.0))
    assert optimum.at_edge
    assert optimum.log2_lr == -10.0  # never beyond what was run


def test_points_where_training_breaks_do_not_bend_the_fit():
    losses = parabola(-7.0)
    losses[GRID > -6.4] += 0.5
    assert parabola_optimum(GRID, losses).log2_lr == pytest.approx(-7.0, abs=1e-9)
    # A fit through them would be bent.
    assert parabola_optimum(GRID, losses, rise=1.0).log2_lr < -7.2


def test_points_that_diverged_do_not_bend_the_fit():
    losses = parabola(-7.0)
    losses[GRID > -6.4] = np.inf
    assert parabola_optimum(GRID, losses).log2_lr == pytest.approx(-7.0, abs=1e-9)


def test_the_loss_between_points_is_read_off_the_parabola_and_beyond_it_off_straight_lines():
    losses = parabola(-7.2)
    optimum = parabola_optimum(GRID, losses)
    assert loss_at(GRID, losses, optimum, -6.8) == pytest.approx(2.5 + 0.1 * 0.4**2, abs=1e-12)
    # -9.5 and -9: beyond the parabola
    assert loss_at(GRID, losses, optimum, -9.25) == pytest.approx((losses[1] + losses[2]) / 2)
    assert math.isnan(loss_at(GRID, losses, optimum, -11.0))


def optimum_estimate(losses: np.ndarray, replicates: int = 100, seed: int = 0) -> Estimate:
    return bootstrap(
        lambda means: parabola_optimum(GRID, means[0]).log2_lr, [losses], replicates, seed
    )


def test_the_bootstrap_interval_holds_the_true_optimum_about_as_often_as_it_says():
    """Three seeds whose common part is much larger
    than the noise of single runs, as in training.
    """
    random = np.random.default_rng(2)
    held = 0
    for trial in range(100):
        common, noise = random.normal(0, 0.05, (1, 3)), random.normal(0, 0.005, (len(GRID), 3))
        estimate = optimum_estimate(parabola(-7.2)[:, None] + common + noise, seed=trial)
        held += estimate.low <= -7.2 <= estimate.high
    assert held >= 86, held  # 95 expected; 86 is more than four standard deviations below


def test_the_interval_of_a_level_holds_what_seeds_share_and_that_of_an_optimum_does_not():
    """Seeds that shift whole curves by +-0.1:
    the level of the best loss is uncertain, its place is not.
    """
    shifted = parabola(-7.2)[:, None] + np.array([[-0.1, 0.0, 0.1]])
    level = bootstrap(
        lambda means: parabola_optimum(GRID, means[0]).loss,
        [shifted],
        500,
        include_shared_seed_effect=True,
    )
    error = 0.1 / 3**0.5  # of the mean of three, with the standard deviation 0.1
    assert level.high - level.low == pytest.approx(2 * 1.96 * error, rel=0.25)
    place = optimum_estimate(shifted)
    assert place.high - place.low < 1e-9


def test_a_curve_of_a_single_learning_rate_has_a_level_with_an_interval():
    one = np.array([[2.4, 2.5, 2.6]])
    level = bootstrap(lambda means: float(means[0][0]), [one], 500, include_shared_seed_effect=True)
    assert level.low < 2.45 < level.value < 2.55 < level.high


def test_more_noise_widens_the_bootstrap_interval():
    random = np.random.default_rng(3)
    noise = random.normal(0, 1, (len(GRID), 3))
    widths = []
    for size in (0.001, 0.01):
        estimate = optimum_estimate(parabola(-7.2)[:, None] + size * noise)
        widths.append(estimate.high - estimate.low)
    assert widths[1] > 4 * widths[0] > 0


def test_one_seed_gives_no_interval():
    estimate = optimum_estimate(parabola(-7.2)[:, None])
    assert estimate.value == pytest.approx(-7.2)
    assert (estimate.low, estimate.high) == (-math.inf, math.inf)
    assert str(estimate) == "-7.200"


def test_a_learning_rate_at_which_one_seed_diverged_counts_as_diverged():
    losses = np.stack([parabola(-7.0)] * 2, axis=1)
    losses[-1, 1] = np.inf
    assert mean_curve(losses)[-1] == np.inf
    assert np.isfinite(mean_curve(losses)[:-1]).all()


def test_a_band_is_judged_by_the_whole_interval():
    assert Estimate(0.0, -0.1, 0.1).inside(-0.15, 0.15)
    assert not Estimate(0.0, -0.2, 0.1).inside(-0.15, 0.15)
    assert Estimate(-0.5, -0.7, -0.3).outside(-0.15, 0.15)
    assert not Estimate(-0.2, -0.3, -0.1).outside(-0.15, 0.15)

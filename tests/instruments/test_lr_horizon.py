"""The exponent of the learning rate in tokens, and the three numbers of transfer, where known."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from megatron_completep.completep import table_of
from megatron_completep.config import Config
from megatron_completep.config.derived import total_tokens
from megatron_completep.instruments import lr_curves, sweep
from megatron_completep.instruments.lr_curves import Curve, curves_of
from megatron_completep.instruments.lr_horizon import horizon, horizons, qualities, quality
from megatron_completep.instruments.lr_transfer_report import _quality_line
from megatron_completep.instruments.trial import change
from megatron_completep.roles import Role
from tests.support.runs import proxy_config

GRID = np.arange(-9.0, -6.5, 0.5)  # five learning rates
LENGTHS = (128, 256, 512)


@pytest.fixture(autouse=True)
def few_replicates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lr_curves, "REPLICATES", 200)


def curve(
    vertex: float,
    steps: int = 128,
    depth: int = 2,
    rule: str = "completep",
    curvature: float = 0.1,
    grid: np.ndarray = GRID,
    best: float = 2.5,
    noise: float = 0.003,
    seeds: int = 2,
) -> Curve:
    random = np.random.default_rng(steps + depth)
    parabola = best + curvature * (grid - vertex) ** 2
    losses = parabola[:, None] + random.normal(0, noise, (len(grid), seeds))
    return Curve(rule, 64, depth, steps, 0.0, 0.02, grid, losses, flops=float(steps * depth))


def falling(exponent: float, middle: float = -8.0) -> list[Curve]:
    return [curve(middle - exponent * math.log2(steps / 256), steps) for steps in LENGTHS]


def test_a_known_exponent_is_recovered_from_three_lengths():
    found = horizon(falling(0.32))
    assert found.exponent.value == pytest.approx(0.32, abs=0.03)
    assert found.exponent.low <= 0.32 <= found.exponent.high
    assert found.error < 0.03
    assert found.verdict == "fitted"
    # A rate that rises with the length has the other sign.
    assert horizon(falling(-0.3)).exponent.value == pytest.approx(-0.3, abs=0.03)


def test_rates_that_a_proxy_scales_with_the_length_already_count_as_they_are(tmp_path: Path):
    config = proxy_config(tmp_path)
    steps = config.training.train_steps
    tokens = {"base_total_tokens": total_tokens(config)}
    scaled = change(config, completep={**tokens, "base_hidden_size": 64, "base_num_layers": 2})
    lengths = [steps, 2 * steps, 4 * steps]
    rates = [2.0**exponent for exponent in GRID]

    def fitted(proxy: Config) -> float:
        """Of losses whose best peak rate, in the optimizer itself, falls with tokens^-0.32."""
        results = []
        for point in sweep.Grid(rates, train_steps=lengths, seeds=2).points(proxy):
            table = table_of(point.config)
            peak = table.values(Role.EMBEDDING, 1.0, point.config.optimizer).lr
            best = -7.75 - 0.32 * math.log2(point.train_steps / steps)
            loss = 2.5 + 0.1 * (math.log2(peak) - best) ** 2
            loss += 1e-4 * point.seed
            results.append((point, {"validation_loss": loss, "diverged": False, "flops": 1.0}))
        (found,) = horizons(curves_of(results))
        return found.exponent.value

    assert fitted(config) == pytest.approx(0.32, abs=0.02)
    assert fitted(scaled) == pytest.approx(0.32, abs=0.02)


def test_an_optimum_at_the_edge_of_the_grid_leaves_the_exponent_unresolved():
    assert horizon(falling(0.32, middle=-9.0)).verdict.startswith("unresolved: an optimum lies")
    (alone,) = horizons([curve(-7.5, steps, seeds=1) for steps in LENGTHS])
    assert alone.verdict.startswith("unresolved: no interval, of one seed")
    assert horizons(falling(0.32)[:2]) == []


def family(shift: float, curvatures: Sequence[float] = (0.1, 0.1, 0.1)) -> list[Curve]:
    """Three depths, the largest's optimum `shift` octaves from the smallest's."""
    depths = (2, 4, 8)
    return [
        curve(-7.75 + shift * index / 2, depth=depth, curvature=curvatures[index], noise=0.0)
        for index, depth in enumerate(depths)
    ]


def test_the_penalty_of_a_shifted_optimum_is_its_closed_form():
    curves = family(0.5)
    (found,) = qualities(curves)
    assert found.penalty.value == pytest.approx(0.1 * 0.5**2, rel=0.1)
    assert found.fit_error.value == pytest.approx(0.0, abs=1e-6)
    assert quality(family(0.0), curves).penalty.value == pytest.approx(0.0, abs=1e-6)


def test_the_three_numbers_have_intervals_and_a_verdict():
    depths = (2, 4, 8)
    noisy = [curve(-8.25 + 0.25 * n, depth=d, noise=0.003, seeds=4) for n, d in enumerate(depths)]
    (found,) = qualities(noisy)
    assert found.verdict == "measured"
    for number, truth in ((found.penalty, 0.025), (found.robustness, 0.0), (found.fit_error, 0.0)):
        assert number.low - 0.01 <= truth <= number.high
        assert 0 < number.high - number.low < 1
    assert "penalty +0.0" in _quality_line(found)
    assert _quality_line(found).endswith(": measured")
    # At the grid's edge, and of one seed, nothing is settled.
    moved = [curve(-9.3 + 0.25 * n, depth=d) for n, d in enumerate(depths)]
    assert qualities(moved)[0].verdict.startswith("unresolved: an optimum lies at the edge")
    single = [curve(-7.75, depth=d, seeds=1) for d in depths]
    assert qualities(single)[0].verdict.startswith("unresolved: one seed")


def test_robustness_is_the_exponent_of_the_curvature_and_behind_is_against_the_best_rule():
    # The depth doubles and the curvature halves: exponent -1.
    curves = family(0.0, (0.2, 0.1, 0.05))
    (found,) = qualities(curves)
    assert found.robustness.value == pytest.approx(-1.0, abs=0.05)
    others = [curve(-7.75, depth=depth, rule="mup", best=2.6, noise=0.0) for depth in (2, 4, 8)]
    by_rule = {entry.parameterization: entry for entry in qualities([*curves, *others])}
    assert by_rule["mup"].behind.value == pytest.approx(0.1, abs=1e-6)
    assert by_rule["completep"].behind.value == pytest.approx(0.0, abs=1e-6)

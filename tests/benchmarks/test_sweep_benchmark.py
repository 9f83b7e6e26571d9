"""The sweep's benchmark: both programs train the same points, and first points do not count."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from megatron_completep.benchmarks.sweep_benchmark import (
    PointTime,
    SweepSettings,
    compare_sweeps,
    run_plain_point,
    summarize_sweeps,
    sweep_points,
)
from megatron_completep.benchmarks.training_benchmark import KINDS
from megatron_completep.instruments.sweep import run_point
from tests.support.models import model_config

SETTINGS = SweepSettings(
    model_config(**KINDS["swiglu"]), 2, steps=3, points=1, workers=1, compile=False
)


def test_both_programs_train_the_points_of_a_sweep(tmp_path: Path) -> None:
    points = sweep_points(SETTINGS, tmp_path)
    assert len({point.key for point in points}) == 2
    config = points[0].config
    assert run_point(config)["steps"] == config.training.train_steps == 3
    # Random tokens: both stay near a uniform guess, above which logits times 8 lift them a little.
    guess = math.log(config.model.vocab_size)
    assert run_plain_point(config) == pytest.approx(guess, rel=0.2)
    assert run_point(config)["train_loss"] == pytest.approx(guess, rel=0.2)


def test_points_an_hour_are_those_of_all_workers() -> None:
    first, later = PointTime(1, 900.0, 900.0), PointTime(1, 2.0, 1.5)
    plain = PointTime(1, 4.0, 2.0)
    result = summarize_sweeps(3, [(first, first), (later, plain), (later, plain)])
    assert (result.our_points_an_hour, result.plain_points_an_hour) == (3 * 1800, 3 * 900)
    assert (result.ratio, result.cpu_time_ratio, result.points) == (0.5, 0.75, 2)
    # The control: another worker's first point does not count either.
    other = PointTime(2, 900.0, 900.0)
    again = summarize_sweeps(3, [(first, first), (later, plain), (other, other), (later, plain)])
    assert again == result


@pytest.mark.slow
def test_the_sweep_runs_in_workers() -> None:
    result = compare_sweeps(SETTINGS, lambda line: None)
    assert result.points == 1 and result.ratio > 0

"""Validation is cross-entropy whatever the objective adds to it,
and a run's rows hold what the objective is the sum of.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from megatron_completep.config import Config
from megatron_completep.data.loader import validation_batches
from megatron_completep.inference.generation import load_model
from megatron_completep.instruments.sweep import run_point
from megatron_completep.pretrain import pretrain
from tests.support.ranks import launched_as
from tests.support.runs import rows_of, tiny_config

SHORT = (
    "training.train_steps=4",
    "training.validation_interval=2",
    "checkpoint.interval=null",
    "guards.hang_timeout_minutes=null",
)
MORE = ("training.label_smoothing=0.2", "training.z_loss=0.01")
TERMS = ("cross_entropy", "z_loss", "label_smoothing")


def cross_entropy(config: Config) -> float:
    """Of the run's last checkpoint on its validation data: torch's, in float64, on the logits."""
    _, gpt = load_model(config.training.output_dir, torch.device("cpu"), torch.float64)
    batches = validation_batches(
        config.data,
        samples=10,
        seq_length=16,
        micro_batch_size=5,
        vocab_size=config.model.vocab_size,
        data_rank=0,
        data_size=1,
    )
    with torch.no_grad():
        losses = [
            F.cross_entropy(gpt(b.tokens).flatten(0, 1), b.labels.flatten()).item() for b in batches
        ]
    return math.fsum(losses) / len(losses)


@pytest.fixture(scope="module")
def smoothed(folder: Path) -> Config:
    config = tiny_config(folder, *SHORT, *MORE, output="smoothed")
    pretrain(config)
    return config


def test_validation_is_cross_entropy_under_label_smoothing_and_z_loss(smoothed: Config) -> None:
    last = rows_of(smoothed)[-1]
    assert last["validation_loss"] == pytest.approx(cross_entropy(smoothed), rel=1e-12)
    assert last["loss"] - last["validation_loss"] > 0.1  # the objective is another number


def test_the_objective_is_the_sum_of_terms_that_are_logged_apart(smoothed: Config) -> None:
    for row in rows_of(smoothed):
        assert sum(row[name] for name in TERMS) == pytest.approx(row["loss"], rel=1e-12)
        assert row["cross_entropy"] > 0 and row["z_loss"] > 0 and row["label_smoothing"] != 0


@pytest.mark.parametrize("word", MORE)
def test_a_term_that_is_not_configured_has_no_field(folder: Path, word: str) -> None:
    name = word.partition("=")[0].removeprefix("training.")
    config = tiny_config(folder, *SHORT, word, output=name)
    pretrain(config)
    assert [set(row) & set(TERMS) for row in rows_of(config)] == [{"cross_entropy", name}] * 4
    plain = tiny_config(folder, *SHORT, output="plain")
    pretrain(plain)
    assert [set(row) & set(TERMS) for row in rows_of(plain)] == [set()] * 4
    # Nothing was updated before the first loss.
    assert rows_of(plain)[0]["loss"] == pytest.approx(
        rows_of(config)[0]["cross_entropy"], rel=1e-12
    )


def as_rank(rank: int, world_size: int, config: Config) -> int:
    launched_as(rank, world_size)
    return int(pretrain(config))


@pytest.mark.parametrize(
    "layout",
    [
        ("parallel.pipeline_parallel_size=2", "parallel.schedule=zero_bubble"),
        ("parallel.tensor_parallel_size=2", "parallel.sequence_parallel=true"),
        ("training.micro_batch_size=2",),  # two data ranks
    ],
)
def test_every_layout_reports_the_same_terms_and_validation(
    folder: Path, smoothed: Config, pool: Any, layout: tuple[str, ...]
) -> None:
    config = tiny_config(folder, *SHORT, *MORE, *layout, output="_".join(layout))
    assert pool.run(2, as_rank, 2, config) == [0, 0]
    for own, expected in zip(rows_of(config), rows_of(smoothed), strict=True):
        names = [name for name in ("loss", "validation_loss", *TERMS) if name in expected]
        assert {name: own[name] for name in names} == pytest.approx(
            {name: expected[name] for name in names}, rel=1e-10
        )


def test_a_step_that_is_passed_over_has_no_terms(folder: Path) -> None:
    config = tiny_config(
        folder, *SHORT, *MORE, "training.skip_steps=[{first: 2}]", output="passed_over"
    )
    pretrain(config)
    assert ["cross_entropy" in row for row in rows_of(config)] == [True, False, True, True]


def test_a_sweeps_points_are_compared_by_cross_entropy(folder: Path) -> None:
    """With a learning rate that moves nothing,
    points with and without label smoothing have one validation loss.
    """
    still = ("optimizer.base_lr=1e-30", "training.train_steps=2")
    points = [
        run_point(tiny_config(folder, *still, *words, output="sweep")) for words in ((), MORE)
    ]
    assert points[0]["validation_loss"] == pytest.approx(points[1]["validation_loss"], rel=1e-12)
    assert points[1]["train_loss"] - points[0]["train_loss"] > 0.1

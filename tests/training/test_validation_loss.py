"""Validation is cross-entropy whatever the objective adds to it,
and a run's rows hold what the objective is the sum of.
"""

from __future__ import annotations

import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from megatron_completep.completep import table_of
from megatron_completep.config import Config
from megatron_completep.data.corpus import open_corpus
from megatron_completep.data.loader import validation_batches
from megatron_completep.inference.generation import load_model
from megatron_completep.instruments.sweep import run_point
from megatron_completep.instruments.trial import change
from megatron_completep.parallel.context import ParallelContext
from megatron_completep.pretrain import pretrain
from megatron_completep.reports.run_comparison import summarize
from megatron_completep.reports.run_files import read_run
from megatron_completep.reports.run_report import run_report
from megatron_completep.run.assemble import assemble
from megatron_completep.telemetry.metrics import read_metrics
from megatron_completep.training.build import build_validation
from megatron_completep.training.hooks import Validation
from tests.support.corpora import write_ramps
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


def two_blends(folder: Path) -> dict[str, Any]:
    """Two validation sources, of which the second gives every third sequence."""
    write_ramps(folder / "other", 30, seed=5)
    names = {"validation": 2.0, "other": 1.0}
    return {
        "validation": [
            {"prefix": str(folder / name), "weight": weight} for name, weight in names.items()
        ]
    }


def loss_of_each_source(config: Config) -> dict[str, float]:
    """Of the run's last checkpoint: torch's cross-entropy of each sequence, one at a time.

    The first token of a document is left out by hand where the run masks it.
    """
    _, gpt = load_model(config.training.output_dir, torch.device("cpu"), torch.float64)
    corpus = open_corpus(
        config.data, seq_length=16, total_samples=10, vocab_size=64, split="validation"
    )
    losses: dict[str, list[float]] = {}
    for index in range(10):
        origin = corpus.origin(index)
        tokens = torch.from_numpy(origin.sample.tokens.astype("int64"))
        with torch.no_grad():
            of_tokens = F.cross_entropy(gpt(tokens[None, :-1])[0], tokens[1:], reduction="none")
        masks = config.data.mask_loss_at_document_ends
        begins = origin.sample.starts.tolist() if masks else []
        counted = [loss for at, loss in enumerate(of_tokens.tolist(), 1) if at not in begins]
        losses.setdefault(Path(origin.prefix).name, []).extend(counted)
    return {name: math.fsum(values) / len(values) for name, values in losses.items()}


@pytest.mark.parametrize(
    ("layout", "mask"),
    [
        ((), "false"),
        ((), "true"),
        (("parallel.pipeline_parallel_size=2", "parallel.schedule=zero_bubble"), "true"),
        (("parallel.tensor_parallel_size=2", "parallel.sequence_parallel=true"), "false"),
        (("training.micro_batch_size=2",), "true"),
        (
            ("parallel.context_parallel_size=2", "logging.parameterization_interval=2"),
            "true",
        ),
    ],
)
def test_the_validation_loss_of_each_source_is_that_of_its_sequences(
    folder: Path, pool: Any, layout: tuple[str, ...], mask: str
) -> None:
    words = (*SHORT, *layout, f"data.mask_loss_at_document_ends={mask}")
    config = tiny_config(folder, *words, output=f"two_{mask}", data=two_blends(folder))
    shutil.rmtree(config.training.output_dir, ignore_errors=True)
    if layout:
        assert pool.run(2, as_rank, 2, config) == [0, 0]
    else:
        pretrain(config)
    last = rows_of(config)[-1]
    expected = loss_of_each_source(config)
    for name, loss in expected.items():
        assert last[f"validation_loss/{name}"] == pytest.approx(loss, rel=1e-10)
    assert abs(expected["validation"] - expected["other"]) > 1e-3  # the two can be told apart


def test_a_source_of_its_own_changes_no_bit_of_the_whole_loss(folder: Path) -> None:
    config = tiny_config(folder, *SHORT, output="bits", data=two_blends(folder))
    assembly = assemble(config, ParallelContext.single("cpu"), table_of(config))
    batches = build_validation(config, ParallelContext.single("cpu"))
    assert batches is not None and batches.source_names == ["validation", "other"]
    loss = assembly.step.evaluate_in_parts(batches, batches.source_of, 2).loss
    assert loss == assembly.step.evaluate(batches)
    by_wrong_source = assembly.step.evaluate_in_parts(batches, lambda sample: sample % 2, 2)
    assert by_wrong_source != assembly.step.evaluate_in_parts(batches, batches.source_of, 2)


def test_the_loss_at_some_positions_is_that_of_a_validation_of_them_alone(folder: Path) -> None:
    words = [*SHORT, "training.validation_positions=4"]
    config = tiny_config(folder, *words, output="positions", data=two_blends(folder))
    assembly = assemble(config, ParallelContext.single("cpu"), table_of(config))
    batches = build_validation(config, ParallelContext.single("cpu"))
    assert batches is not None
    step = assembly.step
    loss, figures = Validation(step, batches, config.training, lambda line: None)._validate(1)
    assert loss == step.evaluate(batches)
    width = config.model.seq_length // 4
    losses = []
    for first in range(0, 4 * width, width):
        masked = []
        for batch in batches:
            mask = torch.zeros_like(batch.loss_mask)
            mask[:, first : first + width] = batch.loss_mask[:, first : first + width]
            masked.append(replace(batch, loss_mask=mask))
        losses.append(figures[f"validation_loss_at/{first}-{first + width - 1}"])
        assert losses[-1] == pytest.approx(step.evaluate(masked), rel=1e-5)
    assert len({round(loss, 3) for loss in losses}) > 1  # the parts can be told apart
    row = {"step": 1, "tokens": 1, "tokens_per_second": 1.0, "mfu": None, "loss": loss}
    report = run_report(config, [{**row, "validation_loss": loss, **figures}], "positions")
    assert f"| 0-{width - 1} | {losses[0]:.4f} |" in report.as_markdown()


def test_a_validation_before_the_first_step_is_row_0_and_changes_nothing_else(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny_config(folder, *SHORT, "training.validation_at_start=true", output="from_0")
    pretrain(config)
    assert "validation at step 0: loss" in capsys.readouterr().out
    plain = tiny_config(folder, *SHORT, output="from_1")
    pretrain(plain)
    first, *later = rows_of(config)
    assert (first["step"], first["tokens"]) == (0, 0) and "loss" not in first
    assert later == rows_of(plain)
    uniform = math.log(config.model.vocab_size)
    assert first["validation_loss"] == pytest.approx(uniform, abs=0.05)  # nothing was learned yet

    # A resume goes on without another one; a run that begins anew writes the row once.
    pretrain(change(config, training={"train_steps": 6}))
    assert [row["step"] for row in rows_of(config)] == list(range(7))
    shutil.rmtree(Path(config.training.output_dir) / "checkpoints")
    pretrain(config)
    assert [row["step"] for row in rows_of(config)] == list(range(5))
    run_report(config, read_metrics(Path(config.training.output_dir) / "metrics.jsonl"), "from 0")
    assert summarize(read_run(Path(config.training.output_dir), "a run"))["hours"] is not None

"""Points an hour of a learning-rate sweep, beside the same points by a plain loop, both compiled.

Both are trained by the workers of one pool, one thread each as in `lr_transfer sweep`, and in turn,
so that they see the same machine. What a worker does once (imports, compilation) is left out.
"""

from __future__ import annotations

import math
import os
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from megatron_completep.benchmarks.plain_model import PlainGPT
from megatron_completep.benchmarks.training_benchmark import (
    OURS,
    PLAIN,
    BenchmarkSettings,
    Say,
    bootstrap_ratio,
    run_config,
)
from megatron_completep.completep import table_of
from megatron_completep.config import Config, config_from_mapping
from megatron_completep.config.schema import ModelConfig, SourceConfig
from megatron_completep.data.writer import IndexedWriter
from megatron_completep.instruments.sweep import Grid, Point, run_point
from megatron_completep.instruments.trial import change, read_batches
from megatron_completep.instruments.workers import processes
from megatron_completep.optim.schedule import learning_rate
from megatron_completep.parallel.context import ParallelContext


@dataclass(frozen=True)
class SweepSettings:
    """What is timed: points of a model, of `steps` steps on `batch_size` sequences each.

    points: timed points a worker, after one that is not timed.
    compile: both programs.
    """

    model: ModelConfig
    batch_size: int = 8
    steps: int = 40
    points: int = 4
    workers: int = 2
    compile: bool = True


@dataclass(frozen=True)
class SweepComparison:
    """Points an hour of all workers together.

    ratio: our median seconds a point over the plain loop's, with its 95 % bootstrap interval.
    cpu_time_ratio: the same of the processor time.
    """

    workers: int
    points: int  # that were timed, of each program
    our_points_an_hour: float
    plain_points_an_hour: float
    ratio: float
    ratio_low: float
    ratio_high: float
    cpu_time_ratio: float

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


class PointTime(NamedTuple):
    """One point: the process that trained it, its seconds there, and those of its processors."""

    worker: int
    seconds: float
    processor_seconds: float


def compare_sweeps(settings: SweepSettings, say: Say) -> SweepComparison:
    """Train the same points by both programs in turn; synthetic data, nothing is kept."""
    with tempfile.TemporaryDirectory() as folder:
        points = sweep_points(settings, Path(folder))
        say(f"sweep: {len(points)} points by each program, {settings.workers} at a time")
        with processes(settings.workers) as pool:
            jobs = []
            for point in points:
                # Plain data, which can be sent to another process.
                values = point.config.model_dump(mode="json")
                ours = pool.submit(time_point, values, OURS)
                # Jobs start in this order, so that the two programs see the same machine.
                jobs.append((ours, pool.submit(time_point, values, PLAIN)))
            times = [(ours.result(), plain.result()) for ours, plain in jobs]
    return summarize_sweeps(settings.workers, times)


def sweep_points(settings: SweepSettings, folder: Path) -> list[Point]:
    """The points of a grid of learning rates on random tokens, which are written to `folder`."""
    model = settings.model
    prefix = folder / "random"
    # Enough for one epoch: a sample reads one token more than its length, its last label.
    tokens = settings.steps * settings.batch_size * (model.seq_length + 1)
    generator = np.random.default_rng(1)
    with IndexedWriter(prefix, np.int32) as writer:
        writer.add_document([generator.integers(0, model.vocab_size, tokens)])

    shape = BenchmarkSettings(model, settings.batch_size, compile=settings.compile)
    config = change(
        run_config(shape, "float32"),
        data={"train": [SourceConfig(prefix=str(prefix))]},
        training={"train_steps": settings.steps, "device": "cpu"},
    )
    # One more of each worker than is timed.
    count = settings.workers * (settings.points + 1)
    # Points must differ, but not so much that one of them diverges and ends early.
    rates = [1e-4 * (1 + number / count) for number in range(count)]
    return Grid(rates, seeds=1).points(config)


def time_point(config_values: dict[str, Any], program: str) -> PointTime:
    """Train one point in a worker, on one thread. program: OURS or PLAIN."""
    torch.set_num_threads(1)
    config = config_from_mapping(config_values)
    clock = time.perf_counter()
    processor = time.process_time()
    train = run_point if program == OURS else run_plain_point
    train(config)
    return PointTime(os.getpid(), time.perf_counter() - clock, time.process_time() - processor)


def run_plain_point(config: Config) -> float:
    """The same point by a loop over a plain torch model; returns its last loss."""
    torch.manual_seed(config.training.seed)
    model = PlainGPT(config.model, table_of(config))
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=config.optimizer.base_lr,
        betas=config.optimizer.betas,
        eps=config.optimizer.base_eps,
        weight_decay=config.optimizer.base_weight_decay,
        fused=True,
    )
    forward = torch.compile(model) if config.training.compile else model
    steps = config.training.train_steps
    loss_value = math.nan
    batches = read_batches(config, ParallelContext.single(), steps)
    for step, (batch,) in enumerate(batches, start=1):
        for group in optimizer.param_groups:
            # One rate for all: the table's factors by role cost a step nothing.
            group["lr"] = learning_rate(step, config.optimizer, steps)
        loss = forward(batch.tokens, batch.labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.grad_clip, foreach=True)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss_value = loss.item()
        # As in our sweep, nothing follows a loss without a number.
        if not math.isfinite(loss_value):
            break
    return loss_value


def summarize_sweeps(workers: int, times: Sequence[tuple[PointTime, PointTime]]) -> SweepComparison:
    """times: of our program and of the plain one, in the order in which points were started.

    The first point of a program in each worker is left out: it imports and compiles.
    """
    ours = _without_first([our_time for our_time, _ in times])
    plain = _without_first([plain_time for _, plain_time in times])
    # A worker may have had more points of one program than another; pairs follow one another.
    count = min(len(ours), len(plain))
    our_seconds = [point.seconds for point in ours[:count]]
    plain_seconds = [point.seconds for point in plain[:count]]
    low, high = bootstrap_ratio(our_seconds, plain_seconds)
    our_median = statistics.median(our_seconds)
    plain_median = statistics.median(plain_seconds)
    our_processor = statistics.median(point.processor_seconds for point in ours[:count])
    plain_processor = statistics.median(point.processor_seconds for point in plain[:count])
    return SweepComparison(
        workers=workers,
        points=count,
        our_points_an_hour=3600 * workers / our_median,
        plain_points_an_hour=3600 * workers / plain_median,
        ratio=our_median / plain_median,
        ratio_low=low,
        ratio_high=high,
        cpu_time_ratio=our_processor / plain_processor,
    )


def _without_first(times: Sequence[PointTime]) -> list[PointTime]:
    """The points but each worker's first."""
    by_worker: dict[int, int] = defaultdict(int)
    kept = []
    for point in times:
        if by_worker[point.worker]:
            kept.append(point)
        by_worker[point.worker] += 1
    return kept

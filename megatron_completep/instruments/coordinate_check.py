"""The coordinate check: train models of growing depth or width for a few steps, and see what stays the same size.

Under a right parameterization the residual stream's change on a fixed probe batch does not depend on depth or width. Here models
are trained and measured; coordinate_verdict.py fits exponents and judges them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from megatron_completep.completep import table_of
from megatron_completep.config.schema import Config
from megatron_completep.data.loader import Batch
from megatron_completep.instruments.trial import (
    Design,
    Trial,
    for_short_runs,
    read_batches,
    reshape,
    under,
    with_seed,
)
from megatron_completep.instruments.workers import processes
from megatron_completep.parallel.context import ParallelContext
from megatron_completep.roles import Role
from megatron_completep.telemetry.measure import SumOfSquares, reduce_stream_sums, role_rms

Say = Callable[[str], None]
EPS_STEPS, LARGE_EPS = 3, 1e-2  # a wrong eps shows only when eps is as large as the gradients


@dataclass(frozen=True)
class Measurement:
    """One model: figures by step, from 0 (initial weights) to the last. All are root mean squares over elements."""

    stream: list[float]  # before the final norm, on the probe batch
    stream_change: list[float]  # since step 0
    logits: list[float]
    logits_change: list[float]
    blocks: list[
        dict[str, float]
    ]  # the stream at every norm, by module name, in the order of the model
    gradients: dict[str, float]  # by role, at the first step
    updates: dict[
        str, float
    ]  # by role, over each parameter's own learning rate, mean over the steps
    losses: list[float]  # of the training batches, before each step
    moved: dict[str, float] = field(
        default_factory=dict
    )  # the same updates over the base learning rate


@dataclass(frozen=True)
class Probe:
    """What a model computes on the probe batch: tensors of this rank."""

    streams: dict[str, list[Tensor]]
    logits: list[Tensor]


def run_probe(trial: Trial, batches: Sequence[Batch]) -> Probe:
    """One forward pass without gradients. Communicates as the model does."""
    trial.optimizer.wait_for_parameters()
    with trial.taps.recording() as taps, torch.no_grad():
        if trial.step.pipeline is not None:
            trial.step.evaluate(batches)
            logits = [trial.chunks[-1].unembedding(normed) for normed in taps.normed]  # type: ignore[operator]
        else:
            logits = [trial.chunks[0](batch.tokens.to(trial.context.device)) for batch in batches]
    return Probe(taps.streams, logits)


def _sizes(trial: Trial, now: Probe, before: Probe | None) -> tuple[dict[str, float], float]:
    """(RMS of every stream, RMS of the logits), or of their changes since `before`; the same on every rank."""

    def sums(tensors: list[Tensor], others: list[Tensor] | None) -> SumOfSquares:
        return SumOfSquares.of(
            tensors if others is None else [a - b for a, b in zip(tensors, others, strict=True)]
        )

    # One stream's change at a time: all of them together would be as large as the probe.
    streams = {
        name: sums(tensors, before.streams[name] if before else None)
        for name, tensors in now.streams.items()
    }
    logits = {"logits": sums(now.logits, before.logits if before else None)} if now.logits else {}
    unsharded = replace(trial.context, sequence_parallel=False)
    return reduce_stream_sums(streams, trial.context), reduce_stream_sums(logits, unsharded)[
        "logits"
    ]


def measure(
    trial: Trial, training: Sequence[Sequence[Batch]], probe: Sequence[Batch]
) -> Measurement:
    """Train on the given steps of micro-batches and probe before, between and after."""
    start = run_probe(trial, probe)
    blocks, sizes = [], []
    gradients: dict[str, float] = {}
    updates: list[dict[Role, float]] = []
    moved: list[dict[Role, float]] = []
    losses: list[float] = []
    optimizer = trial.optimizer
    for number in range(len(training) + 1):
        now = run_probe(trial, probe)
        streams, logits = _sizes(trial, now, None)
        changes, logits_change = _sizes(trial, now, start)
        last = list(streams)[-1]
        blocks.append(streams)
        sizes.append((streams[last], changes[last], logits, logits_change))
        if number == len(training):
            break
        before = optimizer.shards.master.clone()
        figures = trial.step.run(training[number], number + 1).read()
        losses.append(figures.loss)
        if number == 0:
            by_role = role_rms(optimizer, optimizer.shards.grad_shard)
            gradients = {str(role): size / figures.counted_tokens for role, size in by_role.items()}
        updates.append(role_rms(optimizer, optimizer.shards.master - before, by_learning_rate=True))
        moved.append(role_rms(optimizer, optimizer.shards.master - before))
    rate = trial.config.optimizer.base_lr
    by_own, by_base = _mean_by_role(updates, rate), _mean_by_role(moved, rate)
    stream, changed = [row[0] for row in sizes], [row[1] for row in sizes]
    outputs, outputs_changed = [row[2] for row in sizes], [row[3] for row in sizes]
    return Measurement(
        stream, changed, outputs, outputs_changed, blocks, gradients, by_own, losses, by_base
    )


def _mean_by_role(steps: Sequence[dict[Role, float]], unit: float) -> dict[str, float]:
    return {str(role): sum(step[role] for step in steps) / len(steps) / unit for role in steps[0]}


@dataclass(frozen=True)
class Sample:
    """One trained model of the check."""

    axis: str  # depth | width
    rule: str  # model | control, or the name of another parameterization that is shown beside them
    hidden_size: int
    num_layers: int
    seed: int
    measured: Measurement
    with_large_eps: Measurement | None = None  # only of the model under check

    @property
    def size(self) -> int:
        return self.num_layers if self.axis == "depth" else self.hidden_size


@dataclass(frozen=True)
class Plan:
    """What to train: the depth axis at the smallest width, the width axis at the smallest depth."""

    depths: Sequence[int]
    widths: Sequence[int]
    steps: int = 10
    seeds: int = 3
    precision: str = "float32"
    check_eps: bool = True
    beside: Sequence[
        str
    ] = ()  # further parameterizations, by their names in PARAMETERIZATIONS: measured and shown, not judged

    def shapes(self) -> Iterable[tuple[str, int, int]]:
        """(axis, hidden_size, num_layers) of every model."""
        if len(self.depths) > 1:
            yield from (("depth", min(self.widths), depth) for depth in self.depths)
        if len(self.widths) > 1:
            yield from (("width", width, min(self.depths)) for width in self.widths)


CONTROLS = {"depth": "mup", "width": "sp"}
# A wrong eps shows only where eps counts; without clipping and decay the updates are Adam's alone.
EPS_SETTINGS = {"base_eps": LARGE_EPS, "base_weight_decay": 0.0, "grad_clip": 0.0}


@dataclass(frozen=True)
class Job:
    """One model to train: `steps` steps, and the step after them is the probe. Travels between processes."""

    rule: str  # as in Sample, and "large eps": the model under check once more
    config: Config
    design: Design
    steps: int
    precision: str
    optimizer: dict[str, Any] = field(default_factory=dict)


Run = Callable[[Sequence[Job]], Iterator[Measurement]]  # in the order of the jobs


def in_turn(context: ParallelContext) -> Run:
    """One model after the other, on all ranks of the layout."""
    return lambda jobs: (train(job, context) for job in jobs)


def in_workers(workers: int, device: str) -> Run:
    """Several models at once, in processes of one thread each."""

    def run(jobs: Sequence[Job]) -> Iterator[Measurement]:
        with processes(workers) as pool:
            yield from pool.map(_train_alone, jobs, [device] * len(jobs))

    return run


def _train_alone(job: Job, device: str) -> Measurement:
    torch.set_num_threads(1)
    return train(job, ParallelContext.single(device))


def train(job: Job, context: ParallelContext) -> Measurement:
    """One model from its initial weights on."""
    short = for_short_runs(job.config, job.steps + 1, job.precision, **job.optimizer)
    batches = read_batches(short, context, job.steps + 1)
    return measure(
        Trial.build(short, context, job.design), batches[: job.steps], batches[job.steps]
    )


def jobs_of(config: Config, plan: Plan, design: Design, axis: str) -> list[Job]:
    """The model of one shape and seed in all the rules that are wanted. `design` is the model under check; others take the right table."""
    right = replace(design, make_table=table_of)
    jobs = [Job("model", config, design, plan.steps, plan.precision)]
    if plan.check_eps:
        jobs.append(Job("large eps", config, design, EPS_STEPS, plan.precision, EPS_SETTINGS))
    jobs.append(Job("control", under(config, CONTROLS[axis]), right, plan.steps, plan.precision))
    return jobs + [
        Job(rule, under(config, rule), right, plan.steps, plan.precision) for rule in plan.beside
    ]


def collect(
    config: Config, plan: Plan, run: Run, design: Design | None = None, say: Say = lambda text: None
) -> list[Sample]:
    """Train and measure every model of the plan."""
    cases = []
    for axis, width, depth in plan.shapes():
        shaped = [with_seed(reshape(config, width, depth), seed) for seed in range(plan.seeds)]
        cases += [
            (axis, width, depth, seed, jobs_of(shaped[seed], plan, design or Design(), axis))
            for seed in range(plan.seeds)
        ]
    measurements = run([job for *_, jobs in cases for job in jobs])
    samples = []
    for axis, width, depth, seed, jobs in cases:
        found = {job.rule: next(measurements) for job in jobs}
        eps = found.pop("large eps", None)
        samples += [
            Sample(axis, rule, width, depth, seed, one, eps if rule == "model" else None)
            for rule, one in found.items()
        ]
        own, other = found["model"], found["control"]
        changes = f"change {own.stream_change[-1]:.4g}, control {other.stream_change[-1]:.4g}"
        say(f"{axis}: {depth} layers x {width}, seed {seed}: stream {own.stream[0]:.4g}, {changes}")
    return samples

"""The coordinate check: train models of growing depth or width and see what keeps its size.

Under a right parameterization the change of the residual stream on a fixed probe batch depends
neither on depth nor on width, nor on the number of experts at a fixed share k / E. Here models are
trained for a few steps and measured; coordinate_verdict.py fits exponents and judges them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any, cast

import torch
from torch import Tensor

from megatron_completep.completep import table_of
from megatron_completep.config.schema import Config
from megatron_completep.data.loader import Batch
from megatron_completep.instruments.expert_taps import ExpertProbe, expert_figures
from megatron_completep.instruments.mistakes import MISTAKES, table_with
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
from megatron_completep.model.gpt import GPT
from megatron_completep.optim.optimizer import DistributedOptimizer
from megatron_completep.parallel.context import ParallelContext
from megatron_completep.roles import Role
from megatron_completep.telemetry.measure import SumOfSquares, reduce_stream_sums, role_rms

Say = Callable[[str], None]
# A wrong eps shows only when eps is as large as the gradients.
EPS_STEPS = 3
LARGE_EPS = 1e-2


@dataclass(frozen=True)
class Measurement:
    """Figures of one model, root mean squares over elements except for the losses.

    Lists are by step, from step 0 (the initial weights) to the last.
    """

    stream: list[float]  # before the final norm, on the probe batch
    stream_change: list[float]  # since step 0
    logits: list[float]
    logits_change: list[float]
    # The stream at every norm by module name, in the order of the model.
    blocks: list[dict[str, float]]
    gradients: dict[str, float]  # by role, at the first step
    # By role: the update over each parameter's own learning rate, mean over the steps.
    updates: dict[str, float]
    losses: list[float]  # of the training batches, before each step
    # The same updates over the base learning rate.
    moved: dict[str, float] = field(default_factory=dict)
    # Of mixtures of experts, by quantity (expert_taps.py); empty without any.
    experts: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Probe:
    """What a model computes on the probe batch: the tensors that this rank has."""

    streams: dict[str, list[Tensor]]
    logits: list[Tensor]  # empty on all pipeline stages but the last one
    experts: ExpertProbe


def run_probe(trial: Trial, batches: Sequence[Batch]) -> Probe:
    """One forward pass without gradients. Communicates as the model's forward pass does."""
    trial.optimizer.wait_for_parameters()
    recording = trial.expert_taps.recording()
    with trial.taps.recording() as taps, recording as experts, torch.no_grad():
        if trial.step.pipeline is not None:
            # The schedule returns the loss alone, so logits are made of what the final norm gave.
            # Only the last stage has that norm, and an unembedding.
            trial.step.evaluate(batches)
            last_chunk = cast(GPT, trial.chunks[-1])
            logits = [last_chunk.unembedding(normed) for normed in taps.normed]
        else:
            model = trial.chunks[0]
            part = trial.context.context_part
            device = trial.context.device
            logits = [model(part.cut(batch.tokens).to(device)) for batch in batches]
    return Probe(taps.streams, logits, experts)


def _sum_of_squares(tensors: list[Tensor], start: list[Tensor] | None) -> SumOfSquares:
    """The sum over the tensors, or over their differences from `start`."""
    if start is None:
        return SumOfSquares.of(tensors)
    return SumOfSquares.of([a - b for a, b in zip(tensors, start, strict=True)])


def _probe_rms(trial: Trial, now: Probe, start: Probe | None) -> tuple[dict[str, float], float]:
    """(RMS of the stream by site, RMS of the logits), or of their changes since `start`.

    Communicates over all ranks of the layout, and gives the same on every rank.
    """
    # One stream's change at a time: all of them together would be as large as the probe.
    stream_sums = {}
    for site, tensors in now.streams.items():
        stream_sums[site] = _sum_of_squares(tensors, start.streams[site] if start else None)
    logits_sums = {}
    if now.logits:
        logits_sums["logits"] = _sum_of_squares(now.logits, start.logits if start else None)

    # Every tensor rank has the logits of the whole sequence: adding them up would count them twice.
    unsharded = replace(trial.context, sequence_parallel=False)
    stream_rms = reduce_stream_sums(stream_sums, trial.context)
    logits_rms = reduce_stream_sums(logits_sums, unsharded)
    return stream_rms, logits_rms["logits"]


@dataclass
class _ProbeSeries:
    """RMS of what the probe computes, by step; the fields are those of Measurement."""

    stream: list[float] = field(default_factory=list)
    stream_change: list[float] = field(default_factory=list)
    logits: list[float] = field(default_factory=list)
    logits_change: list[float] = field(default_factory=list)
    blocks: list[dict[str, float]] = field(default_factory=list)

    def append(self, trial: Trial, now: Probe, start: Probe) -> None:
        """Add one step. Communicates over all ranks of the layout."""
        streams, logits = _probe_rms(trial, now, None)
        changes, logits_change = _probe_rms(trial, now, start)
        # Sites are in the order of the model, so the last one is the input of the final norm.
        final_site = list(streams)[-1]
        self.stream.append(streams[final_site])
        self.stream_change.append(changes[final_site])
        self.logits.append(logits)
        self.logits_change.append(logits_change)
        self.blocks.append(streams)


def measure(
    trial: Trial, training: Sequence[Sequence[Batch]], probe: Sequence[Batch]
) -> Measurement:
    """Train one step on each list of micro-batches, and run the probe before, between and after.

    Communicates over all ranks of the layout, and gives the same on every rank.
    """
    optimizer = trial.optimizer
    start = run_probe(trial, probe)
    series = _ProbeSeries()
    gradients: dict[str, float] = {}
    updates: list[dict[Role, float]] = []
    moved: list[dict[Role, float]] = []
    losses: list[float] = []

    before_step = start
    for step, micro_batches in enumerate(training, start=1):
        before_step = run_probe(trial, probe)
        series.append(trial, before_step, start)
        master_before = optimizer.shards.master.clone()
        figures = trial.step.run(micro_batches, step).read()
        losses.append(figures.loss)
        if step == 1:
            gradients = _gradient_rms(optimizer, figures.counted_tokens)
        # Updates are read off the master weights: weights in bf16 round small ones away.
        change = optimizer.shards.master - master_before
        updates.append(role_rms(optimizer, change, by_learning_rate=True))
        moved.append(role_rms(optimizer, change))
    end = run_probe(trial, probe)
    series.append(trial, end, start)

    base_lr = trial.config.optimizer.base_lr
    return Measurement(
        series.stream,
        series.stream_change,
        series.logits,
        series.logits_change,
        series.blocks,
        gradients,
        _mean_by_role(updates, base_lr),
        losses,
        _mean_by_role(moved, base_lr),
        expert_figures(start.experts, before_step.experts, end.experts, trial.context),
    )


def _gradient_rms(optimizer: DistributedOptimizer, counted_tokens: int) -> dict[str, float]:
    """By role: RMS of the gradient of the loss a token."""
    # What was accumulated is the gradient of the sum over tokens.
    rms_by_role = role_rms(optimizer, optimizer.shards.grad_shard)
    return {str(role): rms / counted_tokens for role, rms in rms_by_role.items()}


def _mean_by_role(steps: Sequence[dict[Role, float]], unit: float) -> dict[str, float]:
    """By role: the mean over the steps, in multiples of `unit`."""
    means = {}
    for role in steps[0]:
        total = sum(by_role[role] for by_role in steps)
        means[str(role)] = total / len(steps) / unit
    return means


@dataclass(frozen=True)
class Sample:
    """One trained model of the check."""

    axis: str  # depth | width | experts
    rule: str  # model | control, or the name of a parameterization that is shown beside them
    hidden_size: int
    num_layers: int
    seed: int
    measured: Measurement
    with_large_eps: Measurement | None = None  # of the model under check and of a wrong eps
    num_experts: int = 0  # 0: without any

    @property
    def size(self) -> int:
        """The number of layers, the hidden size or the number of experts: what the axis varies."""
        sizes = {"depth": self.num_layers, "width": self.hidden_size, "experts": self.num_experts}
        return sizes[self.axis]


@dataclass(frozen=True)
class Plan:
    """What to train: each axis at the smallest size of the others.

    experts: numbers of experts, of which a token goes to the configuration's share; empty: its own
        number, and no such axis.
    beside: further rules that are measured and shown but not judged, by their names in
    PARAMETERIZATIONS, or in MISTAKES for a model that Muon trains.
    """

    depths: Sequence[int]
    widths: Sequence[int]
    steps: int = 10
    seeds: int = 3
    precision: str = "float32"
    check_eps: bool = True
    beside: Sequence[str] = ()
    experts: Sequence[int] = ()

    def shapes(self) -> Iterable[tuple[str, int, int, int]]:
        """(axis, hidden_size, num_layers, num_experts or 0) of every model."""
        fewest = min(self.experts, default=0)
        if len(self.depths) > 1:
            for depth in self.depths:
                yield "depth", min(self.widths), depth, fewest
        if len(self.widths) > 1:
            for width in self.widths:
                yield "width", width, min(self.depths), fewest
        if len(self.experts) > 1:
            for number in self.experts:
                yield "experts", min(self.widths), min(self.depths), number


CONTROLS = {"depth": "mup", "width": "sp", "experts": "experts_summed"}
# The rules that are also trained with a large eps: what is under check, and a wrong eps.
WITH_LARGE_EPS = ("model", "experts_eps")
# A wrong eps shows only where eps counts; without clipping and decay the updates are Adam's alone.
EPS_SETTINGS = {"base_eps": LARGE_EPS, "base_weight_decay": 0.0, "grad_clip": 0.0}


@dataclass(frozen=True)
class Job:
    """One model to train for `steps` steps; one more batch is the probe. Is sent to processes."""

    rule: str  # as in Sample
    config: Config
    design: Design
    steps: int
    precision: str
    optimizer: dict[str, Any] = field(default_factory=dict)
    large_eps: bool = False  # once more, with another eps


Run = Callable[[Sequence[Job]], Iterator[Measurement]]  # in the order of the jobs


def in_turn(context: ParallelContext) -> Run:
    """Train one model after the other, on all ranks of the layout."""
    return lambda jobs: (train(job, context) for job in jobs)


def in_workers(workers: int, device: str) -> Run:
    """Train several models at once, each in a process of one thread."""

    def run(jobs: Sequence[Job]) -> Iterator[Measurement]:
        with processes(workers) as pool:
            yield from pool.map(_train_alone, jobs, [device] * len(jobs))

    return run


def _train_alone(job: Job, device: str) -> Measurement:
    torch.set_num_threads(1)
    return train(job, ParallelContext.single(device))


def train(job: Job, context: ParallelContext) -> Measurement:
    """Train and measure one model from its initial weights on.

    Communicates over all ranks of the layout. Raises ConfigError for a model with a parameter that
    declares no role, DataError where token files are missing.
    """
    batch_count = job.steps + 1
    config = for_short_runs(job.config, batch_count, job.precision, **job.optimizer)
    batches = read_batches(config, context, batch_count)
    trial = Trial.build(config, context, job.design)
    return measure(trial, batches[: job.steps], batches[job.steps])


def jobs_of(config: Config, plan: Plan, design: Design, axis: str) -> list[Job]:
    """One shape and seed in all the rules that the plan names.

    `design` is the model under check; the control and the rules beside it take the right table, or
    that with a mistake.
    """
    rules = {"model": "own", "control": CONTROLS[axis], **{rule: rule for rule in plan.beside}}
    jobs = []
    for name, rule in rules.items():
        ruled, maker = _ruled(config, design, rule)
        jobs.append(Job(name, ruled, maker, plan.steps, plan.precision))
        if plan.check_eps and name in WITH_LARGE_EPS:
            large = (EPS_STEPS, plan.precision, EPS_SETTINGS)
            jobs.append(Job(name, ruled, maker, *large, large_eps=True))
    return jobs


def _ruled(config: Config, design: Design, rule: str) -> tuple[Config, Design]:
    """The configuration and the design under a rule: `own`, a parameterization or a mistake."""
    if rule == "own":
        return config, design
    if rule in MISTAKES:
        return config, replace(design, make_table=table_with(rule))
    return under(config, rule), replace(design, make_table=table_of)


@dataclass(frozen=True)
class _Case:
    """One shape and seed, with its jobs in all rules."""

    axis: str
    width: int
    depth: int
    num_experts: int
    seed: int
    jobs: list[Job]


def _cases_of(config: Config, plan: Plan, design: Design) -> list[_Case]:
    cases = []
    for axis, width, depth, number in plan.shapes():
        shaped = reshape(config, width, depth, number)
        moe = shaped.model.moe
        num_experts = 0 if moe is None else moe.num_experts
        for seed in range(plan.seeds):
            jobs = jobs_of(with_seed(shaped, seed), plan, design, axis)
            cases.append(_Case(axis, width, depth, num_experts, seed, jobs))
    return cases


def collect(
    config: Config, plan: Plan, run: Run, design: Design | None = None, say: Say = lambda text: None
) -> list[Sample]:
    """Train and measure every model of the plan; `say` gets one line a shape and seed.

    Communicates over all ranks of the layout that `run` trains on. Raises ConfigError for a shape
    that the configuration does not allow, before anything is trained.
    """
    cases = _cases_of(config, plan, design or Design())
    # All jobs at once, so that workers never wait for the end of a case.
    measurements = run(list(chain.from_iterable(case.jobs for case in cases)))

    samples = []
    for case in cases:
        measured: dict[str, Measurement] = {}
        # The runs with a large eps are no rules of their own but further figures of theirs.
        with_large_eps: dict[str, Measurement] = {}
        for job in case.jobs:
            by_rule = with_large_eps if job.large_eps else measured
            by_rule[job.rule] = next(measurements)
        for rule, measurement in measured.items():
            sample = Sample(
                case.axis,
                rule,
                case.width,
                case.depth,
                case.seed,
                measurement,
                with_large_eps.get(rule),
                case.num_experts,
            )
            samples.append(sample)
        say(_progress_line(case, measured["model"], measured["control"]))
    return samples


def _progress_line(case: _Case, model: Measurement, control: Measurement) -> str:
    experts = f", {case.num_experts} experts" if case.num_experts else ""
    shape = f"{case.axis}: {case.depth} layers x {case.width}{experts}, seed {case.seed}"
    changes = f"change {model.stream_change[-1]:.4g}, control {control.stream_change[-1]:.4g}"
    return f"{shape}: stream {model.stream[0]:.4g}, {changes}"

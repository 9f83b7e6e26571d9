"""The coordinate check: train models of growing depth or width for a few steps, and see what stays the same size.

Under a right parameterization the residual stream's change on a fixed probe batch does not depend on depth or width. Each quantity
is fitted with a power of the depth (or width) and its exponent compared with a band; a model that is known to be wrong (muP over
depth, SP over width) runs beside it and must leave the band, or the check cannot tell. Bands: docs/instruments.md.
"""

from __future__ import annotations

import math
import multiprocessing
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from enum import IntEnum
from typing import Any

import torch
from torch import Tensor

from megatron_completep.analysis.fits import Estimate, log_log_slope, mean_estimate
from megatron_completep.analysis.trial import Design, Trial, for_short_runs, read_batches, reshape, under, with_seed
from megatron_completep.completep import Role, table_for
from megatron_completep.config.schema import Config
from megatron_completep.data.loader import Batch
from megatron_completep.parallel.context import ParallelContext
from megatron_completep.training.measure import SumOfSquares, reduce_stream_sums, role_rms

Say = Callable[[str], None]
BLOCK_ROLES = (Role.PRE_NORM, Role.HIDDEN_WEIGHT, Role.HIDDEN_BIAS)
EPS_STEPS, LARGE_EPS = 3, 1e-2  # a wrong eps shows only when eps is as large as the gradients


class Verdict(IntEnum):
    """Exit codes of the check."""

    RIGHT = 0
    WRONG = 1
    CANNOT_TELL = 3


@dataclass(frozen=True)
class Measurement:
    """One model: figures by step, from 0 (initial weights) to the last. All are root mean squares over elements."""

    stream: list[float]  # before the final norm, on the probe batch
    stream_change: list[float]  # since step 0
    logits: list[float]
    logits_change: list[float]
    blocks: list[dict[str, float]]  # the stream at every norm, by module name, in the order of the model
    gradients: dict[str, float]  # by role, at the first step
    updates: dict[str, float]  # by role, over each parameter's own learning rate, mean over the steps
    losses: list[float]  # of the training batches, before each step
    moved: dict[str, float] = field(default_factory=dict)  # the same updates over the base learning rate


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
    streams, logits = now.streams, now.logits
    if before is not None:
        streams = {name: [a - b for a, b in zip(tensors, before.streams[name], strict=True)] for name, tensors in streams.items()}
        logits = [a - b for a, b in zip(logits, before.logits, strict=True)]
    stream_sizes = reduce_stream_sums({name: SumOfSquares.of(tensors) for name, tensors in streams.items()}, trial.context)
    unsharded = replace(trial.context, sequence_parallel=False)
    logit_sizes = reduce_stream_sums({"logits": SumOfSquares.of(logits)} if logits else {}, unsharded)
    return stream_sizes, logit_sizes["logits"]


def measure(trial: Trial, training: Sequence[Sequence[Batch]], probe: Sequence[Batch]) -> Measurement:
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
        before = optimizer.master.clone()
        figures = trial.step.run(training[number], number + 1).read()
        losses.append(figures.loss)
        if number == 0:
            gradients = {str(role): value / figures.counted_tokens for role, value in role_rms(optimizer, optimizer.grad_shard).items()}
        updates.append(role_rms(optimizer, optimizer.master - before, by_learning_rate=True))
        moved.append(role_rms(optimizer, optimizer.master - before))
    rate = trial.config.optimizer.base_lr
    by_own, by_base = _mean_by_role(updates, rate), _mean_by_role(moved, rate)
    stream, changed = [row[0] for row in sizes], [row[1] for row in sizes]
    outputs, outputs_changed = [row[2] for row in sizes], [row[3] for row in sizes]
    return Measurement(stream, changed, outputs, outputs_changed, blocks, gradients, by_own, losses, by_base)


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
    beside: Sequence[str] = ()  # further parameterizations, by their names in PARAMETERIZATIONS: measured and shown, not judged

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
        with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
            try:
                yield from pool.map(_train_alone, jobs, [device] * len(jobs))
            except BaseException:
                pool.shutdown(wait=True, cancel_futures=True)
                raise

    return run


def _train_alone(job: Job, device: str) -> Measurement:
    torch.set_num_threads(1)
    return train(job, ParallelContext.single(device))


def train(job: Job, context: ParallelContext) -> Measurement:
    """One model from its initial weights on."""
    short = for_short_runs(job.config, job.steps + 1, job.precision, **job.optimizer)
    batches = read_batches(short, context, job.steps + 1)
    return measure(Trial.build(short, context, job.design), batches[: job.steps], batches[job.steps])


def jobs_of(config: Config, plan: Plan, design: Design, axis: str) -> list[Job]:
    """The model of one shape and seed in all the rules that are wanted. `design` is the model under check; others take the right table."""
    right = replace(design, make_table=table_for)
    jobs = [Job("model", config, design, plan.steps, plan.precision)]
    if plan.check_eps:
        jobs.append(Job("large eps", config, design, EPS_STEPS, plan.precision, EPS_SETTINGS))
    jobs.append(Job("control", under(config, CONTROLS[axis]), right, plan.steps, plan.precision))
    return jobs + [Job(rule, under(config, rule), right, plan.steps, plan.precision) for rule in plan.beside]


def collect(config: Config, plan: Plan, run: Run, design: Design | None = None, say: Say = lambda text: None) -> list[Sample]:
    """Train and measure every model of the plan."""
    cases = []
    for axis, width, depth in plan.shapes():
        shaped = [with_seed(reshape(config, width, depth), seed) for seed in range(plan.seeds)]
        cases += [(axis, width, depth, seed, jobs_of(shaped[seed], plan, design or Design(), axis)) for seed in range(plan.seeds)]
    measurements = run([job for *_, jobs in cases for job in jobs])
    samples = []
    for axis, width, depth, seed, jobs in cases:
        found = {job.rule: next(measurements) for job in jobs}
        eps = found.pop("large eps", None)
        samples += [Sample(axis, rule, width, depth, seed, one, eps if rule == "model" else None) for rule, one in found.items()]
        own, other = found["model"], found["control"]
        changes = f"change {own.stream_change[-1]:.4g}, control {other.stream_change[-1]:.4g}"
        say(f"{axis}: {depth} layers x {width}, seed {seed}: stream {own.stream[0]:.4g}, {changes}")
    return samples


@dataclass(frozen=True)
class Band:
    """A quantity's exponent and where a right model's lies. Without bounds it is only reported.

    Small widths, large initial weights and few depths bend a right model's curve by up to MARGIN: so far beyond the band nothing is said.
    """

    axis: str
    quantity: str
    low: float = -math.inf
    high: float = math.inf


MARGIN = 0.1
BANDS = (
    Band("depth", "stream at init"),
    Band("depth", "stream change", -0.2, 0.2),
    Band("depth", "logits at init"),
    Band("depth", "logits change"),
    Band("depth", "update with large eps, in blocks", -0.25, 0.25),
    Band("depth", "update with large eps, outside", -0.25, 0.25),
    Band("depth", "update, hidden matrices", -0.25, 0.25),
    Band("depth", "update, outside", -0.25, 0.25),
    Band("depth", "gradient, hidden matrices"),  # -alpha, the reason for eps * m_L^-alpha
    Band("depth", "gradient, outside"),  # 0
    Band("width", "stream at init", -0.25, 0.25),
    Band("width", "stream change", -0.35, 0.25),
    Band("width", "logits at init", -0.75, -0.25),
    Band("width", "logits change", -0.25, 0.25),
    Band("width", "update with large eps, in blocks", -0.25, 0.25),
    Band("width", "update with large eps, outside", -0.25, 0.25),
    Band("width", "update, hidden matrices", -1.25, -0.75),
    Band("width", "update, outside", -0.25, 0.25),
    Band("width", "gradient, hidden matrices"),  # about -1.15, and outside about -1.1: the reason for eps / m_N
    Band("width", "gradient, outside"),
)
DECISIVE = "stream change"  # what the control must get wrong
CONTROL_AT_LEAST, CONTROL_GAP = 0.5, 0.4


def quantity(name: str, sample: Sample) -> float | None:
    """A figure of one model; None where it was not measured."""
    measured = sample.measured
    if name.startswith(("update", "gradient")):
        with_eps = sample.with_large_eps.updates if sample.with_large_eps else {}
        found = with_eps if "large eps" in name else measured.moved if name.startswith("update") else measured.gradients
        # The roles with the most elements speak for their kind: hidden matrices, and the unembedding.
        roles = (Role.UNEMBEDDING, Role.EMBEDDING) if name.endswith("outside") else (Role.HIDDEN_WEIGHT,)
        return next((found[role] for role in roles if role in found), None)
    values = {
        "stream at init": measured.stream[0],
        "stream change": measured.stream_change[-1],
        "logits at init": measured.logits[0],
        "logits change": measured.logits_change[-1],
    }
    return values[name]


@dataclass(frozen=True)
class Finding:
    """One row of the table."""

    band: Band
    model: Estimate
    control: Estimate | None
    passed: bool | None  # None: only reported
    beside: dict[str, Estimate] = field(default_factory=dict)  # by parameterization

    @property
    def wrong(self) -> bool:
        """Beyond the band and its margin (an exponent that is no number is)."""
        return self.passed is False and not self.band.low - MARGIN <= self.model.value <= self.band.high + MARGIN


@dataclass(frozen=True)
class Result:
    """The whole check."""

    verdict: Verdict
    reason: str
    findings: list[Finding]
    samples: list[Sample] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "verdict": self.verdict.name.lower(), "exit_code": int(self.verdict)}


def judge(samples: Sequence[Sample], alpha: float = 1.0) -> Result:
    """Fit exponents over each axis, seed by seed, and compare them with the bands; `alpha` is the model's."""
    findings = []
    others = [rule for rule in dict.fromkeys(s.rule for s in samples) if rule not in ("model", "control")]
    for band in (_shifted(band, alpha) for band in BANDS):
        model = exponent(samples, band, "model")
        if model is None:
            continue
        bounded = math.isfinite(band.low)
        passed = band.low <= model.value <= band.high if bounded else None
        found = {rule: exponent(samples, band, rule) for rule in others}
        beside = {rule: estimate for rule, estimate in found.items() if estimate is not None}
        findings.append(Finding(band, model, exponent(samples, band, "control"), passed, beside))
    verdict, reason = _verdict(findings)
    return Result(verdict, reason, findings, list(samples))


def _shifted(band: Band, alpha: float) -> Band:
    """Hidden matrices learn with m_L^(alpha - 1)."""
    if (band.axis, band.quantity) != ("depth", "update, hidden matrices"):
        return band
    return replace(band, low=band.low + alpha - 1, high=band.high + alpha - 1)


def exponent(samples: Sequence[Sample], band: Band, rule: str) -> Estimate | None:
    """The exponent of one quantity, mean over seeds; None where it was not measured."""
    chosen = [s for s in samples if s.axis == band.axis and s.rule == rule]
    slopes = []
    for seed in sorted({s.seed for s in chosen}):
        pairs = [(s.size, quantity(band.quantity, s)) for s in chosen if s.seed == seed]
        if any(value is None for _, value in pairs):
            return None
        slopes.append(log_log_slope([size for size, _ in pairs], [value for _, value in pairs if value is not None]))
    return mean_estimate(slopes) if slopes else None


def _verdict(findings: Sequence[Finding]) -> tuple[Verdict, str]:
    if wrong := [f for f in findings if f.wrong]:
        return Verdict.WRONG, "wrong: " + _outside(wrong)
    if near := [f for f in findings if f.passed is False]:
        remedy = "Use more depths or widths, a smaller learning rate or smaller initial weights."
        return Verdict.CANNOT_TELL, f"cannot tell: {_outside(near)}, which a right model may show too. {remedy}"
    if not any(f.band.quantity == DECISIVE for f in findings):
        return Verdict.CANNOT_TELL, "cannot tell: give at least two depths or two widths"
    for finding in findings:
        if finding.band.quantity != DECISIVE or finding.control is None:
            continue
        control, gap = finding.control.value, finding.control.value - finding.model.value
        if not (control >= CONTROL_AT_LEAST and gap >= CONTROL_GAP):
            return Verdict.CANNOT_TELL, (
                f"cannot tell: the control's {DECISIVE} over {finding.band.axis} has the exponent {control:+.2f}, {gap:+.2f} from the "
                f"model's; a wrong model must show at least +{CONTROL_AT_LEAST} and +{CONTROL_GAP} more. "
                "Use more depths or widths, or a larger learning rate."
            )
    return Verdict.RIGHT, "right: every exponent is in its band, and the control's is not"


def _outside(findings: Sequence[Finding]) -> str:
    return "; ".join(
        f"{f.band.quantity} over {f.band.axis} {f.model.value:+.2f} outside [{f.band.low:+.2f}, {f.band.high:+.2f}]" for f in findings
    )

"""Do float8 scales that were measured on a proxy hold at the target?

Under CompleteP the sizes of activations follow the table and do not change with width and depth;
gradients shrink by what the table multiplies in the forward pass. Here models of growing width and
depth are trained with dynamic scales, and the largest magnitude of every operand is recorded. From
the smallest model's follow static scales for all others, which are trained once more with those.

Static scales hold at a shape if at most `MOST_SATURATED` of the elements of any kind of operand are
cut off, and the loss differs from that under dynamic scales by less than the seeds' s.d. Weights
keep their dynamic scales: they are rounded once a step anyway.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import fmean, stdev
from typing import Any

import torch
from torch import Tensor, nn

from megatron_completep.completep import table_of
from megatron_completep.config.float8_rules import MULTIPLE
from megatron_completep.config.schema import Config
from megatron_completep.instruments.coordinate_check import Plan
from megatron_completep.instruments.fits import log_log_slope
from megatron_completep.instruments.trial import (
    Trial,
    change,
    for_short_runs,
    read_batches,
    reshape,
    under,
    with_seed,
)
from megatron_completep.instruments.workers import processes
from megatron_completep.parallel.axis import Axis
from megatron_completep.parallel.context import ParallelContext
from megatron_completep.parallel.float8 import GRADIENT, Dynamic, Float8Matrix, Scaling
from megatron_completep.parallel.linear import ColumnParallelLinear, RowParallelLinear

Say = Callable[[str], None]
TIMES = (0.0, 0.1, 0.5, 1.0)  # of a run, when magnitudes are taken
HEADROOM = 4.0  # between the largest magnitude that the proxy had and where static scales cut off
MOST_SATURATED = 1e-6
CONTROL = "sp"  # what the proxy's scales must not hold for
LAST = 0.1  # of a run, over which training losses are averaged
HOLD = 0
DO_NOT = 1
CANNOT_TELL = 3


class Recorder:
    """Dynamic scales; keeps the largest magnitude of every operand since `take`."""

    def __init__(self) -> None:
        self._dynamic = Dynamic()
        self._largest: dict[str, Tensor] = {}

    def largest(self, matrix: Float8Matrix, kind: str, x: Tensor, axis: Axis | None) -> Tensor:
        amax = self._dynamic.largest(matrix, kind, x, axis)
        site = f"{matrix.name} {kind}"
        before = self._largest.get(site, amax)
        self._largest[site] = torch.maximum(before, amax)
        return amax

    def take(self) -> dict[str, float]:
        """By site: a layer's name without its number, and the kind of operand."""
        taken = {site: amax.item() for site, amax in self._largest.items()}
        self._largest.clear()
        return taken


class Static:
    """Magnitudes that were laid down before; counts the elements beyond them."""

    def __init__(self, bounds: Mapping[str, float]):
        self._bounds = {site: torch.tensor(bound) for site, bound in bounds.items()}
        self._elements: dict[str, int] = {}
        self._saturated: dict[str, Tensor] = {}

    def largest(self, matrix: Float8Matrix, kind: str, x: Tensor, axis: Axis | None) -> Tensor:
        site = f"{matrix.name} {kind}"
        bound = self._bounds[site]
        beyond = (x.abs() > cut_off(bound.item(), kind)).sum()
        self._elements[site] = self._elements.get(site, 0) + x.numel()
        self._saturated[site] = (
            self._saturated.get(site, torch.zeros((), dtype=torch.int64)) + beyond
        )
        return bound

    def shares(self) -> dict[str, float]:
        """By site: the part of all elements that was cut off."""
        return {site: int(self._saturated[site]) / n for site, n in self._elements.items()}


def cut_off(bound: float, kind: str) -> float:
    """The largest number that the scale of `bound` leaves, at least `bound`."""
    largest = torch.finfo(torch.float8_e5m2 if kind == GRADIENT else torch.float8_e4m3fn).max
    _, exponent = math.frexp(bound / largest)
    return float(math.ldexp(largest, exponent))


@dataclass(frozen=True)
class ScaleJob:
    """One model to train. Is sent to processes. bounds: of static scales; None: dynamic ones."""

    rule: str  # model | control
    axis: str
    config: Config
    steps: int
    precision: str
    seed: int
    bounds: Mapping[str, float] | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(hidden size, layers)."""
        return self.config.model.hidden_size, self.config.model.num_layers


@dataclass(frozen=True)
class Run:
    """What was seen of one model.

    amax: by site: the largest magnitude at each of `TIMES`; of dynamic scales alone.
    saturated: by site: the part of the elements that was cut off; of static scales alone.
    loss: mean over the last tenth of the steps.
    """

    rule: str
    axis: str
    shape: tuple[int, int]
    seed: int
    factor: float  # what the table multiplies a gradient by on its way to the matrices
    loss: float
    amax: dict[str, list[float]] = field(default_factory=dict)
    saturated: dict[str, float] = field(default_factory=dict)


def train(job: ScaleJob, device: str = "cpu") -> Run:
    """Train one model from its initial weights on, in this process alone.

    Raises DataError where token files are missing.
    """
    context = ParallelContext.single(device)
    config = settings_of(job)
    recorder = Recorder()
    static = None if job.bounds is None else Static(job.bounds)
    trial = Trial.build(config, context)
    use_scaling(trial.chunks, static or recorder)

    batches = read_batches(config, context, job.steps)
    moments = [max(1, round(time * job.steps)) for time in TIMES]
    amax: dict[str, list[float]] = {}
    losses = []
    for step, micro_batches in enumerate(batches, start=1):
        losses.append(trial.step.run(micro_batches, step).read().loss)
        taken = recorder.take()
        for _ in range(moments.count(step)):
            for site, magnitude in taken.items():
                amax.setdefault(site, []).append(magnitude)
    return Run(
        job.rule,
        job.axis,
        job.shape,
        job.seed,
        gradient_factor(config),
        fmean(losses[-max(1, round(LAST * job.steps)) :]),
        amax,
        {} if static is None else static.shares(),
    )


def settings_of(job: ScaleJob) -> Config:
    """A whole run's, with its warm-up and decay; every matrix in float8, however small."""
    names = ("schedule", "warmup_steps", "warmup_fraction")
    schedule = {name: getattr(job.config.optimizer, name) for name in names}
    float8 = {
        "float8": "tensorwise",
        "float8_least_size": MULTIPLE,
        "float8_weight_gradient": job.config.training.float8_weight_gradient,
    }
    short = for_short_runs(job.config, job.steps, job.precision)
    return change(short, optimizer=schedule, training=float8)


def _train_alone(job: ScaleJob, device: str) -> Run:
    torch.set_num_threads(1)
    return train(job, device)


def use_scaling(chunks: Sequence[nn.Module], scaling: Scaling) -> None:
    """Hand the matrices of a model other scales, and the names of their layers."""
    for chunk in chunks:
        for name, module in chunk.named_modules():
            if not isinstance(module, ColumnParallelLinear | RowParallelLinear):
                continue
            products = module.context.products
            if isinstance(products, Float8Matrix):
                parts = [part for part in name.split(".") if not part.isdigit()]
                products.name = ".".join(parts[1:])
                products.scaling = scaling


def gradient_factor(config: Config) -> float:
    """What the table multiplies in the forward pass, beside the proxy's: logits and branches."""
    table = table_of(config)
    model = config.model
    logits = table.logit_multiplier / model.logit_multiplier
    return logits * table.residual_multiplier / model.residual_multiplier


def bounds_of(runs: Sequence[Run], factor: float) -> dict[str, float]:
    """Static magnitudes for a shape, from the proxy's runs under the same rule.

    factor: `gradient_factor` of the shape; the proxy has its own where it is not the base.
    """
    bounds: dict[str, float] = {}
    for run in runs:
        for site, magnitudes in run.amax.items():
            grown = factor / run.factor if site.endswith(GRADIENT) else 1.0
            bounds[site] = max(bounds.get(site, 0.0), max(magnitudes) * HEADROOM * grown)
    return bounds


@dataclass(frozen=True)
class ShapeFinding:
    """How static scales did at one shape under one rule, over all seeds."""

    rule: str
    axis: str
    shape: tuple[int, int]
    saturated: float  # of the kind of operand that had most
    where: str
    loss_dynamic: float
    loss_static: float
    seeds_deviation: float  # s.d. of the loss under dynamic scales

    @property
    def holds(self) -> bool:
        """By the criterion of this module; a loss that is no number does not."""
        apart = abs(self.loss_static - self.loss_dynamic)
        return self.saturated <= MOST_SATURATED and apart < self.seeds_deviation


@dataclass(frozen=True)
class SlopeFinding:
    """Exponents of one site's largest magnitude over an axis, divided by the table's factor."""

    rule: str
    axis: str
    site: str
    at_start: float
    at_end: float
    drift: float  # octaves between the largest and the smallest moment at the proxy


@dataclass(frozen=True)
class ScaleResult:
    """Everything, and whether scales of the proxy hold."""

    shapes: list[ShapeFinding]
    slopes: list[SlopeFinding]
    runs: list[Run]
    exit_code: int
    reason: str

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


def collect(config: Config, plan: Plan, workers: int, device: str, say: Say) -> ScaleResult:
    """Train every shape, seed and rule with dynamic scales, then with those of the proxy.

    `plan` as for the coordinate check; its `check_eps`, `beside` and `experts` are not read.
    """
    dynamic_jobs = _dynamic_jobs(config, plan)
    dynamic: list[Run] = []
    for run in _in_workers(dynamic_jobs, workers, device):
        say(_line(run, "dynamic"))
        dynamic.append(run)
    base = (min(plan.widths), min(plan.depths))

    static_jobs = []
    for job, run in zip(dynamic_jobs, dynamic, strict=True):
        proxies = [r for r in dynamic if r.rule == job.rule and r.shape == base]
        bounds = bounds_of(proxies, run.factor)
        settings = {**vars(job), "bounds": bounds}
        static_jobs.append(ScaleJob(**settings))
    static: list[Run] = []
    for run in _in_workers(static_jobs, workers, device):
        say(_line(run, "static"))
        static.append(run)
    return judge(dynamic, static, base)


def _dynamic_jobs(config: Config, plan: Plan) -> list[ScaleJob]:
    jobs = []
    for axis, width, depth, num_experts in plan.shapes():
        shaped = reshape(config, width, depth, num_experts)
        for rule, rule_config in (("model", shaped), ("control", under(shaped, CONTROL))):
            for seed in range(plan.seeds):
                seeded = with_seed(rule_config, seed)
                jobs.append(ScaleJob(rule, axis, seeded, plan.steps, plan.precision, seed))
    return jobs


def _in_workers(jobs: Sequence[ScaleJob], workers: int, device: str) -> Iterator[Run]:
    if workers == 1:
        yield from (train(job, device) for job in jobs)
        return
    with processes(workers) as pool:
        yield from pool.map(_train_alone, jobs, [device] * len(jobs))


def _line(run: Run, scales: str) -> str:
    width, depth = run.shape
    what = f"{run.rule}, {depth} layers x {width}, seed {run.seed}: {scales} scales"
    if not run.saturated:
        return f"{what}, loss {run.loss:.4f}"
    site = max(run.saturated, key=lambda site: run.saturated[site])
    most = run.saturated[site]
    of_site = f" of {site}" if most else ""
    return f"{what}, loss {run.loss:.4f}, saturated {most:.2g}{of_site}"


def judge(dynamic: Sequence[Run], static: Sequence[Run], base: tuple[int, int]) -> ScaleResult:
    """The findings, and the verdict: the model's scales hold everywhere, the control's do not."""
    shapes = []
    for key in dict.fromkeys((run.rule, run.axis, run.shape) for run in dynamic):
        shapes.append(_shape_finding(key, dynamic, static))
    slopes = _slope_findings(dynamic, base)
    tested = [finding for finding in shapes if finding.shape != base]
    all_hold = all(finding.holds for finding in tested if finding.rule == "model")
    control_held = all(finding.holds for finding in tested if finding.rule == "control")
    runs = [*dynamic, *static]
    if len({run.seed for run in dynamic}) < 2:
        reason = "cannot tell: one seed has no standard deviation. Use --seeds 3."
        return ScaleResult(shapes, slopes, runs, CANNOT_TELL, reason)
    if not all_hold:
        failed = [finding for finding in tested if finding.rule == "model" and not finding.holds]
        names = ", ".join(f"{depth} x {width}" for width, depth in (f.shape for f in failed))
        reason = f"do not hold: the proxy's scales fail at {names} (layers x width)."
        return ScaleResult(shapes, slopes, runs, DO_NOT, reason)
    if control_held:
        reason = f"cannot tell: scales hold under {CONTROL}, too. Use larger models or more steps."
        return ScaleResult(shapes, slopes, runs, CANNOT_TELL, reason)
    reason = f"hold: at every shape, and not under {CONTROL}."
    return ScaleResult(shapes, slopes, runs, HOLD, reason)


def _shape_finding(
    key: tuple[str, str, tuple[int, int]], dynamic: Sequence[Run], static: Sequence[Run]
) -> ShapeFinding:
    rule, axis, shape = key
    losses = [run.loss for run in dynamic if (run.rule, run.axis, run.shape) == key]
    runs = [run for run in static if (run.rule, run.axis, run.shape) == key]
    shares = [(share, site) for run in runs for site, share in run.saturated.items()]
    most, where = max(shares)
    deviation = stdev(losses) if len(losses) > 1 else math.nan
    static_loss = fmean(run.loss for run in runs)
    return ShapeFinding(rule, axis, shape, most, where, fmean(losses), static_loss, deviation)


def _slope_findings(dynamic: Sequence[Run], base: tuple[int, int]) -> list[SlopeFinding]:
    findings = []
    for rule, axis in dict.fromkeys((run.rule, run.axis) for run in dynamic):
        runs = [run for run in dynamic if (run.rule, run.axis) == (rule, axis)]
        for site in runs[0].amax:
            start = _slope(runs, site, 0)
            end = _slope(runs, site, -1)
            of_proxy = [run.amax[site] for run in runs if run.shape == base]
            octaves = fmean(math.log2(max(a) / max(min(a), 1e-30)) for a in of_proxy)
            findings.append(SlopeFinding(rule, axis, site, start, end, octaves))
    return findings


def _slope(runs: Sequence[Run], site: str, moment: int) -> float:
    """The exponent over the axis of the means over seeds, after the table's factor."""
    by_size: dict[int, list[float]] = {}
    for run in runs:
        size = run.shape[0] if run.axis == "width" else run.shape[1]
        factor = run.factor if site.endswith(GRADIENT) else 1.0
        by_size.setdefault(size, []).append(run.amax[site][moment] / factor)
    means = [fmean(values) for values in by_size.values()]
    return log_log_slope(list(by_size), means)


def describe(result: ScaleResult) -> str:
    """The findings as text, and the verdict."""
    lines = [
        f"{'rule':<9} {'axis':<6} {'site':<28} {'start':>7} {'end':>7} {'octaves of drift':>17}"
    ]
    for f in result.slopes:
        exponents = f"{f.at_start:>+7.2f} {f.at_end:>+7.2f} {f.drift:>17.2f}"
        lines.append(f"{f.rule:<9} {f.axis:<6} {f.site:<28} {exponents}")
    header = f"{'layers x width':>15} {'saturated':>10} {'dynamic':>8} {'static':>8} {'s.d.':>7}"
    lines += ["", f"{'rule':<9} {'axis':<6} {header}  holds"]
    for finding in result.shapes:
        width, depth = finding.shape
        losses = f"{finding.loss_dynamic:>8.4f} {finding.loss_static:>8.4f}"
        numbers = f"{finding.saturated:>10.2g} {losses} {finding.seeds_deviation:>7.4f}"
        mark = "yes" if finding.holds else f"no ({finding.where})"
        shape = f"{depth} x {width}"
        lines.append(f"{finding.rule:<9} {finding.axis:<6} {shape:>15} {numbers}  {mark}")
    return "\n".join([*lines, result.reason])

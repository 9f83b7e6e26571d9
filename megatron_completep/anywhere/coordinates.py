"""The coordinate check for any torch module that a function builds.

Models of growing depth and width are trained for a few steps by a torch optimizer, and measured as
`instruments/coordinate_check.py` measures the trainer's own; bands, control and verdict are those
of `instruments/coordinate_verdict.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from megatron_completep.anywhere.declared import spec_or_none
from megatron_completep.anywhere.groups import declared_parameters, param_groups
from megatron_completep.command_line import did_you_mean
from megatron_completep.completep import Table
from megatron_completep.errors import ConfigError
from megatron_completep.instruments.check_report import write_check
from megatron_completep.instruments.coordinate_check import (
    EPS_STEPS,
    LARGE_EPS,
    Measurement,
    Sample,
)
from megatron_completep.instruments.coordinate_verdict import Result, judge
from megatron_completep.instruments.fits import Estimate, log_log_slope, mean_estimate
from megatron_completep.roles import Role

Build = Callable[[int, int, Table], nn.Module]  # width, depth and table -> a declared model
Forward = Callable[[nn.Module, Any], Tensor]  # model and batch -> logits
Loss = Callable[[Tensor, Any], Tensor]  # logits and batch -> the mean loss
MakeOptimizer = Callable[[nn.Module, Table, float], torch.optim.Optimizer]  # the last one is eps
Say = Callable[[str], None]
STREAM = "stream"  # the name of the final norm's input among the marked activations


@dataclass(frozen=True)
class CheckedCoordinates(Result):
    """A verdict with the exponents of the marked activations, which are reported and not judged."""

    # axis -> name of a module -> exponent of the change of its output after the last step.
    marked: Mapping[str, Mapping[str, Estimate]] = field(default_factory=dict)


@dataclass(frozen=True)
class _How:
    """What is the same for all models of a check."""

    build: Build
    batches: Sequence[Any]
    forward: Forward
    loss: Loss
    make_optimizer: MakeOptimizer
    lr: float
    marks: Sequence[str]


def check_coordinates(
    build: Build,
    widths: Sequence[int],
    depths: Sequence[int],
    batches: Sequence[Any],
    *,
    base_width: int | None = None,
    base_depth: int | None = None,
    head_dim: int | None = None,
    alpha: float = 1.0,
    lr: float = 2**-9,
    betas: tuple[float, float] = (0.9, 0.95),
    seeds: int = 3,
    forward: Forward | None = None,
    loss: Loss | None = None,
    make_optimizer: MakeOptimizer | None = None,
    marks: Sequence[str] = (),
    check_eps: bool = True,
    out: Path | str | None = None,
    say: Say = lambda text: None,
) -> CheckedCoordinates:
    """Train models of every width and depth for some steps, and judge how their sizes grow.

    The depth axis is run at the smallest width, the width axis at the smallest depth. Beside the
    model runs a control that is known to be wrong (muP over depth, SP over width): the same build
    function with that table, and groups of `param_groups`. Only `out` is written.

    Args:
        build: (width, depth, table) -> the model with its initial weights, declared. It takes the
            residual and logit multipliers and the attention scale from the table, and is called
            under `torch.manual_seed`, which decides the weights.
        widths, depths: of the models; two or more of one of them.
        batches: one for each step, and one more, which is the probe. Every seed begins with
            another one.
        base_width, base_depth: of the proxy; the smallest unless given.
        head_dim: of all models, for the table's attention scale.
        lr: base learning rate, of a warm-up's beginning rather than the peak.
        seeds: repetitions. One gives no interval, and so no verdict.
        forward: the logits of a batch; unless given, a batch is (tokens, labels), and the model
            takes tokens and returns logits, or an object that has `logits`.
        loss: the mean loss; unless given, the cross-entropy of logits [B, S, V] and labels [B, S].
        make_optimizer: (model, table, eps) -> the optimizer under check, without weight decay;
            unless given, AdamW with the groups of `param_groups`.
        marks: patterns of the names of modules whose outputs are measured too.
        check_eps: also train with a large eps, which alone shows a wrong one.
        out: a folder for coordinate_check.json, .html and pictures.
        say: gets one line for each shape and seed.

    Raises ConfigError for sizes that leave nothing to compare, marks that name no module, batches
    that need `forward` and `loss`, and models without a final norm, roles, or finite logits.
    """
    batches = list(batches)
    _check_sizes(widths, depths, batches, seeds)
    functions = _functions(batches, forward, loss)
    how = _How(build, batches, *functions, make_optimizer or _adamw(lr, betas), lr, marks)
    base = _base(widths, base_width), _base(depths, base_depth)
    samples: list[Sample] = []
    for axis, width, depth in _shapes(widths, depths):
        tables = _tables(axis, (width, depth), base, head_dim, alpha)
        for seed in range(seeds):
            pair = _samples_of(how, axis, (width, depth), seed, tables, betas, check_eps)
            samples += pair
            say(_progress_line(*pair))

    checked = CheckedCoordinates(**vars(judge(samples, alpha)), marked=_marked_exponents(samples))
    if out is not None:
        settings = {"widths": list(widths), "depths": list(depths), "base": base, "seeds": seeds}
        settings |= {"lr": lr, "steps": len(batches) - 1, "alpha": alpha}
        write_check(checked, Path(out), getattr(build, "__name__", "model"), settings)
    return checked


def _functions(
    batches: Sequence[Any], forward: Forward | None, loss: Loss | None
) -> tuple[Forward, Loss]:
    """What makes logits of a batch, and a loss of these: the given ones, else those of pairs."""
    if forward is None or loss is None:
        _check_batches(batches)
    return forward or _logits_of, loss or _mean_loss


def _base(sizes: Sequence[int], base_size: int | None) -> int:
    """The proxy's size: the smallest unless given. A 0 is given, and is refused by the table."""
    return min(sizes) if base_size is None else base_size


def _check_sizes(
    widths: Sequence[int], depths: Sequence[int], batches: Sequence[Any], seeds: int
) -> None:
    problems = []
    for name, sizes in (("widths", widths), ("depths", depths)):
        if not sizes or not all(isinstance(size, int) and size >= 1 for size in sizes):
            problems.append(f"{name} = {list(sizes)}: give whole numbers of at least 1.")
    if len(set(widths)) < 2 and len(set(depths)) < 2:
        problems.append("nothing to compare: give two widths or two depths, better three.")
    if len(batches) < 2:
        problems.append(f"{len(batches)} batches: give one for each step, and one for the probe.")
    if seeds < 1:
        problems.append(f"seeds = {seeds}: give at least 1; a verdict needs 2.")
    if problems:
        raise ConfigError("\n".join(["the check cannot begin", *(f"  {p}" for p in problems)]))


def _check_batches(batches: Sequence[Any]) -> None:
    """Raises ConfigError for batches that the forward pass and loss of this module cannot take."""
    for batch in batches:
        is_pair = isinstance(batch, tuple | list) and len(batch) == 2
        if not (is_pair and all(isinstance(one, Tensor) for one in batch)):
            raise ConfigError(
                f"a batch of the type {type(batch).__name__}: without forward and loss, give pairs "
                "(tokens [B, S], labels [B, S]). For others, give forward(model, batch) -> logits "
                "and loss(logits, batch)."
            )


def _shapes(widths: Sequence[int], depths: Sequence[int]) -> Iterator[tuple[str, int, int]]:
    """(axis, width, depth) of every model."""
    if len(set(depths)) > 1:
        for depth in sorted(set(depths)):
            yield "depth", min(widths), depth
    if len(set(widths)) > 1:
        for width in sorted(set(widths)):
            yield "width", width, min(depths)


def _tables(
    axis: str,
    shape: tuple[int, int],
    base: tuple[int, int],
    head_dim: int | None,
    alpha: float,
) -> tuple[Table, Table]:
    """The right table of a shape, and the control's."""
    sizes: dict[str, Any] = {
        "width": shape[0],
        "depth": shape[1],
        "base_width": base[0],
        "base_depth": base[1],
        "head_dim": head_dim,
    }
    right = Table.for_shape(**sizes, alpha=alpha)
    wrong = Table.for_shape(**sizes, parameterization="mup" if axis == "depth" else "sp")
    return right, wrong


def _samples_of(
    how: _How,
    axis: str,
    shape: tuple[int, int],
    seed: int,
    tables: tuple[Table, Table],
    betas: tuple[float, float],
    check_eps: bool,
) -> tuple[Sample, Sample]:
    """The measurements of one shape and seed, of the model and of its control."""
    right, wrong = tables
    model = measure(how, shape, seed, right)
    large_eps = measure(how, shape, seed, right, eps=LARGE_EPS) if check_eps else None
    # The optimizer under check may be wrong itself.
    control = measure(replace(how, make_optimizer=_adamw(how.lr, betas)), shape, seed, wrong)
    return (
        Sample(axis, "model", *shape, seed, model, large_eps),
        Sample(axis, "control", *shape, seed, control),
    )


def _progress_line(model: Sample, control: Sample) -> str:
    change = model.measured.stream_change[-1]
    control_change = control.measured.stream_change[-1]
    shape = f"{model.axis}: {model.num_layers} layers x {model.hidden_size}, seed {model.seed}"
    return f"{shape}: change {change:.4g}, control {control_change:.4g}"


def measure(
    how: _How, shape: tuple[int, int], seed: int, table: Table, eps: float | None = None
) -> Measurement:
    """Build a model and train it one step on each batch but the last, which is the probe.

    eps: a large one, for fewer steps; None: one that does not count.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = how.build(*shape, table)
    if not isinstance(model, nn.Module):
        raise ConfigError(f"build returned {type(model).__name__}: return the model, declared.")
    _check_marks(model, how.marks)
    declared = declared_parameters(model, table)
    optimizer = how.make_optimizer(model, table, 1e-30 if eps is None else eps)
    rates = _rates(optimizer)
    # The same batches in another order, so that seeds do not share what the data does.
    start = seed % len(how.batches)
    batches = [*how.batches[start:], *how.batches[:start]]
    steps = len(batches) - 1 if eps is None else min(EPS_STEPS, len(batches) - 1)

    series = _Series()
    first = _probe(how, model, batches[-1])
    if not first["logits"].isfinite().all():
        # Without a head_dim the table's attention scale is NaN, which no verdict may be made of.
        raise ConfigError(
            f"the logits of the untrained model of width {shape[0]} and depth {shape[1]} are not "
            f"finite. The table's attention scale is {table.attention_scale:g}: give head_dim if "
            "the model takes it. Otherwise look at what build returns."
        )
    gradients: dict[str, float] = {}
    by_own_rate: list[dict[str, float]] = []
    moved: list[dict[str, float]] = []
    losses: list[float] = []
    for batch in batches[:steps]:
        series.append(first if not losses else _probe(how, model, batches[-1]), first)
        optimizer.zero_grad()
        loss = how.loss(how.forward(model, batch), batch)
        loss.backward()
        losses.append(float(loss.detach()))
        if not gradients:
            gradients = _rms_by_role(declared, _gradient)
        before = {name: parameter.detach().clone() for name, parameter, _ in declared}
        optimizer.step()
        by_own_rate.append(_rms_by_role(declared, _change(before, rates)))
        moved.append(_rms_by_role(declared, _change(before, {})))
    series.append(_probe(how, model, batches[-1]), first)
    return Measurement(
        series.stream,
        series.stream_change,
        series.logits,
        series.logits_change,
        series.changes,
        gradients,
        _means(by_own_rate),
        losses,
        {role: rms / how.lr for role, rms in _means(moved).items()},
    )


def _check_marks(model: nn.Module, marks: Sequence[str]) -> None:
    """Raises ConfigError for marks that match no module: nothing would be measured for them."""
    if isinstance(marks, str):
        raise ConfigError(f"marks = {marks!r}: give a list of patterns, [{marks!r}].")
    names = [name for name, _ in model.named_modules()]
    for mark in marks:
        if not any(fnmatchcase(name, mark) for name in names):
            near = did_you_mean(mark, names)
            raise ConfigError(f"marks: {mark} matches no module.{near}")


def _rates(optimizer: torch.optim.Optimizer) -> dict[int, float]:
    """The learning rate of each parameter, by the identity of its tensor."""
    rates = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            rates[id(parameter)] = float(group["lr"])
    return rates


@dataclass
class _Series:
    """RMS of what the probe computes, by step; the fields are those of Measurement."""

    stream: list[float] = field(default_factory=list)
    stream_change: list[float] = field(default_factory=list)
    logits: list[float] = field(default_factory=list)
    logits_change: list[float] = field(default_factory=list)
    changes: list[dict[str, float]] = field(default_factory=list)  # of the marked activations

    def append(self, now: dict[str, Tensor], first: dict[str, Tensor]) -> None:
        """Add one step."""
        changes = {name: _rms(now[name] - first[name]) for name in now}
        self.stream.append(_rms(now[STREAM]))
        self.stream_change.append(changes.pop(STREAM))
        self.logits.append(_rms(now["logits"]))
        self.logits_change.append(changes.pop("logits"))
        self.changes.append(changes)


def _rms(tensor: Tensor) -> float:
    return float(tensor.double().square().mean().sqrt())


def _probe(how: _How, model: nn.Module, batch: Any) -> dict[str, Tensor]:
    """The stream before the final norm, the logits, and the marked activations of a batch."""
    activations: dict[str, Tensor] = {}
    with _watched(model, how.marks, activations), torch.no_grad():
        logits = how.forward(model, batch)
    if STREAM not in activations:
        raise ConfigError(
            "the module of the final norm was not called, so that the residual stream is not seen. "
            "Declare the parameters of the norm before the unembedding as final_norm."
        )
    return {**activations, "logits": logits.detach()}


@contextmanager
def _watched(
    model: nn.Module, marks: Sequence[str], activations: dict[str, Tensor]
) -> Iterator[None]:
    """Keep the final norm's input and the outputs of marked modules while the block runs."""

    def keep_input(module: nn.Module, inputs: Any, keywords: Any) -> None:
        if inputs:
            activations[STREAM] = inputs[0].detach()

    def keeper(name: str) -> Callable[..., None]:
        def keep_output(module: nn.Module, inputs: Any, output: Any) -> None:
            tensor = output[0] if isinstance(output, tuple) else output
            activations[name] = tensor.detach()

        return keep_output

    handles = []
    for name, module in model.named_modules():
        specs = [spec_or_none(parameter) for parameter in module.parameters(recurse=False)]
        if any(spec is not None and spec.role is Role.FINAL_NORM for spec in specs):
            handles.append(module.register_forward_pre_hook(keep_input, with_kwargs=True))
        if any(fnmatchcase(name, mark) for mark in marks):
            handles.append(module.register_forward_hook(keeper(name)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


Elements = Callable[[nn.Parameter, str], Tensor | None]


def _gradient(parameter: nn.Parameter, name: str) -> Tensor | None:
    return parameter.grad


def _change(before: Mapping[str, Tensor], rates: Mapping[int, float]) -> Elements:
    """A parameter's change since `before`, over its learning rate if it is among the rates."""

    def change(parameter: nn.Parameter, name: str) -> Tensor:
        return (parameter.detach() - before[name]) / rates.get(id(parameter), 1.0)

    return change


def _rms_by_role(declared: Sequence[Any], elements: Elements) -> dict[str, float]:
    """By role: the RMS over all elements of its parameters."""
    squares: dict[str, float] = {}
    counts: dict[str, int] = {}
    for name, parameter, spec in declared:
        tensor = elements(parameter, name)
        if tensor is None:
            continue
        role = str(spec.role)
        squares[role] = squares.get(role, 0.0) + float(tensor.double().square().sum())
        counts[role] = counts.get(role, 0) + tensor.numel()
    return {role: float((squares[role] / counts[role]) ** 0.5) for role in squares}


def _means(steps: Sequence[dict[str, float]]) -> dict[str, float]:
    """By role: the mean over the steps."""
    return {role: sum(step[role] for step in steps) / len(steps) for role in steps[0]}


def _marked_exponents(samples: Sequence[Sample]) -> dict[str, dict[str, Estimate]]:
    """By axis and name: the exponent of the last change, for what every model of the axis has."""
    exponents: dict[str, dict[str, Estimate]] = {}
    for axis in dict.fromkeys(sample.axis for sample in samples):
        models = [one for one in samples if one.axis == axis and one.rule == "model"]
        last = [one.measured.blocks[-1] for one in models]
        # Blocks that only deeper models have are left out.
        names = [name for name in last[0] if all(name in changes for changes in last)]
        by_name = {name: _exponent(models, name) for name in names}
        exponents[axis] = by_name
    return exponents


def _exponent(models: Sequence[Sample], name: str) -> Estimate:
    slopes = []
    for seed in sorted({one.seed for one in models}):
        of_seed = [one for one in models if one.seed == seed]
        changes = [one.measured.blocks[-1][name] for one in of_seed]
        slopes.append(log_log_slope([one.size for one in of_seed], changes))
    return mean_estimate(slopes)


def _logits_of(model: nn.Module, batch: Any) -> Tensor:
    output = model(batch[0])
    return getattr(output, "logits", output)  # type: ignore[no-any-return]


def _mean_loss(logits: Tensor, batch: Any) -> Tensor:
    return F.cross_entropy(logits.flatten(0, -2), batch[1].flatten())


def _adamw(lr: float, betas: tuple[float, float]) -> MakeOptimizer:
    def make(model: nn.Module, table: Table, eps: float) -> torch.optim.Optimizer:
        return torch.optim.AdamW(param_groups(model, table, lr=lr, eps=eps, betas=betas))

    return make

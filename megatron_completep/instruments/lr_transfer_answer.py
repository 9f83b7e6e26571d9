"""The answer of a sweep on the console: each shape's best learning rate, and the next command."""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from megatron_completep.command_line import call_of
from megatron_completep.config import save_config
from megatron_completep.instruments import sweep
from megatron_completep.instruments.lr_curves import (
    Curve,
    order_of_shapes,
    setting_of,
    shape_text,
)
from megatron_completep.instruments.lr_transfer import CurveSummary, base_curve
from megatron_completep.instruments.trial import PARAMETERIZATIONS

PROXY = "proxy.yaml"
BEYOND = 2.0  # octaves that are swept beyond an edge
DEEPER = 4  # times the proxy's depth: a target for the example of `plan`


def best_rates(curves: Sequence[Curve], optima: Sequence[CurveSummary]) -> list[str]:
    """Two lines a shape: the best learning rate, and the losses of its neighbours in the grid."""
    lines = []
    for curve, optimum in zip(curves, optima, strict=True):
        lines += _best_rate(curve, optimum)
    return lines


def _best_rate(curve: Curve, optimum: CurveSummary) -> list[str]:
    seeds = curve.losses.shape[1]
    shape = f"{curve.parameterization} {shape_text(*order_of_shapes(curve))}"
    name = (
        f"{shape}, wd {curve.base_weight_decay:g}, "
        f"{curve.train_steps} steps, {seeds} {'seed' if seeds == 1 else 'seeds'}"
    )
    if optimum.grid_step is None:
        return [
            f"{name}: one learning rate was run, so there is no best one",
            f"    {_point(curve, 0)}",
        ]

    best = curve.optimum().grid_index
    place = "bracketed by the grid"
    if optimum.at_edge:
        end, direction = ("lower", "lower") if best == 0 else ("upper", "higher")
        place = f"at the {end} edge of the grid: it may lie {direction}"
    estimate = optimum.log2_lr
    interval = ", one seed gives no interval"
    if seeds > 1:
        interval = ", over the seeds it may lie anywhere"  # in most replicates at either edge
    if estimate.repeated:
        low = f"2^{estimate.low:.2f}" if estimate.low > -math.inf else "anywhere below"
        high = f"2^{estimate.high:.2f}" if estimate.high < math.inf else "anywhere above"
        interval = f" [{low}, {high}]"
    rate = f"2^{estimate.value:.2f} = {2**estimate.value:.4g}{interval}"

    # The neighbours show whether the curve has a minimum here or is flat.
    start = max(0, best - 1)
    stop = min(len(curve.log2_lr), best + 2)
    neighbours = [_point(curve, index) for index in range(start, stop)]
    return [
        f"{name}: best learning rate {rate}, steps of {optimum.grid_step:g} octaves, {place}",
        f"    {'; '.join(neighbours)}",
    ]


def _point(curve: Curve, index: int) -> str:
    """The mean loss at one learning rate, and the range over seeds."""
    losses = curve.losses[index]
    spread = f" (seeds {losses.min():.4f} to {losses.max():.4f})" if len(losses) > 1 else ""
    return f"2^{curve.log2_lr[index]:g}: loss {curve.mean[index]:.4f}{spread}"


def proxy_of(curves: Sequence[Curve]) -> Curve:
    """The curve that `plan` would use: the smallest shape, under CompleteP where there is one."""
    completep_curves = [curve for curve in curves if curve.parameterization == "completep"]
    candidates = completep_curves or curves
    return min(candidates, key=lambda c: (*order_of_shapes(c), min(c.mean)))


def write_proxy(points: Sequence[sweep.Point], curve: Curve, folder: Path) -> Path:
    """Write the configuration of a curve beside its sweep, for the next command to read.

    A further sweep of that file finds the points that are done. Returns the file's path.
    """
    proxy = next(point for point in points if setting_of(point) == setting_of(curve))
    path = folder / PROXY
    save_config(proxy.config, path)
    return path


def next_commands(folder: Path, curves: Sequence[Curve]) -> list[str]:
    """The commands that follow from the curves, one a line.

    Where an optimum lies at the edge of the grid, a sweep beyond that edge; else `plan` for the
    target, and finer grids or more seeds where they would narrow the interval.
    """
    proxy = proxy_of(curves)
    if not proxy.swept:
        rate = float(proxy.log2_lr[0])
        command = _sweep(folder, proxy, rate - 1, rate + 1, 0.5)
        return [f"next, to find the best learning rate: {command}"]

    # A plan from an optimum that may lie beyond the grid would be wrong: widen the grid before.
    at_edge = [curve for curve in curves if curve.swept and curve.optimum().at_edge]
    if at_edge:
        proxy_at_edge = any(curve is proxy for curve in at_edge)
        target = proxy if proxy_at_edge else base_curve(at_edge[0], at_edge)
        count = f" ({len(at_edge)} curves end at an edge)" if len(at_edge) > 1 else ""
        return [f"next, to sweep beyond the edge{count}: {_sweep_beyond(folder, target)}"]

    plan = _plan(folder, proxy)
    lines = [f"next, your target's file in place of {folder / PROXY}: {plan}"]
    optimum = proxy.optimum()
    low, high = optimum.between
    step = _step(proxy)
    # The grid leaves a range open, which points between those that are done would narrow.
    if high > low:
        best = float(proxy.log2_lr[optimum.grid_index])
        finer = _sweep(folder, proxy, best - step, best + step, step / 2)
        lines.append(f"to know it better, a finer grid: {finer}")
    if proxy.losses.shape[1] < 2:
        lowest = float(proxy.log2_lr[0])
        highest = float(proxy.log2_lr[-1])
        repeated = _sweep(folder, proxy, lowest, highest, step, seeds=3)
        lines.append(f"for an interval, more seeds: {repeated}")
    return lines


def _step(curve: Curve) -> float:
    """The smallest distance between learning rates of the grid, in octaves."""
    return float(np.diff(curve.log2_lr).min())


def _sweep_beyond(folder: Path, curve: Curve) -> str:
    """The command that continues a curve's grid beyond the end at which its optimum lies."""
    step = _step(curve)
    reach = max(step, BEYOND)
    if curve.optimum().grid_index == 0:
        low = float(curve.log2_lr[0])
        return _sweep(folder, curve, low - reach, low - step, step)
    high = float(curve.log2_lr[-1])
    return _sweep(folder, curve, high + step, high + reach, step)


def _sweep(
    folder: Path, curve: Curve, low: float, high: float, step: float, seeds: int | None = None
) -> str:
    """The command that runs one curve at further learning rates, log2 from `low` to `high`."""
    seed_count = seeds or curve.losses.shape[1]
    options = {
        "--parameterizations": curve.parameterization,
        "--depths": str(curve.num_layers),
        "--widths": str(curve.hidden_size),
        "--train-steps": str(curve.train_steps),
        "--weight-decays": repr(curve.base_weight_decay),
        "--init-stds": repr(curve.base_init_std),
        "--seeds": str(seed_count),
    }
    if curve.num_experts:
        options["--experts"] = str(curve.num_experts)
    words = [*call_of("lr_transfer"), "sweep", str(folder / PROXY), "--out", str(folder)]
    # With an equals sign, for a word that begins with a minus would be taken for an option.
    words.append(f"--lr={_rates(low, high, step)}")
    for option, argument in options.items():
        words += [option, argument]
    return shlex.join(words)


def _rates(low: float, high: float, step: float) -> str:
    """The argument of --lr: LOW:HIGH:N with whole points an octave, else a list of rates."""
    per_octave = 1 / step
    if abs(per_octave - round(per_octave)) < 1e-6:
        return f"{low:g}:{high:g}:{round(per_octave)}"
    count = round((high - low) / step)
    exponents = [low + index * step for index in range(count + 1)]
    return ",".join(f"{2**exponent:.10g}" for exponent in exponents)


def _plan(folder: Path, proxy: Curve) -> str:
    """The command that plans a deeper target from the proxy."""
    target_layers = DEEPER * proxy.num_layers
    words = [
        *call_of("lr_transfer"),
        "plan",
        str(folder),
        str(folder / PROXY),
        f"model.num_layers={target_layers}",
    ]
    # At the base depth, rules that coincide with CompleteP share its configuration, so the proxy's
    # file names CompleteP and the command must name the rule.
    if proxy.parameterization != "completep":
        settings = PARAMETERIZATIONS[proxy.parameterization]
        words += [f"completep.{name}={setting}" for name, setting in settings.items()]
    return shlex.join([*words, "--to", str(folder / "target.yaml")])

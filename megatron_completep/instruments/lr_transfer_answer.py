"""A sweep's answer on the console: the best learning rate of every shape, how well it is known, and the next command."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from megatron_completep.config import save_config
from megatron_completep.instruments import sweep
from megatron_completep.instruments.lr_transfer import Curve, Optimum, base_curve
from megatron_completep.instruments.trial import PARAMETERIZATIONS

PROXY = "proxy.yaml"
TOOL = ("python", "tools/lr_transfer.py")
BEYOND = 2.0  # octaves that are swept beyond an edge
DEEPER = 4  # times the proxy's depth: a target for the example of `plan`


def best_rates(curves: Sequence[Curve], optima: Sequence[Optimum]) -> list[str]:
    """Two lines a shape: the best learning rate, and the losses round it."""
    return [
        line
        for curve, optimum in zip(curves, optima, strict=True)
        for line in _best_rate(curve, optimum)
    ]


def _best_rate(curve: Curve, optimum: Optimum) -> list[str]:
    seeds = curve.losses.shape[1]
    name = (
        f"{curve.parameterization} {curve.num_layers} x {curve.hidden_size}, wd {curve.base_weight_decay:g}, "
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
        end = "lower" if best == 0 else "upper"
        place = f"at the {end} edge of the grid: it may lie {'lower' if best == 0 else 'higher'}"
    interval = (
        f" [2^{optimum.log2_lr.low:.2f}, 2^{optimum.log2_lr.high:.2f}]"
        if optimum.log2_lr.repeated
        else ", one seed gives no interval"
    )
    rate = f"2^{optimum.log2_lr.value:.2f} = {2**optimum.log2_lr.value:.4g}{interval}"
    near = [
        _point(curve, index) for index in range(max(0, best - 1), min(len(curve.log2_lr), best + 2))
    ]
    return [
        f"{name}: best learning rate {rate}, steps of {optimum.grid_step:g} octaves, {place}",
        f"    {'; '.join(near)}",
    ]


def _point(curve: Curve, index: int) -> str:
    """Mean loss at one learning rate, and how far the seeds are apart."""
    losses = curve.losses[index]
    spread = f" (seeds {losses.min():.4f} to {losses.max():.4f})" if len(losses) > 1 else ""
    return f"2^{curve.log2_lr[index]:g}: loss {curve.mean[index]:.4f}{spread}"


def proxy_of(curves: Sequence[Curve]) -> Curve:
    """The curve that `plan` would use: the smallest shape, under CompleteP where there is one."""
    ours = [c for c in curves if c.parameterization == "completep"] or list(curves)
    return min(ours, key=lambda c: (c.num_layers, c.hidden_size, min(c.mean)))


def write_proxy(points: Sequence[sweep.Point], curve: Curve, folder: Path) -> Path:
    """The proxy's configuration beside the sweep: what the next command reads. Its sweep finds the points that are done."""
    chosen = next(p for p in points if _same_shape(p, curve))
    save_config(chosen.config, folder / PROXY)
    return folder / PROXY


def _same_shape(point: sweep.Point, curve: Curve) -> bool:
    names = (
        "parameterization",
        "hidden_size",
        "num_layers",
        "train_steps",
        "base_weight_decay",
        "base_init_std",
    )
    return all(getattr(point, name) == getattr(curve, name) for name in names)


def next_commands(folder: Path, curves: Sequence[Curve]) -> list[str]:
    """What to do now: widen the grid where an optimum lies at its edge, else plan the target; a finer grid where that tells more."""
    beyond = [c for c in curves if c.swept and c.optimum().at_edge]
    proxy = proxy_of(curves)
    if not proxy.swept:
        rate = float(proxy.log2_lr[0])
        return [
            f"next, to find the best learning rate: {_sweep(folder, proxy, rate - 1, rate + 1, 0.5)}"
        ]
    if beyond:
        first = proxy if any(c is proxy for c in beyond) else base_curve(beyond[0], beyond)
        more = f" ({len(beyond)} curves end at an edge)" if len(beyond) > 1 else ""
        return [f"next, to sweep beyond the edge{more}: {_sweep_beyond(folder, first)}"]
    lines = []
    optimum = proxy.optimum()
    between, step = optimum.between, _step(proxy)
    if between[1] > between[0]:
        middle = float(proxy.log2_lr[optimum.grid_index])
        lines.append(
            f"to know it better, a finer grid: {_sweep(folder, proxy, middle - step, middle + step, step / 2)}"
        )
    if proxy.losses.shape[1] < 2:
        low, high = float(proxy.log2_lr[0]), float(proxy.log2_lr[-1])
        lines.append(
            f"for an interval, more seeds: {_sweep(folder, proxy, low, high, step, seeds=3)}"
        )
    return [
        f"next, your target's file in place of {folder / PROXY}: {_plan(folder, proxy)}",
        *lines,
    ]


def _step(curve: Curve) -> float:
    return min(
        high - low
        for low, high in zip(curve.log2_lr.tolist(), curve.log2_lr.tolist()[1:], strict=False)
    )


def _sweep_beyond(folder: Path, curve: Curve) -> str:
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
    """The command that runs one curve at further learning rates; `--lr` takes whole points an octave, else a list."""
    per_octave = 1 / step
    if abs(per_octave - round(per_octave)) < 1e-6:
        rates = f"{low:g}:{high:g}:{round(per_octave)}"
    else:
        count = round((high - low) / step)
        rates = ",".join(f"{2 ** (low + index * step):.10g}" for index in range(count + 1))
    words = [
        *TOOL,
        "sweep",
        str(folder / PROXY),
        "--out",
        str(folder),
        f"--lr={rates}",
        "--parameterizations",
        curve.parameterization,
    ]
    words += [
        "--depths",
        str(curve.num_layers),
        "--widths",
        str(curve.hidden_size),
        "--train-steps",
        str(curve.train_steps),
    ]
    words += [
        "--weight-decays",
        repr(curve.base_weight_decay),
        "--init-stds",
        repr(curve.base_init_std),
    ]
    return shlex.join([*words, "--seeds", str(seeds or curve.losses.shape[1])])


def _plan(folder: Path, proxy: Curve) -> str:
    rule = PARAMETERIZATIONS[proxy.parameterization]
    words = [
        *TOOL,
        "plan",
        str(folder),
        str(folder / PROXY),
        f"model.num_layers={DEEPER * proxy.num_layers}",
    ]
    if proxy.parameterization != "completep":
        words += [f"completep.{name}={value}" for name, value in rule.items()]
    return shlex.join([*words, "--to", str(folder / "target.yaml")])

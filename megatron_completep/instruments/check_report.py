"""The coordinate check and the laziness measurement for people: a text table, a picture, and files beside each other."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_completep.document import Report, new_figure, png_of
from megatron_completep.errors import ConfigError
from megatron_completep.files import write_whole
from megatron_completep.instruments.coordinate_check import CONTROLS, Sample
from megatron_completep.instruments.coordinate_verdict import DECISIVE, Result
from megatron_completep.instruments.fits import Estimate
from megatron_completep.instruments.laziness import (
    CONTROL_BELOW,
    FIRST_DEPTH,
    MODEL_ABOVE,
    LazinessResult,
)

Say = Callable[[str], None]


def describe_check(result: Result) -> str:
    """The table of exponents, and the verdict."""
    others = rules_beside(result)
    columns = "".join(f"{rule:<26} " for rule in others)
    lines = [
        f"{'axis':<6} {'quantity':<32} {'band':>16}  {'model':<26} {columns}{'control':<26}".rstrip()
    ]
    for finding in result.findings:
        band = finding.band
        limits = (
            f"{band.low:+.2f} to {band.high:+.2f}" if math.isfinite(band.low) else "reported only"
        )
        control = "" if finding.control is None else str(finding.control)
        beside = "".join(f"{finding.beside.get(rule, '')!s:<26} " for rule in others)
        lines.append(
            f"{band.axis:<6} {band.quantity:<32} {limits:>16}  {finding.model!s:<26} {beside}{control:<26} {finding.mark}".rstrip()
        )
    return "\n".join([*lines, result.reason])


def rules_beside(result: Result) -> list[str]:
    """Parameterizations that were measured beside the model and its control."""
    return list(dict.fromkeys(rule for finding in result.findings for rule in finding.beside))


def draw_check(result: Result, axis: str, names: dict[str, str]) -> Any:
    """One panel a parameterization, one line a step: the residual stream's size over depth or width, mean over seeds."""
    chosen = [s for s in result.samples if s.axis == axis]
    (decisive,) = [
        f for f in result.findings if f.band.axis == axis and f.band.quantity == DECISIVE
    ]
    exponents = {"model": decisive.model, "control": decisive.control, **decisive.beside}
    rules = [rule for rule in names if any(s.rule == rule for s in chosen)]
    figure = new_figure(4.4 * len(rules), 7.2)
    panels = figure.subplots(2, len(rules), sharey="row", sharex=True, squeeze=False)
    sizes = sorted({s.size for s in chosen})
    steps = len(chosen[0].measured.stream)
    for column, rule in enumerate(rules):
        for step in range(steps):
            color = (
                0.15 + 0.75 * step / max(1, steps - 1),
                0.3,
                0.8 - 0.6 * step / max(1, steps - 1),
            )
            streams = [_mean(chosen, rule, size, "stream", step) for size in sizes]
            panels[0][column].plot(
                sizes,
                streams,
                marker=".",
                color=color,
                label=f"step {step}" if step in (0, 1, steps - 1) else None,
            )
            if step:
                changes = [_mean(chosen, rule, size, "stream_change", step) for size in sizes]
                panels[1][column].plot(sizes, changes, marker=".", color=color)
        panels[0][column].set_title(names[rule])
        panels[1][column].set_title(f"last step: exponent {exponents[rule]}", fontsize=9)
        panels[1][column].set_xlabel("layers" if axis == "depth" else "width")
        for panel in panels[:, column]:
            panel.set_xscale("log", base=2)
            panel.set_yscale("log", base=2)
            panel.set_xticks(sizes, [str(size) for size in sizes])
            panel.grid(alpha=0.3)
    panels[0][0].set_ylabel("RMS of the residual stream")
    panels[1][0].set_ylabel("RMS of its change")
    panels[0][-1].legend(fontsize=8)
    return figure


def _mean(samples: Sequence[Sample], rule: str, size: int, name: str, step: int) -> float:
    return float(
        np.mean(
            [getattr(s.measured, name)[step] for s in samples if s.rule == rule and s.size == size]
        )
    )


def write_check(result: Result, folder: Path, name: str, settings: dict[str, Any]) -> None:
    """coordinate_check.json, .html, and a picture an axis. `name`: what to call the model under check."""
    make_folder(folder)
    write_whole(folder / "coordinate_check.json", dump({**result.to_json(), "settings": settings}))
    report = Report("Coordinate check", result.reason)
    section = report.section("Exponents")
    others = rules_beside(result)
    rows = [
        [f.band.axis, f.band.quantity, band_text(f.band.low, f.band.high), str(f.model)]
        + [str(f.beside.get(rule, "")) for rule in others]
        + [str(f.control or ""), f.mark]
        for f in result.findings
    ]
    section.table(
        ["axis", "quantity", "band", "model", *others, "control", ""],
        rows,
        "Mean over seeds, with 95 % intervals.",
    )
    for axis in dict.fromkeys(s.axis for s in result.samples):
        titles = {
            "model": name,
            **{rule: rule for rule in others},
            "control": f"control: {CONTROLS[axis]}",
        }
        figure = png_of(draw_check(result, axis, titles))
        write_whole(folder / f"coordinate_check_{axis}.png", figure)
        report.section(f"Over {axis}").picture(
            f"coordinate_check_{axis}", figure, "One panel a parameterization, one line a step."
        )
    report.write_html(folder / "coordinate_check.html")


def band_text(low: float, high: float) -> str:
    return f"{low:+.2f} to {high:+.2f}" if math.isfinite(low) else ""


def describe_laziness(result: LazinessResult, base_num_layers: int) -> str:
    """Medians by depth, exponents, and the verdict."""
    depths = sorted({depth for medians in result.medians.values() for depth in medians})
    lines = [
        f"{'layers':<12}"
        + "".join(f"{depth:>9}" for depth in depths)
        + f"  exponent from {FIRST_DEPTH * base_num_layers} layers on"
    ]
    for rule, medians in result.medians.items():
        values = "".join(f"{medians[depth]:>9.4f}" for depth in depths)
        lines.append(
            f"{rule:<12}{values}  {result.slopes.get(rule, Estimate(math.nan, math.nan, math.nan))}"
        )
    return "\n".join([*lines, result.reason])


def draw_laziness(result: LazinessResult) -> Any:
    """One line a parameterization over depth, with its exponent; thin lines are the seeds, grey ones the bounds."""
    figure = new_figure(6.5, 4.5)
    axis = figure.subplots()
    for number, (rule, medians) in enumerate(result.medians.items()):
        color = f"C{number}"
        axis.plot(
            list(medians),
            list(medians.values()),
            marker="o",
            color=color,
            label=f"{rule} {result.slopes.get(rule, '')}",
        )
        for seed in sorted({s.seed for s in result.samples}):
            own = {
                s.num_layers: float(np.median(s.blocks))
                for s in result.samples
                if s.rule == rule and s.seed == seed
            }
            axis.plot(list(own), list(own.values()), color=color, alpha=0.3, linewidth=0.8)
    medians = result.medians.get("own", {})
    fitted = [depth for depth in medians if depth >= result.first_depth]
    for bound, style, says in (
        (MODEL_ABOVE, "--", "complete: above"),
        (CONTROL_BELOW, ":", "lazy: below"),
    ):
        line = [medians[fitted[0]] * (depth / fitted[0]) ** bound for depth in fitted]
        axis.plot(fitted, line, style, color="gray", linewidth=1.0, label=f"{says} {bound}")
    axis.set_xscale("log", base=2)
    axis.set_yscale("log", base=2)
    axis.set_xticks(
        depths := sorted({s.num_layers for s in result.samples}), [str(depth) for depth in depths]
    )
    axis.set_xlabel("layers")
    axis.set_ylabel("|F(th1) - F(th0) - J d| / |J d|, median over blocks")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    return figure


def write_laziness(result: LazinessResult, folder: Path, settings: dict[str, Any]) -> None:
    """laziness.json, .png and .html."""
    make_folder(folder)
    picture = png_of(draw_laziness(result))
    write_whole(folder / "laziness.json", dump({**result.to_json(), "settings": settings}))
    write_whole(folder / "laziness.png", picture)
    report = Report("Laziness", result.reason)
    section = report.section("Over depth")
    depths = sorted({depth for medians in result.medians.values() for depth in medians})
    rows = [
        [rule, *(medians[d] for d in depths), str(result.slopes.get(rule, ""))]
        for rule, medians in result.medians.items()
    ]
    section.table(["parameterization", *(f"L = {d}" for d in depths), "exponent"], rows)
    section.picture("laziness", picture, "Median over blocks; thin lines are the seeds.")
    report.write_html(folder / "laziness.html")


def make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"{folder} cannot be made: {error.strerror}. Choose another folder with --out."
        ) from None


def dump(value: Any) -> bytes:
    """JSON with 6 significant digits; what is not finite becomes null."""
    return json.dumps(finite(value)).encode()


def finite(value: Any) -> Any:
    """6 significant digits are more than repetitions agree in, and JSON knows no infinities: null."""
    if isinstance(value, dict):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value

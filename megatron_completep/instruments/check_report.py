"""Tables, pictures, JSON and HTML of the coordinate check and of the laziness measurement."""

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
from megatron_completep.instruments.coordinate_verdict import STREAM_CHANGE, Finding, Result
from megatron_completep.instruments.fits import Estimate
from megatron_completep.instruments.laziness import (
    CONTROL_BELOW,
    FIRST_DEPTH,
    MODEL_ABOVE,
    LazinessResult,
    LazinessSample,
)

Say = Callable[[str], None]
NO_SLOPE = Estimate(math.nan, math.nan, math.nan)  # of a rule with fewer than two fitted depths


def describe_check(result: Result) -> str:
    """The exponents as text, one line a finding under a header, and the verdict's reason."""
    rules = rules_beside(result)
    rule_headers = "".join(f"{rule:<26} " for rule in rules)
    columns = f"{'axis':<7} {'quantity':<35} {'band':>16}  {'model':<26}"
    lines = [f"{columns} {rule_headers}{'control':<26}".rstrip()]
    lines += [_finding_line(finding, rules) for finding in result.findings]
    return "\n".join([*lines, result.reason])


def _finding_line(finding: Finding, rules: Sequence[str]) -> str:
    band = finding.band
    # Without limits a quantity takes no part in the verdict, and its mark is empty.
    limits = band_text(band.low, band.high) or "reported only"
    control = "" if finding.control is None else str(finding.control)
    beside = "".join(f"{finding.beside.get(rule, '')!s:<26} " for rule in rules)
    quantity = f"{band.axis:<7} {band.quantity:<35} {limits:>16}"
    line = f"{quantity}  {finding.model!s:<26} {beside}{control:<26} {finding.mark}"
    return line.rstrip()


def rules_beside(result: Result) -> list[str]:
    """The parameterizations that were measured beside the model and its control, each once."""
    rules: dict[str, None] = {}
    for finding in result.findings:
        rules.update(dict.fromkeys(finding.beside))
    return list(rules)


def draw_check(result: Result, axis: str, names: dict[str, str]) -> Any:
    """A figure of the residual stream's RMS, and of its change's RMS, over one axis.

    One column of panels a parameterization, one line a training step, each point a mean over seeds.
    `names`: the columns' titles by rule, in the order of the columns; rules without samples are
    left out.
    """
    samples = [sample for sample in result.samples if sample.axis == axis]
    exponents = _exponents_of_change(result, axis)
    measured_rules = {sample.rule for sample in samples}
    rules = [rule for rule in names if rule in measured_rules]
    sizes = sorted({sample.size for sample in samples})
    figure = new_figure(4.4 * len(rules), 7.2)
    panels = figure.subplots(2, len(rules), sharey="row", sharex=True, squeeze=False)

    for column, rule in enumerate(rules):
        rule_samples = [sample for sample in samples if sample.rule == rule]
        stream_panel, change_panel = panels[:, column]
        _draw_steps(stream_panel, change_panel, rule_samples, sizes)
        stream_panel.set_title(names[rule])
        change_panel.set_title(f"last step: exponent {exponents[rule]}", fontsize=9)
        change_panel.set_xlabel("layers" if axis == "depth" else axis)
        # On logarithmic axes a power law is a straight line whose slope is the exponent.
        _use_octaves(stream_panel, sizes)
        _use_octaves(change_panel, sizes)

    # Panels of a row share their axis, and columns their colours: one label and legend are enough.
    panels[0][0].set_ylabel("RMS of the residual stream")
    panels[1][0].set_ylabel("RMS of its change")
    panels[0][-1].legend(fontsize=8)
    return figure


def _exponents_of_change(result: Result, axis: str) -> dict[str, Estimate | None]:
    """By rule: the exponent over the axis of what the picture shows."""
    (change,) = [
        finding
        for finding in result.findings
        if finding.band.axis == axis and finding.band.quantity == STREAM_CHANGE
    ]
    return {"model": change.model, "control": change.control, **change.beside}


def _draw_steps(
    stream_panel: Any, change_panel: Any, samples: Sequence[Sample], sizes: Sequence[int]
) -> None:
    """Draw one line a step, from blue at the first to red at the last."""
    step_count = len(samples[0].measured.stream)
    last_step = step_count - 1
    for step in range(step_count):
        progress = step / max(1, last_step)
        color = (0.15 + 0.75 * progress, 0.3, 0.8 - 0.6 * progress)
        # The legend names the ends and the first step after training began; more would hide lines.
        label = f"step {step}" if step in (0, 1, last_step) else None
        streams = [_mean(samples, size, "stream", step) for size in sizes]
        stream_panel.plot(sizes, streams, marker=".", color=color, label=label)
        # The change at step 0 is zero and has no logarithm.
        if step > 0:
            changes = [_mean(samples, size, "stream_change", step) for size in sizes]
            change_panel.plot(sizes, changes, marker=".", color=color)


def _mean(samples: Sequence[Sample], size: int, name: str, step: int) -> float:
    """The mean over seeds of one figure of the models of one size."""
    figures = [getattr(sample.measured, name) for sample in samples if sample.size == size]
    return float(np.mean([by_step[step] for by_step in figures]))


def _use_octaves(panel: Any, sizes: Sequence[int]) -> None:
    """Logarithmic axes of base two, with a tick at every size that was measured."""
    panel.set_xscale("log", base=2)
    panel.set_yscale("log", base=2)
    panel.set_xticks(sizes, [str(size) for size in sizes])
    panel.grid(alpha=0.3)


def write_check(result: Result, folder: Path, name: str, settings: dict[str, Any]) -> None:
    """Write coordinate_check.json, coordinate_check.html and one PNG an axis into `folder`.

    `name` is the title of the model under check. Raises ConfigError where the folder cannot be
    made.
    """
    make_folder(folder)
    # With the settings beside the figures, the check can be repeated from the file alone.
    content = dump({**result.to_json(), "settings": settings})
    write_whole(folder / "coordinate_check.json", content)

    report = Report("Coordinate check", result.reason)
    rules = rules_beside(result)
    headers = ["axis", "quantity", "band", "model", *rules, "control", ""]
    rows = [_finding_row(finding, rules) for finding in result.findings]
    report.section("Exponents").table(headers, rows, "Mean over seeds, with 95 % intervals.")

    titles = {"model": name}
    titles.update(zip(rules, rules, strict=True))
    for axis in dict.fromkeys(sample.axis for sample in result.samples):
        # Each axis has its own control: what is wrong over depth may be right over width.
        titles["control"] = f"control: {CONTROLS[axis]}"
        picture_name = f"coordinate_check_{axis}"
        picture = png_of(draw_check(result, axis, titles))
        write_whole(folder / f"{picture_name}.png", picture)
        caption = "One panel a parameterization, one line a step."
        report.section(f"Over {axis}").picture(picture_name, picture, caption)
    report.write_html(folder / "coordinate_check.html")


def _finding_row(finding: Finding, rules: Sequence[str]) -> list[str]:
    band = finding.band
    limits = band_text(band.low, band.high)
    beside = [str(finding.beside.get(rule, "")) for rule in rules]
    control = str(finding.control or "")
    return [band.axis, band.quantity, limits, str(finding.model), *beside, control, finding.mark]


def band_text(low: float, high: float) -> str:
    """The band's limits; empty for a quantity that is only reported."""
    return f"{low:+.2f} to {high:+.2f}" if math.isfinite(low) else ""


def describe_laziness(result: LazinessResult, base_num_layers: int) -> str:
    """The medians by depth and the exponents as text, one line a rule, and the verdict's reason."""
    depths = _depths_of(result)
    depth_headers = "".join(f"{depth:>9}" for depth in depths)
    first_depth = FIRST_DEPTH * base_num_layers
    # Only depths from the first fitted one on count in the exponent, so the header names it.
    lines = [f"{'layers':<12}{depth_headers}  exponent from {first_depth} layers on"]
    for rule, medians in result.medians.items():
        median_columns = "".join(f"{medians[depth]:>9.4f}" for depth in depths)
        slope = result.slopes.get(rule, NO_SLOPE)
        lines.append(f"{rule:<12}{median_columns}  {slope}")
    return "\n".join([*lines, result.reason])


def _depths_of(result: LazinessResult) -> list[int]:
    """The depths that were measured under any rule, ascending."""
    depths: set[int] = set()
    for medians in result.medians.values():
        depths.update(medians)
    return sorted(depths)


def draw_laziness(result: LazinessResult) -> Any:
    """A figure of laziness over depth, one line a parameterization with its exponent.

    Thin lines are single seeds; grey lines have the exponents that bound the verdict.
    """
    figure = new_figure(6.5, 4.5)
    axis = figure.subplots()
    for number, (rule, medians) in enumerate(result.medians.items()):
        color = f"C{number}"
        label = f"{rule} {result.slopes.get(rule, '')}"
        axis.plot(list(medians), list(medians.values()), marker="o", color=color, label=label)
        # How far single seeds are apart shows whether the medians' slope can be trusted.
        rule_samples = [sample for sample in result.samples if sample.rule == rule]
        for seed in sorted({sample.seed for sample in result.samples}):
            seed_medians = _seed_medians(rule_samples, seed)
            depths = list(seed_medians)
            axis.plot(depths, list(seed_medians.values()), color=color, alpha=0.3, linewidth=0.8)

    # The bounds start where the fit does: at shallower depths other terms than the exponent count.
    medians = result.medians.get("own", {})
    fitted_depths = [depth for depth in medians if depth >= result.first_depth]
    bounds = ((MODEL_ABOVE, "--", "complete: above"), (CONTROL_BELOW, ":", "lazy: below"))
    for bound, style, meaning in bounds:
        line = []
        for depth in fitted_depths:
            start = fitted_depths[0]
            line.append(medians[start] * (depth / start) ** bound)
        label = f"{meaning} {bound}"
        axis.plot(fitted_depths, line, style, color="gray", linewidth=1.0, label=label)

    _use_octaves(axis, sorted({sample.num_layers for sample in result.samples}))
    axis.set_xlabel("layers")
    axis.set_ylabel("|F(th1) - F(th0) - J d| / |J d|, median over blocks")
    axis.legend(fontsize=8)
    return figure


def _seed_medians(samples: Sequence[LazinessSample], seed: int) -> dict[int, float]:
    """By depth: the median over the blocks of one seed's model."""
    return {
        sample.num_layers: float(np.median(sample.blocks))
        for sample in samples
        if sample.seed == seed
    }


def write_laziness(result: LazinessResult, folder: Path, settings: dict[str, Any]) -> None:
    """Write laziness.json, .png and .html. Raises ConfigError where the folder cannot be made."""
    make_folder(folder)
    picture = png_of(draw_laziness(result))
    content = dump({**result.to_json(), "settings": settings})
    write_whole(folder / "laziness.json", content)
    write_whole(folder / "laziness.png", picture)

    report = Report("Laziness", result.reason)
    section = report.section("Over depth")
    depths = _depths_of(result)
    headers = ["parameterization", *(f"L = {depth}" for depth in depths), "exponent"]
    rows: list[list[Any]] = []
    for rule, medians in result.medians.items():
        slope = str(result.slopes.get(rule, ""))
        rows.append([rule, *(medians[depth] for depth in depths), slope])
    section.table(headers, rows)
    section.picture("laziness", picture, "Median over blocks; thin lines are the seeds.")
    report.write_html(folder / "laziness.html")


def make_folder(folder: Path) -> None:
    """Make a folder with its parents. Raises ConfigError where the system refuses it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"{folder} cannot be made: {error.strerror}. Choose another folder with --out."
        ) from None


def dump(value: Any) -> bytes:
    """JSON of plain data, after `finite`."""
    return json.dumps(finite(value)).encode()


def finite(value: Any) -> Any:
    """The same data with floats rounded to 6 significant digits and non-finite ones as None.

    Repetitions agree in fewer digits than six, and JSON has no infinities and no NaN.
    """
    if isinstance(value, dict):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    if isinstance(value, float):
        # Through text, for rounding to significant digits; json.dumps then writes the short form.
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value

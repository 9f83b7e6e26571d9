"""The report of a sweep: report.html (self-contained), report.md with pictures, report.json."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_completep.document import PALETTE, Report, new_figure
from megatron_completep.files import write_whole
from megatron_completep.instruments import lr_transfer, sweep
from megatron_completep.instruments.check_report import dump, finite
from megatron_completep.instruments.fits import Estimate
from megatron_completep.instruments.lr_curves import Curve, order_of_shapes, shape_text
from megatron_completep.instruments.lr_horizon import Horizon, Quality
from megatron_completep.instruments.lr_transfer import (
    DIVERGENCE_NATS,
    DRIFT_BAND,
    REGRET_BAND,
    Analysis,
    CurveSummary,
    Drift,
    Saving,
)
from megatron_completep.instruments.lr_transfer_answer import (
    best_rates,
    next_commands,
    proxy_of,
    write_proxy,
)

Say = Callable[[str], None]


_OPTIMUM_HEADERS = [
    "parameterization",
    "layers",
    "width",
    "experts",
    "steps",
    "wd",
    "init std",
    "seeds",
    "best log2 lr",
    "grid step",
    "loss",
    "drift",
    "regret",
    "says",
    "edge",
    "tau",
    "load",
]
_DRIFT_HEADERS = [
    "parameterization",
    "width",
    "steps",
    "weight decay",
    "octaves per doubling",
    "verdict",
]
_SAVING_HEADERS = ["parameterization", "shape", "against", "its shape", "saving, %", "verdict"]


def report(folder: Path, baseline: str = "mup", say: Say = lambda text: None) -> dict[str, Any]:
    """Analyse a sweep's folder and write its report, and the proxy's configuration, into it.

    Writes report.html, report.md, its pictures and report.json, and returns what the last one
    holds. Raises DataError where the folder holds no sweep or no curve is complete.
    """
    analysis = lr_transfer.analyse(folder, baseline)
    document = build(analysis)
    document.write_html(folder / "report.html")
    document.write_markdown(folder / "report.md")
    # The commands below read this file, so it is there before they are printed.
    write_proxy(sweep.load_points(folder), proxy_of(analysis.curves), folder)

    commands = next_commands(folder, analysis.curves)
    plain: dict[str, Any] = finite({**analysis.to_json(), "next": commands})
    write_whole(folder / "report.json", dump(plain))
    say(summary(analysis))
    say(f"written: {folder / 'report.html'}, report.md, report.json")
    say("\n".join(commands))
    return plain


def summary(analysis: Analysis) -> str:
    """The findings as text, one a line: best learning rates, drifts, regrets, savings."""
    rates = best_rates(analysis.curves, analysis.optima)
    return "\n".join([points_line(analysis), *rates, *verdict_lines(analysis)])


def points_line(analysis: Analysis) -> str:
    """How much of the sweep the figures rest on."""
    return f"{analysis.points_done} points done, {analysis.points_missing} missing"


def verdict_lines(analysis: Analysis) -> list[str]:
    """Drifts, regrets and savings with their verdicts, one a line."""
    lines = [_drift_line(drift) for drift in analysis.drifts]
    for optimum in analysis.optima:
        # The base shape is not compared with itself.
        if optimum.regret is not None:
            lines.append(_regret_line(optimum, optimum.regret))
    lines += [_saving_line(saving) for saving in analysis.savings]
    lines += [_horizon_line(horizon) for horizon in analysis.horizons]
    lines += [_quality_line(quality) for quality in analysis.qualities]
    return lines


def _drift_line(drift: Drift) -> str:
    setting = f"wd {drift.base_weight_decay:g}, {drift.train_steps} steps"
    slope = f"{drift.per_doubling} octaves per doubling"
    return f"{drift.parameterization:<11} {setting}: {slope}: {drift.verdict}"


def _regret_line(optimum: CurveSummary, regret: Estimate) -> str:
    shape = shape_text(optimum.num_layers, optimum.hidden_size, optimum.num_experts)
    name = f"{optimum.parameterization:<11} wd {optimum.base_weight_decay:g}, {shape}"
    return f"{name}: regret {regret_text(regret)} nats: {optimum.regret_verdict}"


def _saving_line(saving: Saving) -> str:
    rule, shape, against, against_shape, percent, verdict = saving_row(saving)
    return f"{rule} {shape} against {against} {against_shape}: {percent} % FLOPs: {verdict}"


def _horizon_line(horizon: Horizon) -> str:
    shape = f"{horizon.num_layers} x {horizon.hidden_size}"
    name = f"{horizon.parameterization:<11} wd {horizon.base_weight_decay:g}, {shape}"
    return f"{name}: best peak lr ~ tokens^-d, d = {horizon.exponent}: {horizon.verdict}"


def _quality_line(quality: Quality) -> str:
    setting = f"wd {quality.base_weight_decay:g}, {quality.train_steps} steps"
    numbers = [f"penalty {quality.penalty} nats", f"behind {quality.behind} nats"]
    if quality.robustness is not None:
        numbers.insert(0, f"robustness {quality.robustness}")
    if quality.fit_error is not None:
        numbers.insert(0, f"fit error {quality.fit_error} octaves")
    return f"{quality.parameterization:<11} {setting}: {', '.join(numbers)}: {quality.verdict}"


def build(analysis: Analysis) -> Report:
    """The document: drift, the optima of all shapes, compute saved, and the curves."""
    # The best learning rates stand in a table of their own.
    findings = "\n".join([points_line(analysis), *verdict_lines(analysis)])
    document = Report("Learning-rate transfer", findings)
    # A sweep over one depth has no drift, and one of a single length of training no savings.
    if analysis.drifts:
        _add_drifts(document, analysis.drifts)
    _add_optima(document, analysis.optima)
    if analysis.savings:
        _add_savings(document, analysis)
    if analysis.horizons:
        _add_horizons(document, analysis.horizons)
    if analysis.qualities:
        _add_qualities(document, analysis.qualities)
    _add_curves(document, analysis.curves, analysis.optima)
    return document


def _add_drifts(document: Report, drifts: Sequence[Drift]) -> None:
    section = document.section(
        "Drift over depth",
        "Slope of the best log2(learning rate) over log2(depth), with its 95 % interval. "
        f"Within ±{DRIFT_BAND} octaves per doubling the learning rate transfers; "
        "an interval that crosses that border leaves it unresolved.",
    )
    rows: list[list[Any]] = []
    for drift in drifts:
        setting = [drift.hidden_size, drift.train_steps, drift.base_weight_decay]
        rows.append([drift.parameterization, *setting, str(drift.per_doubling), drift.verdict])
    section.table(_DRIFT_HEADERS, rows)


def _add_optima(document: Report, optima: Sequence[CurveSummary]) -> None:
    section = document.section(
        "Optima",
        "Learning rates as exponents of two; intervals are 95 %, by bootstrap over seeds, "
        "and never narrower than the grid allows. "
        f"Regret: nats lost at the smallest shape's optimum; up to {REGRET_BAND} is small.",
    )
    caption = f"Edge: the mean loss is more than {DIVERGENCE_NATS} nats over the best."
    if any(optimum.num_experts for optimum in optima):
        caption += (
            " Load: of an expert, the largest over the mean in the last third of the steps, of the "
            "layer where it is largest."
        )
    headers, rows, common = without_common_columns(
        _OPTIMUM_HEADERS, [optimum_row(optimum) for optimum in optima]
    )
    if common:
        caption += f" All: {', '.join(common)}."
    section.table(headers, rows, caption)


def _add_savings(document: Report, analysis: Analysis) -> None:
    section = document.section(
        "Compute saved",
        "FLOPs that reach the loss of another rule or shape in its longest runs, "
        "as a saving in percent.",
    )
    # The picture below shows the curves that the savings are read off.
    rows = [saving_row(saving) for saving in analysis.savings]
    section.table(_SAVING_HEADERS, rows, "Shapes are layers x width.")
    figure = draw_lengths(analysis.curves)
    caption = "Loss at the optimum over FLOPs; the same seeds everywhere."
    section.picture("savings", figure, caption)


def _add_horizons(document: Report, horizons: Sequence[Horizon]) -> None:
    section = document.section(
        "Length of the run",
        "The exponent d of best peak learning rate ~ tokens^-d at a fixed batch, with its 95 % "
        "interval: what completep.duration_exponent takes. It holds for the decay that was swept.",
    )
    rows: list[list[Any]] = []
    for entry in horizons:
        shape = f"{entry.num_layers} x {entry.hidden_size}"
        lengths = ", ".join(map(str, entry.lengths))
        exponent = [str(entry.exponent), entry.error, entry.verdict]
        rows.append([entry.parameterization, shape, entry.base_weight_decay, lengths, *exponent])
    heads = ["parameterization", "shape", "wd", "steps", "exponent", "standard error", "verdict"]
    section.table(heads, rows)


def _add_qualities(document: Report, qualities: Sequence[Quality]) -> None:
    section = document.section(
        "Quality of transfer",
        "After arXiv 2605.21486. Fit error: octaves of the optima from their line over the size. "
        "Robustness: exponent of the curve's curvature over the size; lower is more forgiving. "
        "Penalty: nats lost at the largest shape at the smallest one's learning rate. Behind: nats "
        "of its best loss over the best rule's. Intervals are 95 %, by bootstrap over seeds.",
    )
    rows: list[list[Any]] = []
    for entry in qualities:
        numbers = [entry.fit_error, entry.robustness, entry.penalty, entry.behind]
        cells = [None if number is None else str(number) for number in numbers]
        setting = [entry.parameterization, entry.train_steps, entry.base_weight_decay]
        rows.append([*setting, entry.shapes, *cells, entry.verdict])
    heads = ["parameterization", "steps", "wd", "shapes"]
    section.table([*heads, "fit error", "robustness", "penalty", "behind", "verdict"], rows)


def _add_curves(document: Report, curves: Sequence[Curve], optima: Sequence[CurveSummary]) -> None:
    """One section a weight decay, with all its curves in one picture."""
    # A single learning rate is no curve.
    swept = [curve for curve in curves if curve.swept]
    for decay in sorted({curve.base_weight_decay for curve in swept}):
        section = document.section(f"Curves, weight decay {decay:g}")
        pairs = zip(curves, optima, strict=True)
        shown = [(c, o) for c, o in pairs if c.swept and c.base_weight_decay == decay]
        figure = draw_curves([curve for curve, _ in shown], [optimum for _, optimum in shown])
        caption = (
            f"Held-out loss over the learning rate, weight decay {decay:g}. Diamonds: the best "
            "learning rate with its 95 % interval. Dashed: that of the base shape."
        )
        section.picture(f"curves_wd_{decay:g}", figure, caption)


def without_common_columns(
    headers: Sequence[str], rows: Sequence[list[Any]]
) -> tuple[list[str], list[list[Any]], list[str]]:
    """(headers, rows without the columns in which all rows agree, what they agree in).

    A table of fifteen columns does not fit on a page. One row alone stays as it is.
    """
    kept = []
    common = []
    for column, header in enumerate(headers):
        cells = {row[column] for row in rows}
        if len(rows) < 2 or len(cells) > 1:
            kept.append(column)
        elif (cell := cells.pop()) not in (None, ""):
            common.append(f"{header} {cell}")
    shorter_rows = [[row[column] for column in kept] for row in rows]
    return [headers[column] for column in kept], shorter_rows, common


def optimum_row(optimum: CurveSummary) -> list[Any]:
    """The cells under _OPTIMUM_HEADERS; None is an empty cell."""
    edge = None
    if optimum.divergence_log2_lr is not None:
        edge = f"2^{optimum.divergence_log2_lr:g}"
    best = f"{optimum.log2_lr}" + (" (edge of the grid)" if optimum.at_edge else "")
    # Both are None for the base shape.
    drift = ""
    regret = ""
    if optimum.drift is not None and optimum.regret is not None:
        drift = str(optimum.drift)
        regret = regret_text(optimum.regret)
    return [
        optimum.parameterization,
        optimum.num_layers,
        optimum.hidden_size,
        optimum.num_experts or None,
        optimum.train_steps,
        optimum.base_weight_decay,
        optimum.base_init_std,
        optimum.seeds,
        best,
        optimum.grid_step,
        f"{optimum.loss.value:.3f}",
        drift,
        regret,
        optimum.regret_verdict,
        edge,
        optimum.tau,
        None if optimum.expert_load is None else f"{optimum.expert_load:.2f}",
    ]


def saving_row(saving: Saving) -> list[str]:
    """The cells under _SAVING_HEADERS."""
    return [
        saving.parameterization,
        shape_text(saving.num_layers, saving.hidden_size, saving.num_experts),
        saving.against,
        shape_text(
            saving.against_num_layers, saving.against_hidden_size, saving.against_num_experts
        ),
        str(saving.percent),
        saving.verdict,
    ]


def regret_text(regret: Estimate) -> str:
    """Nats with three decimals, and the interval where it is finite."""
    if math.isnan(regret.value):
        return "not on the grid"
    # Of one seed, or of an optimum at the edge of the grid, the interval is unbounded.
    if not math.isfinite(regret.high - regret.low):
        return f"{regret.value:.3f}"
    return f"{regret.value:.3f} [{regret.low:.3f}, {regret.high:.3f}]"


def draw_curves(curves: Sequence[Curve], optima: Sequence[CurveSummary]) -> Any:
    """A figure of the loss over the learning rate, one panel a parameterization, one line a shape.

    Bands are the range over seeds. A diamond is the vertex of a curve with its 95 % interval, which
    is left out where it is unbounded; the dashed line goes through that of the base shape, at which
    the learning rate was tuned. The product's panel is the first, and all share both axes.
    """
    rules = _product_first(curves)
    figure = new_figure(4.2 * len(rules), 4.0)
    panels = figure.subplots(1, len(rules), sharex=True, sharey=True, squeeze=False)[0]
    sizes = sorted({(*order_of_shapes(curve), curve.train_steps) for curve in curves})
    for panel, rule in zip(panels, rules, strict=True):
        for curve, optimum in zip(curves, optima, strict=True):
            if curve.parameterization == rule:
                size = (*order_of_shapes(curve), curve.train_steps)
                # Larger shapes are redder, in all panels alike.
                rank = sizes.index(size) / max(1, len(sizes) - 1)
                _draw_curve(panel, curve, optimum, (0.15 + 0.75 * rank, 0.25, 0.85 - 0.7 * rank))
        panel.set_title(rule)
        panel.set_xlabel("log2 learning rate")
        panel.grid(alpha=0.3)

    panels[0].set_ylim(*_loss_limits(curves))
    panels[0].set_ylabel("loss, nats a token")
    # A rule may lack some shapes, so the legend is that of the panel with the most lines.
    fullest = max(panels, key=lambda panel: len(panel.get_legend_handles_labels()[0]))
    fullest.legend(fontsize=8)
    return figure


def _product_first(curves: Sequence[Curve]) -> list[str]:
    """The rules of the curves: CompleteP before what it is compared with."""
    rules = dict.fromkeys(curve.parameterization for curve in curves)
    return sorted(rules, key=lambda rule: rule != "completep")


def _draw_curve(
    panel: Any, curve: Curve, optimum: CurveSummary, color: tuple[float, float, float]
) -> None:
    label = f"{shape_text(*order_of_shapes(curve))}, {curve.train_steps} steps"
    panel.plot(curve.log2_lr, curve.mean, marker="o", markersize=4, color=color, label=label)
    # The range over seeds shows what of a curve's shape is noise.
    lowest = curve.losses.min(axis=1)
    highest = curve.losses.max(axis=1)
    panel.fill_between(curve.log2_lr, lowest, highest, color=color, alpha=0.12)

    vertex = optimum.log2_lr
    interval = [[vertex.value - vertex.low], [vertex.high - vertex.value]]
    bounded = np.isfinite(interval).all()
    panel.errorbar(
        [vertex.value],
        [optimum.loss.value],
        xerr=interval if bounded else None,
        marker="D",
        markersize=7,
        markeredgecolor="white",
        capsize=4,
        color=color,
        zorder=3,
    )
    # The base shape is not compared with itself.
    if optimum.drift is None:
        panel.axvline(vertex.value, color=color, linestyle="--", linewidth=1)


def _loss_limits(curves: Sequence[Curve]) -> tuple[float, float]:
    """The limits of the loss axis: at most one nat, beyond which curves that diverge run out."""
    # A mean is infinite where a seed diverged.
    mean_losses = np.concatenate([curve.mean for curve in curves])
    finite_losses = mean_losses[np.isfinite(mean_losses)]
    lowest = float(finite_losses.min())
    highest = min(float(finite_losses.max()), lowest + 1.0)
    margin = 0.05 * (highest - lowest) + 0.01
    return lowest - margin, highest + margin


def draw_lengths(curves: Sequence[Curve]) -> Any:
    """A figure of the loss at the optimum over the FLOPs of a run.

    One panel a parameterization, one line a shape; bars are 95 % intervals.
    """
    rules = _product_first(curves)
    shapes = sorted({order_of_shapes(curve) for curve in curves})
    figure = new_figure(4.2 * len(rules), 4.0)
    panels = figure.subplots(1, len(rules), sharey=True, squeeze=False)[0]
    for panel, rule in zip(panels, rules, strict=True):
        rule_curves = [curve for curve in curves if curve.parameterization == rule]
        for number, shape in enumerate(shapes):
            runs = [curve for curve in rule_curves if order_of_shapes(curve) == shape]
            # A colour is a shape's in all panels, and a shape without runs keeps its label.
            _draw_length(panel, runs, PALETTE[number % 8], shape_text(*shape))
        panel.set_title(rule)
        panel.set_xlabel("FLOPs of a run")
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("loss, nats a token")
    panels[-1].legend(fontsize=8)
    return figure


def _draw_length(panel: Any, runs: Sequence[Curve], color: str, label: str) -> None:
    """Draw the losses of one shape by the FLOPs of its runs, with intervals."""
    by_length = sorted(runs, key=lambda curve: curve.flops)
    flops = [curve.flops for curve in by_length]
    estimates = [lr_transfer.best_loss(curve) for curve in by_length]
    losses = [estimate.value for estimate in estimates]
    # Matplotlib takes distances from the point, below it and above it.
    below = [estimate.value - estimate.low for estimate in estimates]
    above = [estimate.high - estimate.value for estimate in estimates]
    bars = [below, above]
    panel.errorbar(flops, losses, bars, marker="o", capsize=3, color=color, label=label)

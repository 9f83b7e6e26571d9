"""What a sweep says, for people: report.html (self-contained), report.md with pictures, report.json."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from megatron_completep.document import PALETTE, Report, new_figure
from megatron_completep.files import write_whole
from megatron_completep.instruments import lr_transfer, sweep
from megatron_completep.instruments.check_report import dump, finite
from megatron_completep.instruments.fits import Estimate
from megatron_completep.instruments.lr_transfer import (
    DRIFT_BAND,
    EDGE_NATS,
    REGRET_BAND,
    Analysis,
    Curve,
    Optimum,
    Saving,
)
from megatron_completep.instruments.lr_transfer_answer import (
    best_rates,
    next_commands,
    proxy_of,
    write_proxy,
)

Say = Callable[[str], None]


def report(folder: Path, baseline: str = "mup", say: Say = lambda text: None) -> dict[str, Any]:
    """Analyse a sweep's folder and write report.html, report.md, the pictures and report.json into it; returns what the last one holds."""
    analysis = lr_transfer.analyse(folder, baseline)
    document = build(analysis)
    document.write_html(folder / "report.html")
    document.write_markdown(folder / "report.md")
    write_proxy(sweep.load_points(folder), proxy_of(analysis.curves), folder)
    following = next_commands(folder, analysis.curves)
    plain: dict[str, Any] = finite({**analysis.to_json(), "next": following})
    write_whole(folder / "report.json", dump(plain))
    say(summary(analysis))
    say(f"written: {folder / 'report.html'}, report.md, report.json")
    say("\n".join(following))
    return plain


def summary(analysis: Analysis) -> str:
    """The findings in a few lines."""
    lines = [
        f"{analysis.points_done} points done, {analysis.points_missing} missing",
        *best_rates(analysis.curves, analysis.optima),
    ]
    for drift in analysis.drifts:
        decay = f"wd {drift.base_weight_decay:g}"
        lines.append(
            f"{drift.parameterization:<11} {decay}, {drift.train_steps} steps: {drift.per_doubling} octaves per doubling: {drift.verdict}"
        )
    for o in analysis.optima:
        if o.regret is not None:
            name = f"{o.parameterization:<11} wd {o.base_weight_decay:g}, {o.num_layers} x {o.hidden_size}"
            lines.append(f"{name}: regret {regret_text(o.regret)} nats: {o.regret_verdict}")
    for saving in analysis.savings:
        one = f"{saving.parameterization} {saving.num_layers} x {saving.hidden_size}"
        other = f"{saving.against} {saving.against_num_layers} x {saving.against_hidden_size}"
        lines.append(f"{one} against {other}: {saving.percent} % FLOPs: {saving.verdict}")
    return "\n".join(lines)


def build(analysis: Analysis) -> Report:
    """The document: drift first, then every shape, then the curves."""
    document = Report("Learning-rate transfer", summary(analysis))
    if analysis.drifts:
        section = document.section(
            "Drift over depth",
            f"Slope of the best log2(learning rate) over log2(depth), with its 95 % interval. Within ±{DRIFT_BAND} octaves per doubling "
            "the learning rate transfers; an interval that crosses that border leaves it unresolved.",
        )
        headers = [
            "parameterization",
            "width",
            "steps",
            "weight decay",
            "octaves per doubling",
            "verdict",
        ]
        rows = [
            [
                d.parameterization,
                d.hidden_size,
                d.train_steps,
                d.base_weight_decay,
                str(d.per_doubling),
                d.verdict,
            ]
            for d in analysis.drifts
        ]
        section.table(headers, rows)
    section = document.section(
        "Optima",
        "Learning rates as exponents of two; intervals are 95 %, by bootstrap over seeds, and never narrower than the grid allows. "
        f"Regret: nats lost at the smallest shape's optimum; up to {REGRET_BAND} is small.",
    )
    section.table(
        _OPTIMUM_HEADERS,
        [optimum_row(o) for o in analysis.optima],
        f"Edge: the mean loss is more than {EDGE_NATS} nats over the best.",
    )
    if analysis.savings:
        section = document.section(
            "Compute saved",
            "FLOPs that reach the loss of another rule or shape in its longest runs, as a saving in percent.",
        )
        headers = ["parameterization", "shape", "against", "its shape", "saving, %", "verdict"]
        section.table(
            headers,
            [saving_row(saving) for saving in analysis.savings],
            "Shapes are layers x width.",
        )
        section.picture(
            "savings",
            draw_lengths(analysis.curves),
            "Loss at the optimum over FLOPs; the same seeds everywhere.",
        )
    swept = [c for c in analysis.curves if len(c.log2_lr) > 1]
    for decay in sorted({c.base_weight_decay for c in swept}):
        section = document.section(f"Curves, weight decay {decay:g}")
        curves = [c for c in swept if c.base_weight_decay == decay]
        section.picture(
            f"curves_wd_{decay:g}",
            draw_curves(curves),
            f"Held-out loss over the learning rate, weight decay {decay:g}.",
        )
    return document


_OPTIMUM_HEADERS = [
    "parameterization",
    "layers",
    "width",
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
]


def optimum_row(o: Optimum) -> list[Any]:
    edge = None if o.divergence_log2_lr is None else f"2^{o.divergence_log2_lr:g}"
    best = f"{o.log2_lr}" + (" (edge of the grid)" if o.at_edge else "")
    values = [
        o.parameterization,
        o.num_layers,
        o.hidden_size,
        o.train_steps,
        o.base_weight_decay,
        o.base_init_std,
        o.seeds,
    ]
    drift, regret = (
        ("", "") if o.drift is None or o.regret is None else (str(o.drift), regret_text(o.regret))
    )
    return [
        *values,
        best,
        o.grid_step,
        f"{o.loss.value:.3f}",
        drift,
        regret,
        o.regret_verdict,
        edge,
        o.tau,
    ]


def saving_row(s: Saving) -> list[str]:
    shapes = (
        f"{s.num_layers} x {s.hidden_size}",
        f"{s.against_num_layers} x {s.against_hidden_size}",
    )
    return [s.parameterization, shapes[0], s.against, shapes[1], str(s.percent), s.verdict]


def regret_text(regret: Estimate) -> str:
    if math.isnan(regret.value):
        return "not on the grid"
    if not math.isfinite(regret.high - regret.low):
        return f"{regret.value:.3f}"
    return f"{regret.value:.3f} [{regret.low:.3f}, {regret.high:.3f}]"


def draw_curves(curves: Sequence[Curve]) -> Any:
    """One panel a parameterization, one line a shape; the band is the spread over seeds."""
    rules = list(dict.fromkeys(c.parameterization for c in curves))
    figure = new_figure(4.2 * len(rules), 4.0)
    axes = figure.subplots(1, len(rules), sharey=True, squeeze=False)[0]
    sizes = sorted({(c.num_layers, c.hidden_size, c.train_steps) for c in curves})
    for axis, rule in zip(axes, rules, strict=True):
        for curve in (c for c in curves if c.parameterization == rule):
            place = sizes.index((curve.num_layers, curve.hidden_size, curve.train_steps)) / max(
                1, len(sizes) - 1
            )
            color = (0.15 + 0.75 * place, 0.25, 0.85 - 0.7 * place)
            label = f"{curve.num_layers} x {curve.hidden_size}, {curve.train_steps} steps"
            axis.plot(curve.log2_lr, curve.mean, marker="o", color=color, label=label)
            axis.fill_between(
                curve.log2_lr,
                curve.losses.min(axis=1),
                curve.losses.max(axis=1),
                color=color,
                alpha=0.15,
            )
            best = int(curve.mean.argmin())
            axis.plot(curve.log2_lr[best], curve.mean[best], marker="*", markersize=14, color=color)
        axis.set_title(rule)
        axis.set_xlabel("log2 learning rate")
        axis.grid(alpha=0.3)
    finite_losses = [loss for c in curves for loss in c.mean.tolist() if math.isfinite(loss)]
    lowest, highest = (
        min(finite_losses),
        min(max(finite_losses), min(finite_losses) + 1.0),
    )  # what diverges runs out of the picture
    margin = 0.05 * (highest - lowest) + 0.01
    axes[0].set_ylim(lowest - margin, highest + margin)
    axes[0].set_ylabel("loss, nats a token")
    max(axes, key=lambda axis: len(axis.get_legend_handles_labels()[0])).legend(
        fontsize=8
    )  # a rule may lack some shapes
    return figure


def draw_lengths(curves: Sequence[Curve]) -> Any:
    """One panel a parameterization, one line a shape: the loss at the optimum over the FLOPs of a run; bars are 95 % intervals."""
    rules = list(dict.fromkeys(c.parameterization for c in curves))
    shapes = sorted({(c.num_layers, c.hidden_size) for c in curves})
    figure = new_figure(4.2 * len(rules), 4.0)
    axes = figure.subplots(1, len(rules), sharey=True, squeeze=False)[0]
    for axis, rule in zip(axes, rules, strict=True):
        for number, shape in enumerate(shapes):
            runs = sorted(
                (
                    c
                    for c in curves
                    if (c.parameterization, c.num_layers, c.hidden_size) == (rule, *shape)
                ),
                key=lambda c: c.flops,
            )
            losses = [lr_transfer.best_loss(c) for c in runs]
            reach = [
                [loss.value - loss.low for loss in losses],
                [loss.high - loss.value for loss in losses],
            ]
            label = f"{shape[0]} x {shape[1]}"
            axis.errorbar(
                [c.flops for c in runs],
                [loss.value for loss in losses],
                reach,
                marker="o",
                capsize=3,
                color=PALETTE[number % 8],
                label=label,
            )
        axis.set_title(rule)
        axis.set_xlabel("FLOPs of a run")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("loss, nats a token")
    axes[-1].legend(fontsize=8)
    return figure

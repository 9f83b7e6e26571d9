"""Several runs in one report.

It shows the loss over steps, tokens, FLOPs and time, the optimizer, speed, telemetry, and the
settings in which the runs differ.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from megatron_completep.document import PALETTE, Picture, Report, Section, new_figure, png_of
from megatron_completep.model.flops import training_flops_per_token
from megatron_completep.reports.run_files import Run, differences, is_figure
from megatron_completep.run.hook import AT_POSITIONS

BINS = 400  # a longer curve is drawn as the means of this many bins, over the range in each
START = 0.05  # of the longest curve: its fall may run out of the picture of the losses
LAST = 20  # steps whose mean is called the last training loss
SOURCES = ("validation_loss/",)  # of one validation source
TELEMETRY = ("activation_rms/final", "attention_logit_max", "update_ratio/")
EXPERTS = ("expert_", "dead_experts", "dropped_tokens")
ROUTING = (
    "How tokens go to experts, in the first, the middle and the last layer that has them. "
    "docs/experts.md says what each figure is."
)
Across = Callable[[Run], "np.ndarray[Any, Any] | None"]
Panel = tuple[str, str, bool]  # (key of a row, what it is, whether its axis is logarithmic)
OPTIMIZER_PANELS: list[Panel] = [
    ("grad_norm", "gradient norm", True),
    ("lr", "learning rate", False),
]
SPEED_PANELS: list[Panel] = [
    ("tokens_per_second", "tokens a second", False),
    ("mfu", "model FLOPs utilisation", False),
    ("data_wait_seconds", "waiting for data (s a step)", False),
    ("memory_bytes", "memory (bytes)", False),
]


def compare(runs: Sequence[Run], title: str = "") -> Report:
    """The report of one run, or of several beside each other."""
    names = ", ".join(run.name for run in runs)
    alone = len(runs) == 1
    default_title = f"Run {names}" if alone else f"{len(runs)} runs"
    report = Report(title or default_title, "" if title or alone else names)
    _summary(report.section("Summary"), runs)
    _losses(report.section("Loss"), runs)
    _gallery(report, "Validation by source", runs, _panels(runs, SOURCES, log=False))
    _positions(report, runs)
    _gallery(report, "Optimizer", runs, OPTIMIZER_PANELS)
    _gallery(report, "Speed", runs, SPEED_PANELS)
    explanation = (
        "What the table of the parameterization predicts to be the same at every size; "
        "it is divided out."
    )
    _gallery(report, "Parameterization", runs, _panels(runs, TELEMETRY, log=True), explanation)
    _gallery(report, "Experts", runs, _expert_panels(runs), ROUTING)
    _settings(report, runs)
    return report


def _panels(runs: Sequence[Run], prefixes: tuple[str, ...], log: bool) -> list[Panel]:
    """A panel for every figure with one of these beginnings that any run has."""
    keys: set[str] = set()
    for run in runs:
        for row in run.rows:
            keys.update(key for key in row if key.startswith(prefixes))
    return [(key, key.replace("/", " of ").replace("_", " "), log) for key in sorted(keys)]


def _expert_panels(runs: Sequence[Run]) -> list[Panel]:
    """The figures of experts; of those by layer (KIND/layers.N) three layers, as there are many."""
    panels_of: dict[str, list[Panel]] = {}
    for panel in _panels(runs, EXPERTS, log=False):
        kind, _, _ = panel[0].partition("/")
        panels_of.setdefault(kind, []).append(panel)
    shown_panels: list[Panel] = []
    for panels in panels_of.values():
        panels.sort(key=lambda panel: _layer_number(panel[0]))
        places = sorted({0, len(panels) // 2, len(panels) - 1})
        shown_panels += [panels[place] for place in places]
    return shown_panels


def _layer_number(key: str) -> int:
    """N of KIND/layers.N; 0 of a figure of the whole model."""
    _, _, number = key.partition("/layers.")
    return int(number) if number.isdigit() else 0


def summarize(run: Run) -> dict[str, Any]:
    """A run in a few figures, None where it does not have one.

    Losses are in nats a token, speeds are medians over steps.
    """
    _, losses = run.series("loss")
    validation_steps, validation_losses = run.series("validation_loss")
    best_loss = None
    best_step = None
    if validation_losses:
        best_loss = min(validation_losses)
        best_step = validation_steps[validation_losses.index(best_loss)]
    tokens = tokens_at(run)
    flops = flops_at(run)
    hours = hours_at(run)
    return {
        "name": run.name,
        "steps": run.rows[-1]["step"],
        "tokens": None if tokens is None else int(tokens[-1]),
        "flops": None if flops is None else float(flops[-1]),
        "hours": None if hours is None else float(hours[-1]),
        # Single steps are noisy, so the last training loss is a mean.
        "training_loss": statistics.fmean(losses[-LAST:]) if losses else None,
        "validation_loss": validation_losses[-1] if validation_losses else None,
        "best_validation_loss": best_loss,
        "best_validation_step": best_step,
        "tokens_per_second": _median(run, "tokens_per_second"),
        "mfu": _median(run, "mfu"),
        "skipped_steps": sum(row.get("skipped") is True for row in run.rows),
        "notes": run.notes,
    }


def _median(run: Run, key: str) -> float | None:
    _, figures = run.series(key)
    return statistics.median(figures) if figures else None


def steps_at(run: Run) -> Any:
    """The step of each row."""
    return np.array([row["step"] for row in run.rows], dtype=float)


def tokens_at(run: Run) -> Any:
    """Tokens read up to each row; None where a row does not say."""
    tokens = [row.get("tokens") for row in run.rows]
    return np.array(tokens, dtype=float) if all(map(is_figure, tokens)) else None


def flops_at(run: Run) -> Any:
    """Model FLOPs up to each row; None where tokens or the configuration are not known."""
    tokens = tokens_at(run)
    if tokens is None or run.model is None:
        return None
    return tokens * training_flops_per_token(run.model)


def hours_at(run: Run) -> Any:
    """Hours of training up to each row, without the pauses between launches.

    None where a row does not say, or where earlier rows are missing.
    """
    # A validation before the first step stands at its beginning.
    seconds = [row.get("step_seconds") if row["step"] else 0.0 for row in run.rows]
    if not all(map(is_figure, seconds)) or run.rows[0]["step"] > 1:
        return None
    return np.cumsum(np.array(seconds, dtype=float)) / 3600


# (label, name of the axis, its value at each row)
AXES: list[tuple[str, str, Across]] = [
    ("step", "step", steps_at),
    ("tokens", "tokens", tokens_at),
    ("FLOPs", "model FLOPs", flops_at),
    ("time", "hours of training", hours_at),
]


def _summary(section: Section, runs: Sequence[Run]) -> None:
    """Add the figures of the runs, one row a run, and what their files lack."""
    rows = [_summary_row(summarize(run)) for run in runs]
    # A column that no run has a figure for is left out; every run has a name.
    headers = []
    for header in rows[0]:
        if any(row[header] is not None for row in rows):
            headers.append(header)
    cells = []
    for row in rows:
        cells.append([row[header] for header in headers])
    caption = (
        f"Losses in nats a token, of training the mean of the last {LAST} steps; "
        "speeds are medians over steps."
    )
    section.table(headers, cells, caption)

    notes = []
    for run in runs:
        notes += [[run.name, note] for note in run.notes]
    if notes:
        section.table(["run", "what its files lack"], notes)


def _summary_row(summary: dict[str, Any]) -> dict[str, str | None]:
    """A run's cells by header, None where it does not have the figure."""
    best = None
    if summary["best_validation_step"] is not None:
        best = f"{summary['best_validation_loss']:.4f}, {summary['best_validation_step']:,}"
    utilisation = None
    if summary["mfu"] is not None:
        utilisation = f"{100 * summary['mfu']:.1f} %"
    return {
        "run": summary["name"],
        "steps": f"{summary['steps']:,}",
        "tokens": _short(summary["tokens"]),
        "FLOPs": _formatted(summary["flops"], ".3g"),
        "hours": _formatted(summary["hours"], ".3g"),
        "training loss": _formatted(summary["training_loss"], ".4f"),
        "validation loss": _formatted(summary["validation_loss"], ".4f"),
        "best, at step": best,
        "tokens a second": _formatted(summary["tokens_per_second"], ",.0f"),
        "MFU": utilisation,
        # No skipped step is the normal case and needs no column.
        "skipped steps": str(summary["skipped_steps"]) if summary["skipped_steps"] else None,
    }


def _losses(section: Section, runs: Sequence[Run]) -> None:
    """Add the losses over each axis, of which the reader chooses one."""
    pictures = []
    labels = []
    for label, axis_name, across in AXES:
        figure = _draw(
            runs,
            "loss",
            "loss (nats a token)",
            across,
            axis_name,
            size=(9.6, 5.0),
            points="validation_loss",
        )
        if figure is None:
            continue
        caption = (
            f"Loss by {axis_name}: lines for training, circles for validation; "
            f"the first {START:.0%} may run out of the picture."
        )
        # A run without the axis's values is not drawn over it, and would be missed.
        without = [run.name for run in runs if across(run) is None]
        if without:
            caption += f" Not known of {', '.join(without)}."
        pictures.append(Picture(f"loss_by_{label.lower()}", png_of(figure), caption))
        labels.append(f"by {label}")
    if pictures:
        section.pictures(pictures, labels)
    else:
        section.text("No run recorded a loss.")


def _gallery(
    report: Report,
    title: str,
    runs: Sequence[Run],
    panels: Sequence[Panel],
    text: str = "",
) -> None:
    """A section with a small picture of each figure that any run has; none where no run has any."""
    pictures = []
    for key, words, log in panels:
        figure = _draw(runs, key, words, steps_at, "step", (5.2, 3.3), log=log)
        if figure is not None:
            name = key.replace("/", "_")
            caption = f"{words[0].upper()}{words[1:]}."
            pictures.append(Picture(name, png_of(figure), caption))
    if not pictures:
        return
    section = report.section(title, text)
    # Section.pictures takes at most 8.
    for start in range(0, len(pictures), 8):
        section.pictures(pictures[start : start + 8])


def _positions(report: Report, runs: Sequence[Run]) -> None:
    """Add the losses by position, where any run recorded them: a column a run."""
    losses = [_last_by_position(run) for run in runs]
    parts = set().union(*losses)
    if not parts:
        return
    rows = []
    for part in sorted(parts, key=_first_position):
        cells = [_formatted(by_position.get(part), ".4f") for by_position in losses]
        rows.append([part, *cells])
    caption = "Of the labels of these tokens of each sequence, at a run's last validation."
    headers = ["positions", *(run.name for run in runs)]
    report.section("Validation by position").table(headers, rows, caption)


def _last_by_position(run: Run) -> dict[str, float]:
    """The losses of the last validation that recorded them, by FIRST-LAST; none: empty."""
    for row in reversed(run.rows):
        losses = {}
        for key, loss in row.items():
            if key.startswith(AT_POSITIONS) and is_figure(loss):
                losses[key.removeprefix(AT_POSITIONS)] = loss
        if losses:
            return losses
    return {}


def _first_position(part: str) -> tuple[int, str]:
    """What FIRST-LAST is sorted by; a name that is none of ours comes first."""
    first = part.split("-")[0]
    return (int(first) if first.isdecimal() else -1), part


def _settings(report: Report, runs: Sequence[Run]) -> None:
    """Add the settings in which several runs differ."""
    if len(runs) < 2:
        return
    section = report.section("Settings that differ")
    differing = differences(runs)
    if not differing:
        # Without every configuration, equal settings prove nothing.
        section.text("None." if all(run.settings for run in runs) else "None that is known.")
        return
    rows = []
    for key, settings in differing.items():
        cells = [None if setting is None else str(setting) for setting in settings]
        rows.append([key, *cells])
    section.table(["setting", *(run.name for run in runs)], rows)


def _draw(
    runs: Sequence[Run],
    key: str,
    words: str,
    across: Across,
    below: str,
    size: tuple[float, float],
    log: bool = False,
    points: str | None = None,
) -> Any:
    """A figure with one curve a run, or None where no run has the figure `key`.

    words, below: the names of the axes. log: the vertical axis is logarithmic where any value is
    positive. points: the key of a second figure, which is drawn as circles.
    """
    figure = new_figure(*size)
    axes = figure.subplots()
    drawn = False
    positive = False
    for number, run in enumerate(runs):
        at = across(run)
        if at is None:
            continue
        color = PALETTE[number % len(PALETTE)]
        # Colours repeat after the palette's end; dashes tell the runs of one colour apart.
        style = "-" if number < len(PALETTE) else "--"
        x, y = _recorded(run, key, at)
        if len(x):
            drawn = True
            positive = positive or bool((y > 0).any())
            _curve(axes, x, y, color, style, run.name)
        if points is not None:
            _circles(axes, *_recorded(run, points, at), color)
    if not drawn:
        return None

    # A logarithmic axis needs a value that has a logarithm.
    if log and positive:
        axes.set_yscale("log")
    if points is not None:
        axes.set_ylim(top=_top(axes))
    _label(axes, below, words)
    if len(runs) > 1:
        axes.legend(fontsize=9)
    return figure


def _top(axes: Any) -> float:
    """The end of the axis of losses: above all that comes after START of the longest curve."""
    curves = []
    for line in axes.get_lines():
        curves.append((np.asarray(line.get_xdata()), np.asarray(line.get_ydata())))
    end = max(float(x[-1]) for x, _ in curves)
    later = np.concatenate([y[x >= START * end] for x, y in curves])
    height = later.max() - later.min()
    # The last term keeps the axis from being empty where all losses are equal.
    return float(later.max() + 0.15 * height + 1e-9)


def _label(axes: Any, below: str, words: str) -> None:
    from matplotlib.ticker import EngFormatter

    axes.set_xlabel(below)
    axes.set_ylabel(words)
    axes.grid(alpha=0.25)
    axes.margins(x=0.02)
    # Large numbers read better with a prefix: 20M tokens, 1.5 G bytes.
    if below in ("step", "tokens"):
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    if words in ("tokens a second", "memory (bytes)"):
        axes.yaxis.set_major_formatter(EngFormatter(sep=" "))


def _recorded(run: Run, key: str, at: Any) -> tuple[Any, Any]:
    """(positions, values) of a figure at the rows that have it; `at`: the position of each row."""
    figures = [row[key] if is_figure(row.get(key)) else np.nan for row in run.rows]
    y = np.array(figures, dtype=float)
    recorded = np.isfinite(y)
    return at[recorded], y[recorded]


def _curve(axes: Any, x: Any, y: Any, color: str, style: str, name: str) -> None:
    """A line; a long series as the means of BINS bins, over the range of the values in each."""
    if len(x) <= BINS:
        # A line through one or two points would hardly be seen.
        marker = "o" if len(x) < 3 else None
        axes.plot(x, y, style, color=color, linewidth=1.6, label=name, marker=marker)
        return
    middles = [x_bin.mean() for x_bin in np.array_split(x, BINS)]
    y_bins = np.array_split(y, BINS)
    means = [y_bin.mean() for y_bin in y_bins]
    lowest = [y_bin.min() for y_bin in y_bins]
    highest = [y_bin.max() for y_bin in y_bins]
    axes.fill_between(middles, lowest, highest, color=color, alpha=0.15, linewidth=0)
    axes.plot(middles, means, style, color=color, linewidth=1.6, label=name)


def _circles(axes: Any, x: Any, y: Any, color: str) -> None:
    """Circles in front of the lines, with a white edge against lines of their own colour."""
    if len(x):
        edge = {"markeredgecolor": "white", "markeredgewidth": 0.8}
        axes.plot(x, y, "o", color=color, markersize=5, zorder=3, **edge)


def _formatted(figure: float | None, specification: str) -> str | None:
    return None if figure is None else format(figure, specification)


def _short(number: float | None) -> str | None:
    """1234567 as 1.23 M."""
    if number is None:
        return None
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g} {letter}"
    return f"{number:g}"

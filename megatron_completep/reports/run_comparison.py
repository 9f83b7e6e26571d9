"""Several runs in one report: loss over steps, tokens, FLOPs and time; the optimizer; speed; telemetry; differing settings."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from megatron_completep.document import PALETTE, Picture, Report, Section, new_figure, png_of
from megatron_completep.model.flops import training_flops_per_token
from megatron_completep.reports.run_files import Run, differences, is_figure

BINS = 400  # a longer curve is drawn as the mean of this many parts, over the band of their values
START = 0.05  # of the longest curve: its fall may run out of the picture of the losses
LAST = 20  # steps whose mean is called the last training loss
TELEMETRY = ("activation_rms/final", "attention_logit_max", "update_ratio/")
Across = Callable[[Run], "np.ndarray[Any, Any] | None"]


def compare(runs: Sequence[Run], title: str = "") -> Report:
    """The report of one run or of several beside each other."""
    names = ", ".join(run.name for run in runs)
    report = Report(
        title or (f"Run {names}" if len(runs) == 1 else f"{len(runs)} runs"),
        "" if title or len(runs) == 1 else names,
    )
    _summary(report.section("Summary"), runs)
    _losses(report.section("Loss"), runs)
    panels = [
        ("grad_norm", "gradient norm", True),
        ("lr", "learning rate", False),
    ]
    _gallery(report, "Optimizer", runs, panels)
    panels = [
        ("tokens_per_second", "tokens a second", False),
        ("mfu", "model FLOPs utilisation", False),
        ("data_wait_seconds", "waiting for data (s a step)", False),
        ("memory_bytes", "memory (bytes)", False),
    ]
    _gallery(report, "Speed", runs, panels)
    found = sorted(
        {key for run in runs for row in run.rows for key in row if key.startswith(TELEMETRY)}
    )
    text = "What the table of the parameterization predicts to be the same at every size; it is divided out."
    _gallery(
        report,
        "Parameterization",
        runs,
        [(key, key.replace("/", " of ").replace("_", " "), True) for key in found],
        text,
    )
    _settings(report, runs)
    return report


def summarize(run: Run) -> dict[str, Any]:
    """A run in a few figures, None where it does not have one. Losses in nats a token, speeds as medians over steps."""
    losses = run.series("loss")[1]
    steps, held_out = run.series("validation_loss")
    tokens, flops, hours = (across(run) for across in (tokens_at, flops_at, hours_at))
    best = min(range(len(held_out)), key=held_out.__getitem__) if held_out else None
    speed = {key: run.series(key)[1] for key in ("tokens_per_second", "mfu")}
    return {
        "name": run.name,
        "steps": run.rows[-1]["step"],
        "tokens": None if tokens is None else int(tokens[-1]),
        "flops": None if flops is None else float(flops[-1]),
        "hours": None if hours is None else float(hours[-1]),
        "training_loss": statistics.fmean(losses[-LAST:]) if losses else None,
        "validation_loss": held_out[-1] if held_out else None,
        "best_validation_loss": None if best is None else held_out[best],
        "best_validation_step": None if best is None else steps[best],
        "tokens_per_second": statistics.median(speed["tokens_per_second"])
        if speed["tokens_per_second"]
        else None,
        "mfu": statistics.median(speed["mfu"]) if speed["mfu"] else None,
        "skipped_steps": sum(row.get("skipped") is True for row in run.rows),
        "notes": run.notes,
    }


def steps_at(run: Run) -> Any:
    return np.array([row["step"] for row in run.rows], dtype=float)


def tokens_at(run: Run) -> Any:
    """Tokens read up to each row; None where a row does not say."""
    values = [row.get("tokens") for row in run.rows]
    return np.array(values, dtype=float) if all(map(is_figure, values)) else None


def flops_at(run: Run) -> Any:
    """Model FLOPs up to each row; None where tokens or the configuration are not known."""
    tokens = tokens_at(run)
    return (
        None
        if tokens is None or run.model is None
        else tokens * training_flops_per_token(run.model)
    )


def hours_at(run: Run) -> Any:
    """Hours of training up to each row, pauses between starts left out; None where a row does not say, or earlier rows are missing."""
    values = [row.get("step_seconds") for row in run.rows]
    return (
        np.cumsum(np.array(values, dtype=float)) / 3600
        if all(map(is_figure, values)) and run.rows[0]["step"] == 1
        else None
    )


AXES: list[tuple[str, str, Across]] = [
    ("step", "step", steps_at),
    ("tokens", "tokens", tokens_at),
    ("FLOPs", "model FLOPs", flops_at),
    ("time", "hours of training", hours_at),
]


def _summary(section: Section, runs: Sequence[Run]) -> None:
    found = [summarize(run) for run in runs]
    columns: list[tuple[str, Callable[[dict[str, Any]], str | None]]] = [
        ("steps", lambda s: f"{s['steps']:,}"),
        ("tokens", lambda s: _short(s["tokens"])),
        ("FLOPs", lambda s: None if s["flops"] is None else f"{s['flops']:.3g}"),
        ("hours", lambda s: None if s["hours"] is None else f"{s['hours']:.3g}"),
        ("training loss", lambda s: _nats(s["training_loss"])),
        ("validation loss", lambda s: _nats(s["validation_loss"])),
        (
            "best, at step",
            lambda s: (
                None
                if s["best_validation_step"] is None
                else f"{_nats(s['best_validation_loss'])}, {s['best_validation_step']:,}"
            ),
        ),
        (
            "tokens a second",
            lambda s: None if s["tokens_per_second"] is None else f"{s['tokens_per_second']:,.0f}",
        ),
        ("MFU", lambda s: None if s["mfu"] is None else f"{100 * s['mfu']:.1f} %"),
        ("skipped steps", lambda s: str(s["skipped_steps"]) if s["skipped_steps"] else None),
    ]
    cells = [[s["name"], *(show(s) for _, show in columns)] for s in found]
    kept = [0] + [
        column
        for column in range(1, len(columns) + 1)
        if any(row[column] is not None for row in cells)
    ]
    headers = ["run", *(name for name, _ in columns)]
    section.table(
        [headers[c] for c in kept],
        [[row[c] for c in kept] for row in cells],
        f"Losses in nats a token, of training the mean of the last {LAST} steps; speeds are medians over steps.",
    )
    notes = [[run.name, note] for run in runs for note in run.notes]
    if notes:
        section.table(["run", "what its files lack"], notes)


def _losses(section: Section, runs: Sequence[Run]) -> None:
    pictures, labels = [], []
    for label, words, across in AXES:
        figure = _draw(
            runs,
            "loss",
            "loss (nats a token)",
            across,
            words,
            size=(9.6, 5.0),
            points="validation_loss",
        )
        if figure is not None:
            without = [run.name for run in runs if across(run) is None]
            caption = (
                f"Loss by {words}: lines for training, circles for validation; the first {START:.0%} may run out of the picture."
                + (f" Not known of {', '.join(without)}." if without else "")
            )
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
    panels: Sequence[tuple[str, str, bool]],
    text: str = "",
) -> None:
    """A section with one small picture a figure that any run has; none where no run has any."""
    drawn = [
        (key, words, _draw(runs, key, words, steps_at, "step", (5.2, 3.3), log=log))
        for key, words, log in panels
    ]
    pictures = [
        Picture(key.replace("/", "_"), png_of(figure), f"{words[0].upper()}{words[1:]}.")
        for key, words, figure in drawn
        if figure
    ]
    if not pictures:
        return
    section = report.section(title, text)
    for start in range(0, len(pictures), 8):
        section.pictures(pictures[start : start + 8])


def _settings(report: Report, runs: Sequence[Run]) -> None:
    if len(runs) < 2:
        return
    found = differences(runs)
    section = report.section("Settings that differ")
    if not found:
        section.text("None." if all(run.settings for run in runs) else "None that is known.")
        return
    section.table(
        ["setting", *(run.name for run in runs)],
        [[key, *(None if v is None else str(v) for v in row)] for key, row in found.items()],
    )


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
    """A curve a run, or None where no run has the figure; `points`: a second figure, drawn as circles."""
    figure = new_figure(*size)
    axes = figure.subplots()
    drawn = positive = False
    for number, run in enumerate(runs):
        at, color = across(run), PALETTE[number % len(PALETTE)]
        if at is None:
            continue
        style = "-" if number < len(PALETTE) else "--"
        x, y = _known(run, key, at)
        if len(x):
            drawn, positive = True, positive or bool((y > 0).any())
            _curve(axes, x, y, color, style, run.name)
        if points is not None:
            px, py = _known(run, points, at)
            if len(px):
                axes.plot(
                    px,
                    py,
                    "o",
                    color=color,
                    markersize=5,
                    markeredgecolor="white",
                    markeredgewidth=0.8,
                    zorder=3,
                )
    if not drawn:
        return None
    if log and positive:
        axes.set_yscale("log")
    if points is not None:
        axes.set_ylim(top=_top(axes))
    _label(axes, below, words)
    if len(runs) > 1:
        axes.legend(fontsize=9)
    return figure


def _top(axes: Any) -> float:
    """Where to end the axis of losses: above all that comes after the first part START of the longest curve."""
    lines = [(line.get_xdata(), line.get_ydata()) for line in axes.get_lines()]
    end = max(float(x[-1]) for x, _ in lines)
    later = [y[x >= START * end] for x, y in ((np.asarray(x), np.asarray(y)) for x, y in lines)]
    values = np.concatenate(later)
    return float(values.max() + 0.15 * (values.max() - values.min()) + 1e-9)


def _label(axes: Any, below: str, words: str) -> None:
    from matplotlib.ticker import EngFormatter

    axes.set_xlabel(below)
    axes.set_ylabel(words)
    axes.grid(alpha=0.25)
    axes.margins(x=0.02)
    if below in ("step", "tokens"):
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    if words in ("tokens a second", "memory (bytes)"):
        axes.yaxis.set_major_formatter(EngFormatter(sep=" "))


def _known(run: Run, key: str, at: Any) -> tuple[Any, Any]:
    values = np.array(
        [row[key] if is_figure(row.get(key)) else np.nan for row in run.rows], dtype=float
    )
    kept = np.isfinite(values)
    return at[kept], values[kept]


def _curve(axes: Any, x: Any, y: Any, color: str, style: str, name: str) -> None:
    """A line; a long series as the means of BINS parts over the band from the smallest to the largest value of each."""
    if len(x) <= BINS:
        marker = "o" if len(x) < 3 else None
        axes.plot(x, y, style, color=color, linewidth=1.6, label=name, marker=marker)
        return
    parts_x, parts_y = np.array_split(x, BINS), np.array_split(y, BINS)
    middle = [part.mean() for part in parts_x]
    axes.fill_between(
        middle,
        [part.min() for part in parts_y],
        [part.max() for part in parts_y],
        color=color,
        alpha=0.15,
        linewidth=0,
    )
    axes.plot(
        middle, [part.mean() for part in parts_y], style, color=color, linewidth=1.6, label=name
    )


def _nats(value: float | None) -> str | None:
    return None if value is None else f"{value:.4f}"


def _short(value: float | None) -> str | None:
    """1234567 as 1.23 M."""
    if value is None:
        return None
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g} {letter}"
    return f"{value:g}"

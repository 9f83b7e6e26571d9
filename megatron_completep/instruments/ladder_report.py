"""The report of a ladder: report.html (self-contained), report.md with pictures, report.json."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from megatron_completep.document import PALETTE, Report, new_figure
from megatron_completep.files import write_whole
from megatron_completep.instruments import ladder as ladders
from megatron_completep.instruments import sweep
from megatron_completep.instruments.check_report import dump, finite
from megatron_completep.instruments.fits import Estimate
from megatron_completep.instruments.ladder import Ladder
from megatron_completep.instruments.ladder_advice import beyond_warnings, ratio_warnings
from megatron_completep.instruments.ladder_analysis import (
    COLLAPSES,
    DIFFERS,
    FORECAST,
    Finished,
    RuleAnalysis,
    analyse,
)
from megatron_completep.instruments.ladder_fit import LEAST_RUNGS, MISFIT, WIDEST
from megatron_completep.instruments.run_shape import Asked, Family

Say = Callable[[str], None]
Sizes = tuple[float | None, float | None, int | None]  # parameters, FLOPs, depth


def report(folder: Path, say: Say = lambda text: None) -> dict[str, Any]:
    """Analyse a ladder's folder and write its report into it; returns what report.json holds.

    Its `verdict` is that of the ladder's first rule (`RuleAnalysis.verdict`).
    Raises DataError where the folder holds no ladder or no finished run.
    """
    ladder = ladders.load(folder)
    analyses = analyse(ladder, folder)
    missing = unfinished(ladder, folder)
    document = build(ladder, analyses, missing)
    document.write_html(folder / "report.html")
    document.write_markdown(folder / "report.md")
    main_analysis = analyses[0]
    verdict = overall(main_analysis)
    rules = [rule_to_json(analysis) for analysis in analyses]
    counts = {"runs": len(ladders.points(ladder)), "missing": sum(missing.values())}
    plain: dict[str, Any] = finite({"verdict": verdict, **counts, "rules": rules})
    write_whole(folder / "report.json", dump(plain))
    say("\n".join(findings(ladder, analyses, missing)))
    say(f"written: {folder / 'report.html'}, report.md, report.json")
    return plain


def predict(folder: Path, sizes: Sizes, say: Say = lambda text: None) -> dict[str, Any]:
    """The forecast of a run of another size; returns its figures.

    Without a law they are none, and the verdict is `unresolved`. Raises ConfigError for a size that
    the family has not, and DataError where no run is finished.
    """
    ladder = ladders.load(folder)
    analysis = analyse(ladder, folder)[0]
    missing = unfinished(ladder, folder)
    say(finished_text(ladder, missing))
    if analysis.law is None:
        say(f"no law: {analysis.reason}")
        return {"verdict": "unresolved", "reason": analysis.reason}
    per_parameter = ladder.scaling.tokens_per_parameter
    asked = Asked(ladder.ratio, per_parameter, *sizes)
    choice = Family(ladder.proxy).choose(asked)
    shape = choice.shape
    flops = shape.run_flops(per_parameter)
    estimate = analysis.law.forecast(flops, seeds=1)
    verdict = analysis.verdict(estimate)
    say(
        f"{shape}, N : L {shape.ratio:.3g}, {shape.parameters:,} parameters, {flops:.3g} FLOPs "
        f"({choice.miss:+.1%} from what was asked)"
    )
    say(f"loss {loss_text(estimate)} nats per token: {verdict}")
    beyond = flops / analysis.rungs[-1].flops
    say(f"{beyond:.3g} times the compute of the top rung that is finished")
    warnings = [*ratio_warnings(ladder, shape), *beyond_warnings(beyond)]
    for warning in warnings:
        say(f"warning: {warning}")
    figures: dict[str, Any] = {"loss": estimate.value, "low": estimate.low, "high": estimate.high}
    figures |= {"verdict": verdict, "warnings": warnings}
    return dict(finite({**asdict(shape), "flops": flops, **figures}))


def unfinished(ladder: Ladder, folder: Path) -> dict[str, int]:
    """Runs without a result by rung, for the rungs that have some; each configuration once."""
    missing_keys = {point.key for point in sweep.missing(ladders.points(ladder), folder)}
    counts: dict[str, int] = {}
    for run in ladders.runs(ladder):
        if run.point.key in missing_keys:
            counts[run.rung] = counts.get(run.rung, 0) + 1
            missing_keys.remove(run.point.key)
    return counts


def finished_text(ladder: Ladder, missing: Mapping[str, int]) -> str:
    """How much of the ladder the figures rest on."""
    count = len(ladders.points(ladder))
    missing_count = sum(missing.values())
    text = f"{count - missing_count} runs finished, {missing_count} missing"
    if not missing_count:
        return text
    rungs = ", ".join(f"{number} of rung {rung}" for rung, number in missing.items())
    return f"{text} ({rungs}): the figures are those of an unfinished ladder"


def overall(analysis: RuleAnalysis) -> str:
    """The verdict on a rule's ladder: that of its target, else that of its top rung."""
    if analysis.law is None:
        return "unresolved"
    if analysis.target is not None:
        return analysis.target_verdict
    top = analysis.holdout
    if top is not None:
        return analysis.verdict(top.forecast) if top.verdict == FORECAST else top.verdict
    return "no power law" if analysis.law.broken else "unresolved"


def rule_to_json(analysis: RuleAnalysis) -> dict[str, Any]:
    """Plain values of one rule's analysis; losses in nats."""
    law = analysis.law
    fields: dict[str, Any] = {
        "rule": analysis.rule,
        "rungs": [_rung_to_json(rung) for rung in analysis.rungs],
        "noise": asdict(analysis.noise),
        "law": None if law is None else {**asdict(law.law), "misfit": law.misfit},
        "residuals": None if law is None else law.residuals.tolist(),
        "reason": analysis.reason,
        "ends": [asdict(end) for end in analysis.ends],
        "spread": analysis.spread,
        "collapse": analysis.collapse,
        "study": [asdict(entry) for entry in analysis.study],
        "target": None if analysis.target is None else asdict(analysis.target),
        "target_verdict": analysis.target_verdict,
        "holdout": None,
    }
    top = analysis.holdout
    if top is not None:
        fields["holdout"] = {**asdict(top), "miss": top.miss, "inside": top.is_inside}
    return fields


def _rung_to_json(rung: Finished) -> dict[str, Any]:
    curve = None if rung.curve is None else rung.curve.tolist()
    seeds = list(rung.by_seed)
    fields = {**asdict(rung), "seeds": seeds, "losses": list(rung.losses), "curve": curve}
    del fields["by_seed"]
    return fields


def loss_text(estimate: Estimate) -> str:
    """Nats with their interval."""
    if not estimate.repeated:
        return f"{estimate.value:.4f} (one seed gives no interval)"
    return f"{estimate.value:.4f} [{estimate.low:.4f}, {estimate.high:.4f}]"


def findings(
    ladder: Ladder, analyses: Sequence[RuleAnalysis], missing: Mapping[str, int]
) -> list[str]:
    """The answers, a line each. missing: runs without a result, by rung."""
    lines = [finished_text(ladder, missing)]
    for analysis in analyses:
        lines += [f"{analysis.rule}: {line}" for line in _of_rule(ladder, analysis)]
    return lines


def _of_rule(ladder: Ladder, analysis: RuleAnalysis) -> list[str]:
    if analysis.law is None:
        return [f"no law: {analysis.reason}"]
    law = analysis.law.law
    noise = "unknown" if analysis.noise.degrees < 1 else f"{analysis.noise.sigma:.4f}"
    lines = [
        f"L(C) = {law.floor:.3f} + {law.scale:.3f} (C / {law.unit:.3g})^-{law.exponent:.3f}; "
        f"noise of a run {noise} nats; chance of such residuals {analysis.law.misfit:.2g}"
        + (": no power law" if analysis.law.broken else "")
    ]
    top = analysis.holdout
    if top is None:
        lines.append(f"too few rungs to try the law on the top one: {LEAST_RUNGS + 1} are needed")
    else:
        where = "inside" if top.is_inside else "OUTSIDE"
        lines.append(
            f"rung {top.rung} forecast from those below {loss_text(top.forecast)}, measured "
            f"{top.measured:.4f}: miss {top.miss:+.4f}, {where} the interval: {top.verdict}"
        )
    for end in analysis.ends:
        lines.append(
            f"rung {end.rung}: best of three learning rates {2**end.best_octaves:g} times the "
            f"proxy's, {end.gain:.4f} nats better: {end.verdict}"
        )
    if analysis.spread is not None:
        lines.append(
            f"scaled curves differ by {analysis.spread:.1%} in the last half: {analysis.collapse}"
        )
    if analysis.target is not None and ladder.target is not None:
        target = ladder.target
        lines.append(
            f"target {target.shape}, {target.flops:.3g} FLOPs: "
            f"{loss_text(analysis.target)}: {analysis.target_verdict}"
        )
    return lines


def build(ladder: Ladder, analyses: Sequence[RuleAnalysis], missing: Mapping[str, int]) -> Report:
    """The document: law and residuals, rungs, learning rates, collapse, shapes, cost."""
    document = Report("Ladder", "\n".join(findings(ladder, analyses, missing)))
    _add_law(document, ladder, analyses)
    _add_rungs(document, analyses)
    _add_ends(document, analyses)
    _add_collapse(document, analyses)
    _add_study(document, analyses)
    _add_cost(document, ladder)
    return document


def _add_law(document: Report, ladder: Ladder, analyses: Sequence[RuleAnalysis]) -> None:
    section = document.section(
        "Forecast",
        "L(C) = E + A C^-a through the rungs' mean losses. Bands are 95 % intervals of one run by "
        "a parametric bootstrap with the noise of the seeds: they hold if the law does. "
        f"An interval wider than {WIDEST} nats is unresolved, and residuals with a chance below "
        f"{MISFIT} say that the rungs follow no such law.",
    )
    fitted = [analysis for analysis in analyses if analysis.law is not None]
    if not fitted:
        return
    caption = "Above: loss over compute. Below: residuals, with two standard errors of their means."
    section.picture("law", draw_law(ladder, fitted), caption)


def draw_law(ladder: Ladder, analyses: Sequence[RuleAnalysis]) -> Any:
    """Losses and laws in log-log axes with the forecast's band, and the residuals below."""
    figure = new_figure(8.0, 6.5)
    panels = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    for number, analysis in enumerate(analyses):
        assert analysis.law is not None
        color = PALETTE[number]
        law = analysis.law
        end = ladder.target.flops if ladder.target is not None else 3 * law.flops[-1]
        grid = np.geomspace(law.flops[0], end, 80)
        forecasts = [law.forecast(flops, seeds=1) for flops in grid]
        panels[0].plot(grid, [law.law.loss(flops) for flops in grid], color=color)
        if law.noise.degrees > 0:
            low = [forecast.low for forecast in forecasts]
            high = [forecast.high for forecast in forecasts]
            panels[0].fill_between(grid, low, high, color=color, alpha=0.15)
        for rung in analysis.rungs:
            label = analysis.rule if rung is analysis.rungs[0] else None
            x = [rung.flops] * len(rung.losses)
            panels[0].plot(x, rung.losses, "o", markersize=4, color=color, label=label)
        errors = 2 * law.noise.sigma / np.sqrt(law.counts) if law.noise.degrees > 0 else None
        panels[1].errorbar(law.flops, law.residuals, errors, fmt="o", capsize=3, color=color)
    panels[0].set(xscale="log", yscale="log", ylabel="loss, nats per token")
    # Losses span less than a decade, whose ticks would be powers of ten times a number.
    panels[0].yaxis.set_major_formatter("{x:.3g}")
    panels[0].yaxis.set_minor_formatter("{x:.3g}")
    panels[1].axhline(0, color="#999999", linewidth=1)
    panels[1].set(xlabel="FLOPs of a run", ylabel="residual")
    panels[0].legend(fontsize=8)
    for panel in panels:
        panel.grid(alpha=0.3)
    return figure


def _add_rungs(document: Report, analyses: Sequence[RuleAnalysis]) -> None:
    section = document.section(
        "Rungs", "Parameters with and without embeddings: laws differ in it."
    )
    rows: list[list[Any]] = []
    for analysis in analyses:
        for index, rung in enumerate(analysis.rungs):
            residual = None if analysis.law is None else f"{analysis.law.residuals[index]:+.4f}"
            seeds = ", ".join(f"{loss:.4f}" for loss in rung.losses)
            rows.append(
                [
                    analysis.rule,
                    rung.name,
                    str(rung.shape),
                    f"{rung.shape.parameters:,}",
                    f"{rung.shape.inner_parameters:,}",
                    f"{rung.flops:.3g}",
                    f"{rung.loss:.4f}",
                    seeds,
                    residual,
                    rung.tau,
                ]
            )
    heads = ["rule", "rung", "shape", "parameters", "without embeddings", "FLOPs", "loss"]
    section.table([*heads, "seeds", "residual", "tau"], rows)


def _add_ends(document: Report, analyses: Sequence[RuleAnalysis]) -> None:
    rows: list[list[Any]] = []
    for analysis in analyses:
        for end in analysis.ends:
            losses = [f"{end.losses[octaves]:.4f}" for octaves in sorted(end.losses)]
            rows.append([analysis.rule, end.rung, *losses, f"{end.gain:.4f}", end.verdict])
    if not rows:
        return
    section = document.section(
        "Does the learning rate hold?",
        "Seed 0 at half, once and twice the proxy's learning rate, at both ends of the ladder. "
        "Moved: a neighbour is better by more than the noise of seeds.",
    )
    section.table(["rule", "rung", "half", "once", "twice", "gain", "says"], rows)


def _add_collapse(document: Report, analyses: Sequence[RuleAnalysis]) -> None:
    shown = [analysis for analysis in analyses if analysis.spread is not None]
    if not shown:
        return
    section = document.section(
        "Collapse",
        "Training losses over the share of the run, scaled to (L - E) / (last L - E). Runs that "
        f"are tuned alike fall on one curve: up to {COLLAPSES:.0%} apart in the last half they do, "
        f"from {DIFFERS:.0%} on they do not.",
    )
    section.picture("collapse", draw_collapse(shown), "One line a rung, larger ones redder.")


def draw_collapse(analyses: Sequence[RuleAnalysis]) -> Any:
    """Scaled curves, one panel a rule."""
    figure = new_figure(4.6 * len(analyses), 3.8)
    panels = figure.subplots(1, len(analyses), sharey=True, squeeze=False)[0]
    for panel, analysis in zip(panels, analyses, strict=True):
        floor = 0.0 if analysis.law is None else analysis.law.law.floor
        curves = [rung for rung in analysis.rungs if rung.curve is not None]
        for number, rung in enumerate(curves):
            assert rung.curve is not None
            share = (np.arange(len(rung.curve)) + 0.5) / len(rung.curve)
            rank = number / max(1, len(curves) - 1)
            color = (0.15 + 0.75 * rank, 0.25, 0.85 - 0.7 * rank)
            scaled = (rung.curve - floor) / (rung.curve[-1] - floor)
            panel.plot(share, scaled, color=color, label=f"{rung.name}: {rung.shape}")
        panel.set(title=analysis.rule, xlabel="share of the run", ylim=(0.95, 2.0))
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("(L - E) / (last L - E)")
    panels[0].legend(fontsize=7)
    return figure


def _add_study(document: Report, analyses: Sequence[RuleAnalysis]) -> None:
    shown = [analysis for analysis in analyses if analysis.study]
    if not shown:
        return
    section = document.section(
        "Shapes at equal compute",
        "Mean loss over N : L, one line a rung's compute: which depth is worth its width.",
    )
    rows: list[list[Any]] = []
    for analysis in shown:
        for entry in analysis.study:
            mean = float(np.mean(entry.losses))
            sizes = [f"{entry.shape.ratio:.3g}", f"{entry.flops:.3g}"]
            rows.append([analysis.rule, entry.rung, str(entry.shape), *sizes, f"{mean:.4f}"])
    section.table(["rule", "rung", "shape", "N/L", "FLOPs", "loss"], rows)
    section.picture("shapes", draw_study(shown), "Bars are the range over seeds.")


def draw_study(analyses: Sequence[RuleAnalysis]) -> Any:
    """Loss over N / L at each rung's compute, one panel a rule."""
    figure = new_figure(4.6 * len(analyses), 3.8)
    panels = figure.subplots(1, len(analyses), sharey=True, squeeze=False)[0]
    for panel, analysis in zip(panels, analyses, strict=True):
        names = list(dict.fromkeys(entry.rung for entry in analysis.study))
        for number, name in enumerate(names):
            entries = [entry for entry in analysis.study if entry.rung == name]
            means = [float(np.mean(entry.losses)) for entry in entries]
            below = [m - min(e.losses) for m, e in zip(means, entries, strict=True)]
            above = [max(e.losses) - m for m, e in zip(means, entries, strict=True)]
            ratios = [entry.shape.ratio for entry in entries]
            label = f"{entries[0].flops:.2g} FLOPs"
            panel.errorbar(
                ratios,
                means,
                [below, above],
                marker="o",
                capsize=3,
                color=PALETTE[number % len(PALETTE)],
                label=label,
            )
        panel.set(title=analysis.rule, xscale="log", xlabel="N : L")
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("loss, nats per token")
    panels[0].legend(fontsize=8)
    return figure


def _add_cost(document: Report, ladder: Ladder) -> None:
    total = ladders.total_flops(ladder)
    sentence = f"All planned runs take {total:.3g} FLOPs"
    if ladder.target is not None:
        share = total / ladder.target.flops
        sentence += f", {share:.2g} times the target's {ladder.target.flops:.3g}"
    section = document.section("Cost", f"{sentence}.")
    caption = "FLOPs by rung: all seeds, rules, learning rates and shapes. The target is one run."
    section.picture("cost", draw_cost(ladder), caption)


def draw_cost(ladder: Ladder) -> Any:
    """Bars of the compute of every rung's planned runs, and of the target's one."""
    flops = ladders.flops_by_rung(ladder)
    if ladder.target is not None:
        flops["target"] = ladder.target.flops
    figure = new_figure(6.0, 3.0)
    panel = figure.subplots()
    panel.bar(list(flops), list(flops.values()), color=PALETTE[0])
    panel.set(yscale="log", ylabel="FLOPs")
    panel.grid(alpha=0.3, axis="y")
    return figure

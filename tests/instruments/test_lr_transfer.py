"""The learning-rate transfer's figures on curves whose drift,
regret and savings are known, and the plan that follows.
"""

from __future__ import annotations

import json
import math
import shlex
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_completep.config import load_config, save_config
from megatron_completep.errors import ConfigError, DataError
from megatron_completep.instruments import lr_curves, lr_transfer, sweep
from megatron_completep.instruments.fits import Estimate
from megatron_completep.instruments.lr_curves import Curve, curves_of
from megatron_completep.instruments.lr_transfer import (
    base_curve,
    drift_over_depth,
    drifts,
    flops_to_reach,
    savings,
    summarize,
)
from megatron_completep.instruments.lr_transfer_answer import best_rates, next_commands
from megatron_completep.instruments.lr_transfer_plan import plan
from megatron_completep.instruments.lr_transfer_report import draw_lengths, report
from megatron_completep.roles import Role
from megatron_completep.tools.lr_transfer import main
from tests.support.browser import chromium
from tests.support.commands import Programs
from tests.support.corpora import write_markov_chain
from tests.support.models import table_for
from tests.support.runs import proxy_config

GRID = np.arange(-10.0, -3.5, 0.5)


@pytest.fixture(autouse=True)
def few_replicates(monkeypatch: pytest.MonkeyPatch) -> None:
    """The noise of these curves is far below what is asked of the intervals."""
    monkeypatch.setattr(lr_transfer, "REPLICATES", 200)
    monkeypatch.setattr(lr_curves, "REPLICATES", 200)


def curve(
    depth: int,
    vertex: float,
    rule: str = "completep",
    best: float = 2.5,
    noise: float = 0.002,
    steps: int = 100,
    seeds: int = 3,
) -> Curve:
    random = np.random.default_rng(depth)
    losses = (best + 0.1 * (GRID - vertex) ** 2)[:, None] + random.normal(
        0, noise, (len(GRID), seeds)
    )
    return Curve(rule, 64, depth, steps, 0.0, 0.02, GRID, losses, flops=float(steps * depth))


def test_a_rule_whose_optimum_stays_transfers():
    drift = drift_over_depth([curve(depth, -7.0) for depth in (2, 8, 32)])
    assert drift.verdict == "transfers"
    assert abs(drift.per_doubling.value) < 0.05


def test_a_rule_whose_optimum_moves_by_half_an_octave_a_doubling_drifts():
    drift = drift_over_depth(
        [curve(depth, -6.0 - 0.5 * math.log2(depth), "mup") for depth in (2, 8, 32)]
    )
    assert drift.verdict == "drifts"
    assert drift.per_doubling.value == pytest.approx(-0.5, abs=0.05)


def test_noise_that_hides_the_drift_is_called_unresolved():
    assert (
        drift_over_depth([curve(depth, -7.0, noise=0.1) for depth in (2, 8, 32)]).verdict
        == "unresolved"
    )
    assert (
        drift_over_depth([curve(depth, -7.0, seeds=1) for depth in (2, 8, 32)]).verdict
        == "unresolved"
    )


def test_seeds_that_leave_the_optimum_open_are_not_taken_for_one():
    repeated = curve(2, -7.0)
    summary = summarize(repeated, repeated)
    for interval, text in {
        (-math.inf, math.inf): "over the seeds it may lie anywhere",
        (-math.inf, -5.0): "[anywhere below, 2^-5.00]",
        (-9.0, math.inf): "[2^-9.00, anywhere above]",
    }.items():
        open_ended = replace(summary, log2_lr=Estimate(-7.0, *interval))
        (line, _) = best_rates([repeated], [open_ended])
        assert "3 seeds" in line and text in line
    alone = curve(2, -7.0, seeds=1)
    (line, _) = best_rates([alone], [summarize(alone, alone)])
    assert "1 seed: " in line and "one seed gives no interval" in line


def test_an_optimum_beyond_the_grid_is_never_a_verdict():
    beyond = [curve(depth, -7.0 - depth) for depth in (2, 8)]
    assert drift_over_depth(beyond).verdict.startswith("unresolved: an optimum lies at the edge")
    inside = curve(2, -7.0)
    assert summarize(beyond[1], inside).regret_verdict.startswith(
        "unresolved: an optimum lies at the edge"
    )
    assert summarize(beyond[1], inside).log2_lr.low == -math.inf
    theirs = [curve(8, -7.0, "mup", best, 1e-4, steps) for steps, best in ((200, 2.8), (400, 2.6))]
    ours = [
        curve(8, -13.0, "completep", best, 1e-4, steps) for steps, best in ((100, 2.9), (200, 2.7))
    ]
    (saving,) = savings(ours + theirs, "mup")
    assert saving.verdict.startswith("unresolved: an optimum lies at the edge")


def coarse(curve: Curve, every: int) -> Curve:
    """The same curve on a grid of every so many points."""
    return replace(curve, log2_lr=curve.log2_lr[::every], losses=curve.losses[::every])


def test_an_interval_is_never_narrower_than_the_grid_allows():
    """Whole octaves, neighbours 0.2 nats above:
    every replicate has its best at one point; the truth lies between its neighbours.
    """
    # -10, -9, ...; no parabola fits within 0.15 nats
    losses = 2.5 + 0.2 * np.abs(GRID[::2] + 7.99)[:, None] * np.ones((1, 3))
    sharp = Curve("completep", 64, 2, 100, 0.0, 0.02, GRID[::2], losses, 200.0)
    found = summarize(sharp, sharp)
    assert (found.log2_lr.value, found.log2_lr.low, found.log2_lr.high) == (-8.0, -9.0, -7.0)
    assert found.grid_step == 1.0
    assert drift_over_depth([sharp, replace(sharp, num_layers=8)]).verdict == "unresolved"
    through_three = summarize(coarse(curve(2, -7.2, noise=0.0), 2), curve(2, -7.0)).log2_lr
    # A parabola fits any three points.
    assert (through_three.low, through_three.high) == (-7.5, -6.5)
    fine = summarize(curve(2, -7.2, noise=0.0), curve(2, -7.0)).log2_lr
    # Negative control: more points, and they lie on one.
    assert fine.high - fine.low < 0.05 and fine.low <= -7.2 + 1e-9


def test_one_seed_gives_no_interval():
    found = summarize(curve(2, -7.0, seeds=1), curve(8, -7.0))
    assert not found.log2_lr.repeated
    assert found.regret_verdict == "unresolved"


def test_runs_that_two_rules_share_are_not_compared_with_each_other():
    """At the base depth rules coincide, and one run stands for all of them."""
    shared = [
        curve(2, -7.0, "completep", best, 1e-3, steps) for steps, best in ((100, 2.9), (200, 2.7))
    ]
    shared += [replace(c, parameterization="mup") for c in shared]
    assert savings(shared, "mup") == []
    other = [curve(2, -7.0, "mup", best, 1e-3, steps) for steps, best in ((100, 2.8), (200, 2.6))]
    assert len(savings(shared[:2] + other, "mup")) == 1


def test_the_published_transfer_keeps_its_verdicts():
    published = json.loads(
        (Path(__file__).parents[2] / "docs/results/lr_transfer/report.json").read_text()
    )
    curves = [
        Curve(
            **{
                **c,
                "log2_lr": np.array(c["log2_lr"]),
                "losses": np.array(c["losses"], dtype=np.float64),
            }
        )
        for c in published["curves"]
    ]
    chosen = [c for c in curves if c.base_weight_decay == 0.0]
    expected = {
        d["parameterization"]: d["verdict"]
        for d in published["drifts"]
        if d["base_weight_decay"] == 0.0
    }
    assert {d.parameterization: d.verdict for d in drifts(chosen)} == expected
    assert expected == {"completep": "transfers", "alpha_0.5": "drifts", "mup": "unresolved"}


def test_regret_and_drift_are_counted_from_the_smallest_shape():
    curves = [curve(2, -7.0), curve(8, -8.0), curve(8, -7.0, "mup")]
    assert base_curve(curves[1], curves) is curves[0]
    moved = summarize(curves[1], curves[0])
    assert moved.drift.value == pytest.approx(-1.0, abs=0.1)
    assert moved.regret.value == pytest.approx(0.1, abs=0.02)
    assert moved.regret.low > 0
    assert moved.regret_verdict == "large"
    near = summarize(curve(8, -7.3), curves[0])  # between the points of the grid: 0.1 * 0.3^2
    assert near.regret.value == pytest.approx(0.009, abs=0.004)
    assert near.regret_verdict == "small"
    assert summarize(curve(8, -7.3, noise=0.1), curves[0]).regret_verdict == "unresolved"
    base = summarize(curves[0], curves[0])
    # Not compared with itself.
    assert (base.drift, base.regret, base.regret_verdict) == (None, None, "base shape")


def test_the_divergence_edge_is_where_the_curve_rises_above_its_best_or_ends():
    # 0.1 * 2^2 > 0.3
    assert summarize(curve(2, -7.0, noise=0.0), curve(2, -7.0)).divergence_log2_lr == -5.0
    losses = curve(2, -7.0, noise=0.0).losses.copy()
    losses[GRID >= -6.0] = np.inf
    assert (
        summarize(replace(curve(2, -7.0), losses=losses), curve(2, -7.0)).divergence_log2_lr == -6.0
    )


def test_drifts_are_taken_family_by_family():
    curves = (
        [curve(d, -7.0) for d in (2, 8)]
        + [curve(d, -7.0, "mup") for d in (2, 8)]
        + [curve(2, -7.0, "sp")]
    )
    assert [(d.parameterization, d.verdict) for d in drifts(curves)] == [
        ("completep", "transfers"),
        ("mup", "transfers"),
    ]


def test_the_flops_to_a_loss_are_read_between_the_measured_lengths():
    flops = [100.0, 200.0, 400.0]
    losses = [3.0, 2.8, 2.6]  # falls by 0.2 a doubling
    assert flops_to_reach(2.8, flops, losses) == pytest.approx(200)
    assert flops_to_reach(2.7, flops, losses) == pytest.approx(200 * 2**0.5)
    assert flops_to_reach(2.5, flops, losses) == pytest.approx(400 * 2**0.5)


def test_a_saving_is_the_share_of_the_baselines_flops_that_are_not_needed():
    """Loss falls by 0.2 a doubling, and ours is 0.1 lower: half a doubling less, 29.3 %."""
    ours = [
        curve(8, -7.0, "completep", best, 1e-4, steps)
        for steps, best in ((100, 2.9), (200, 2.7), (400, 2.5))
    ]
    theirs = [curve(8, -7.0, "mup", best, 1e-4, steps) for steps, best in ((200, 2.8), (400, 2.6))]
    (saving,) = savings(ours + theirs, "mup")
    assert saving.percent.value == pytest.approx(100 * (1 - 2**-0.5), abs=0.5)
    assert saving.verdict == "saves"
    assert savings(ours[:1] + theirs, "mup") == []


def test_a_shape_is_compared_with_the_shallowest_under_the_same_rule_at_one_learning_rate():
    """Deep and narrow at equal FLOPs: half a doubling less under one rule,
    and nothing that three seeds can tell under the other.
    """

    def runs(rule: str, depth: int, losses: dict[int, float], spread: float) -> list[Curve]:
        seeds = np.array([-spread, 0.0, spread])
        whole = [(steps, np.array([[loss]]) + seeds) for steps, loss in losses.items()]
        return [
            Curve(
                rule, 256 // depth, depth, steps, 0.0, 0.02, np.array([-7.0]), values, float(steps)
            )
            for steps, values in whole
        ]

    curves = runs("completep", 4, {100: 2.8, 200: 2.6}, 0.002) + runs(
        "completep", 16, {100: 2.7, 200: 2.5}, 0.002
    )
    curves += runs("mup", 4, {100: 2.8, 200: 2.6}, 0.1) + runs("mup", 16, {100: 2.8, 200: 2.6}, 0.1)
    found = {
        (s.parameterization, s.num_layers, s.against, s.against_num_layers): s
        for s in savings(curves, "mup")
    }
    assert set(found) == {
        ("completep", 4, "mup", 4),
        ("completep", 16, "mup", 16),
        ("completep", 16, "completep", 4),
        ("mup", 16, "mup", 4),
    }
    deep = found["completep", 16, "completep", 4]
    assert deep.percent.value == pytest.approx(100 * (1 - 2**-0.5), abs=0.1)
    assert deep.verdict == "saves"
    assert found["mup", 16, "mup", 4].verdict == "unresolved"
    panels = draw_lengths(curves).axes
    assert [axis.get_title() for axis in panels] == ["completep", "mup"]
    assert [text.get_text() for text in panels[-1].get_legend().get_texts()] == [
        "4 x 64",
        "16 x 16",
    ]


# A sweep's folder, with results written by hand.


def written_sweep(folder: Path, tmp_path: Path, **sections: dict[str, Any]) -> list[sweep.Point]:
    """A finished sweep over two depths: optimum at 2^-7 under CompleteP, moving under muP."""
    config = proxy_config(tmp_path, training={"train_steps": 50}, **sections)
    grid = sweep.Grid(
        [2.0**x for x in (-9, -8, -7, -6, -5)], (2, 8), (), ("completep", "mup"), (0.1,), (), (), 2
    )
    sweep.save_grid(grid, config, folder)
    points = grid.points(config)
    (folder / "points").mkdir(parents=True)
    for point in points:
        vertex = -7.0 - (1.0 if point.parameterization == "mup" and point.num_layers == 8 else 0.0)
        loss = 2.5 + 0.1 * (math.log2(point.base_lr) - vertex) ** 2 + 0.001 * point.seed
        result = {
            "validation_loss": loss,
            "train_loss": loss,
            "diverged": False,
            "flops": 1e9 * point.num_layers,
        }
        sweep.result_path(folder, point).write_text(json.dumps(result))
    return points


def test_a_report_is_written_from_a_finished_sweep(tmp_path: Path):
    folder = tmp_path / "sweep"
    written_sweep(folder, tmp_path)
    plain = report(folder)
    assert plain == json.loads((folder / "report.json").read_text())
    assert plain["points_missing"] == 0
    drift = {d["parameterization"]: d["per_doubling"]["value"] for d in plain["drifts"]}
    assert drift["completep"] == pytest.approx(0.0, abs=0.01)
    assert drift["mup"] == pytest.approx(-0.5, abs=0.01)
    page = (folder / "report.html").read_text()
    assert "octaves per doubling" in page
    assert "data:image/png;base64," in page
    assert "http://" not in page and "https://" not in page
    assert (folder / "curves_wd_0.1.png").read_bytes().startswith(b"\x89PNG")


def test_the_report_says_the_best_learning_rate_its_neighbours_and_a_next_command_that_works(
    programs: Programs, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.setattr(sweep, "processes", lambda workers: ThreadPoolExecutor(1))
    folder = tmp_path / "sweep"
    points = written_sweep(folder, tmp_path)
    write_markov_chain(tmp_path / "text", 8_000)
    lines = programs.output(main, "report", folder).splitlines()
    (best,) = [line for line in lines if line.startswith("completep 2 x 32")]
    assert (
        "2 seeds: best learning rate 2^-7.00 = 0.007812 [2^-7.50, 2^-6.50], steps of 1 "
        "octaves, bracketed by the grid"
    ) in best
    neighbours = lines[lines.index(best) + 1]
    assert neighbours.split("; ")[0].strip() == "2^-8: loss 2.6005 (seeds 2.6000 to 2.6010)"
    assert [part.strip().split(":")[0] for part in neighbours.split(";")] == [
        "2^-8",
        "2^-7",
        "2^-6",
    ]
    again = sweep.Grid([2.0**-7], (2,), (), ("completep",), (0.1,), (), (50,), 2).points(
        load_config(folder / "proxy.yaml")
    )
    # The proxy's file names the points that are done.
    assert {p.key for p in again} <= {p.key for p in points}
    commands = [
        shlex.split(line.split(": ", 1)[1])
        for line in lines
        if ": python tools/lr_transfer.py" in line
    ]
    assert [words[2] for words in commands] == ["plan", "sweep"]
    programs.output(main, *commands[0][2:])
    assert load_config(folder / "target.yaml").model.num_layers == 8
    programs.output(main, *commands[1][2:])  # -8 to -6 in half octaves
    assert "steps of 0.5 octaves" in programs.output(main, "report", folder)


def test_a_best_rate_at_the_edge_is_said_and_the_next_command_goes_beyond(
    programs: Programs, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    folder = tmp_path / "sweep"
    for point in written_sweep(folder, tmp_path):
        path = sweep.result_path(folder, point)
        result = json.loads(path.read_text())
        result["validation_loss"] = 3.0 - math.log2(point.base_lr) / 100
        path.write_text(json.dumps(result))
    lines = programs.output(main, "report", folder).splitlines()
    assert "at the upper edge of the grid: it may lie higher" in lines[1]
    assert "unresolved: an optimum lies at the edge of the grid" in "\n".join(lines)
    (line,) = [line for line in lines if ": python tools/lr_transfer.py" in line]
    command = shlex.split(line.split(": ", 1)[1])
    ran: list[sweep.Point] = []
    monkeypatch.setattr(sweep, "run_local", lambda points, *rest: ran.extend(points))
    programs.output(main, *command[2:])
    assert sorted({math.log2(p.base_lr) for p in ran}) == [-4.0, -3.0]
    assert {
        (p.parameterization, p.num_layers, p.base_weight_decay, p.train_steps) for p in ran
    } == {("completep", 2, 0.1, 50)}
    assert {p.seed for p in ran} == {0, 1}


def test_a_single_learning_rate_has_no_best_one(tmp_path: Path):
    one = Curve("completep", 64, 2, 100, 0.0, 0.02, GRID[:1], np.array([[2.5, 2.6]]), 1.0)
    (line, losses) = best_rates([one], [summarize(one, one)])
    assert "one learning rate was run, so there is no best one" in line
    assert "2^-10: loss 2.5500" in losses
    assert "--lr=-11:-9:2" in next_commands(tmp_path, [one])[0]


def test_a_browser_shows_the_report_whole_without_a_complaint(tmp_path: Path):
    folder = tmp_path / "sweep"
    written_sweep(folder, tmp_path)
    report(folder)
    with chromium() as browser:
        browser.open((folder / "report.html").as_uri())
        assert browser.problems == []
        assert browser.broken_pictures() == []
        assert browser.evaluate("document.images.length") == 1
        # Drift, optima, and the quality of transfer.
        assert browser.evaluate("document.querySelectorAll('table').length") == 3
        # Whole octaves.
        assert "octaves per doubling: unresolved" in browser.evaluate("document.body.innerText")
        # Wide tables scroll on their own.
        assert browser.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
        browser.screenshot(tmp_path / "report.png")
    assert (tmp_path / "report.png").stat().st_size > 20_000


def test_an_unfinished_seed_is_left_out_of_the_report(tmp_path: Path):
    folder = tmp_path / "sweep"
    points = written_sweep(folder, tmp_path)
    lost = next(
        p for p in points if p.seed == 1 and p.num_layers == 8 and p.parameterization == "completep"
    )
    sweep.result_path(folder, lost).unlink()
    seeds = {
        (c.parameterization, c.num_layers): c.losses.shape[1]
        for c in curves_of(sweep.read_results(points, folder))
    }
    assert seeds == {("completep", 2): 2, ("mup", 2): 2, ("completep", 8): 1, ("mup", 8): 2}


def test_a_plan_carries_the_proxys_best_values_and_shape_to_the_target(tmp_path: Path):
    folder, path = tmp_path / "sweep", tmp_path / "tuned" / "target.yaml"
    written_sweep(folder, tmp_path)
    target = proxy_config(
        tmp_path,
        model={
            "hidden_size": 128,
            "num_layers": 16,
            "num_attention_heads": 4,
            "ffn_hidden_size": 512,
        },
    )
    said: list[str] = []
    plan(folder, target, path, say=said.append)
    written = load_config(path)
    assert written.optimizer.base_lr == pytest.approx(2**-7, rel=1e-3)
    assert written.optimizer.base_weight_decay == 0.1
    table = table_for(written.model, written.completep)
    assert (table.width_multiplier, table.depth_multiplier) == (4.0, 8.0)
    assert written.completep.base_head_dim == 16
    value = table.values(Role.HIDDEN_WEIGHT, 4.0, written.optimizer)
    assert f"{value.lr:.5g}" in path.read_text().split("\nmodel:")[0]
    assert not any("warning" in line for line in said)


def test_a_plan_carries_a_users_own_factors_by_role_and_by_relative_depth(tmp_path: Path):
    folder, path = tmp_path / "sweep", tmp_path / "target.yaml"
    own = {"completep": {"factors": {"embedding": {"lr": 4.0}}}}
    own["optimizer"] = {
        "overrides": [
            {"pattern": "layers.1.*", "lr": 2.0},
            {"pattern": "*.mlp.*", "weight_decay": 0.5},
        ]
    }
    written_sweep(folder, tmp_path, **own)
    plan(folder, proxy_config(tmp_path, model={"num_layers": 6}), path)
    written = load_config(path)
    assert written.completep.factors["embedding"].lr == 4.0
    assert [(o.pattern, o.lr) for o in written.optimizer.overrides] == [
        *((f"layers.{layer}.*", 2.0) for layer in (3, 4, 5)),
        ("*.mlp.*", 1.0),
    ]


def test_a_plan_scales_batch_and_duration_where_it_is_asked_to(tmp_path: Path):
    folder = tmp_path / "sweep"
    written_sweep(folder, tmp_path)
    target = proxy_config(tmp_path, training={"global_batch_size": 32, "train_steps": 200})
    plan(folder, target, tmp_path / "target.yaml", scale_batch=True)
    written = load_config(tmp_path / "target.yaml").completep
    assert (written.base_batch_tokens, written.base_total_tokens) == (8 * 32, 8 * 32 * 50)
    plan(folder, target, tmp_path / "plain.yaml")
    assert load_config(tmp_path / "plain.yaml").completep.base_batch_tokens is None


def test_a_plan_warns_of_a_target_that_is_another_model(tmp_path: Path):
    folder = tmp_path / "sweep"
    written_sweep(folder, tmp_path)
    said: list[str] = []
    plan(folder, proxy_config(tmp_path, "gpt2"), tmp_path / "target.yaml", say=said.append)
    assert any("model.norm" in line and "model.activation" in line for line in said)


def test_a_plan_without_a_curve_under_the_targets_rule_is_refused(tmp_path: Path):
    folder = tmp_path / "sweep"
    written_sweep(folder, tmp_path)
    with pytest.raises(ConfigError, match="no finished curve under sp"):
        plan(
            folder,
            proxy_config(tmp_path, completep={"parameterization": "sp"}),
            tmp_path / "target.yaml",
        )
    with pytest.raises(DataError, match="not a sweep"):
        plan(tmp_path / "nothing", proxy_config(tmp_path), tmp_path / "target.yaml")


# The program.


def test_the_program_sweeps_reports_and_plans(
    programs: Programs, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.setattr(sweep, "processes", lambda workers: ThreadPoolExecutor(1))
    write_markov_chain(tmp_path / "text", 8_000)
    proxy, target, folder = tmp_path / "proxy.yaml", tmp_path / "target.yaml", tmp_path / "sweep"
    save_config(proxy_config(tmp_path, training={"train_steps": 2}), proxy)
    save_config(proxy_config(tmp_path, model={"num_layers": 8}), target)
    points = ("--lr=-9:-7:1", "--depths", "2,4", "--seeds", "2")
    swept = programs.run(main, "sweep", proxy, "--out", folder, *points, "--json")
    assert swept.code == 0, swept.err
    assert json.loads(swept.out) == {"points": 12, "missing": 0, "folder": str(folder)}
    assert "tau" in swept.err
    report = json.loads(programs.output(main, "report", folder, "--json"))
    assert {optimum["num_layers"] for optimum in report["optima"]} == {2, 4}
    tuned = tmp_path / "tuned.yaml"
    planned = json.loads(programs.output(main, "plan", folder, target, "--to", tuned, "--json"))
    assert load_config(tuned).optimizer.base_lr == pytest.approx(planned["base_lr"])


def test_what_the_program_cannot_use_is_refused_without_a_traceback(
    programs: Programs, tmp_path: Path
):
    refused = programs.run(main, "report", tmp_path)
    assert refused.code == 2 and "Make one with tools/lr_transfer.py sweep" in refused.err
    save_config(proxy_config(tmp_path), tmp_path / "proxy.yaml")
    words = ("--out", tmp_path / "s", "--lr=-9:-8", "--slurm", "timeout")
    refused = programs.run(main, "sweep", tmp_path / "proxy.yaml", *words)
    assert refused.code == 2 and "KEY=VALUE" in refused.err

"""A ladder from its plan to its forecast, on short runs and on losses that are known."""

from __future__ import annotations

import json
import math
import re
import shlex
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml

from megatron_completep.config import Config, load_config, save_config
from megatron_completep.config.derived import total_tokens
from megatron_completep.data.corpus import parse_split
from megatron_completep.errors import ConfigError, DataError, UserError
from megatron_completep.instruments import ladder as ladders
from megatron_completep.instruments import ladder_advice, ladder_report, sweep
from megatron_completep.instruments.derive import Scaling
from megatron_completep.instruments.ladder import Ladder, Wish, plan, runs
from megatron_completep.instruments.ladder_analysis import (
    COLLAPSES,
    CURVE_GROUPS,
    DIFFERS,
    Finished,
    analyse,
    collapse_verdict,
    curve_spread,
    end_of,
)
from megatron_completep.instruments.ladder_fit import Noise
from megatron_completep.instruments.run_shape import Asked
from megatron_completep.instruments.trial import change
from megatron_completep.tools.ladder import main
from tests.support.corpora import write_markov_chain
from tests.support.runs import proxy_config

SHAPE = {
    "hidden_size": 8,
    "num_layers": 1,
    "num_attention_heads": 2,
    "ffn_hidden_size": 16,
    "seq_length": 16,
}
OWN_BASE = {"base_hidden_size": None, "base_num_layers": None}


def proxy(folder: Path) -> Config:
    training = {"train_steps": 12, "validation_samples": 8}
    return proxy_config(folder, model=SHAPE, completep=OWN_BASE, training=training)


def wish(**changes: object) -> Wish:
    settings = {
        "rungs": 5,
        "largest_flops": 2e9,
        "ratio": 8.0,
        "scaling": Scaling(1.0),
        "seeds": (2,),
        **changes,
    }
    return Wish(**settings)


def write_results(
    ladder: Ladder,
    folder: Path,
    moved: float = 0.0,
    wrong: float = 0.0,
    effects: Sequence[float] = (0.0, 0.0, 0.0),
) -> None:
    """Results of a known law; moved: nats that twice the rate is better at the top rung.

    wrong: nats that the top rung lies above the law. effects: nats of each seed, on all rungs.
    """
    random = np.random.default_rng(0)
    for run in runs(ladder):
        point = run.point
        rung = next(rung for rung in ladder.rungs if rung.name == run.rung)
        flops = rung.shape.run_flops(ladder.scaling.tokens_per_parameter)
        is_top = rung is ladder.rungs[-1]
        loss = 1.0 + 2.0 * (flops / 1e8) ** -0.15 + 0.002 * random.standard_normal()
        loss += wrong * is_top + 0.1 * abs(run.octaves) + effects[point.seed]
        if run.octaves == 1 and is_top and moved:
            loss -= 0.1 + moved
        parts = np.linspace(0.01, 1, sweep.CURVE_PARTS)
        curve = (1.0 + (loss - 1.0) * parts**-0.1).tolist()
        result = {"validation_loss": loss, "diverged": False, "flops": flops, "curve": curve}
        path = sweep.result_path(folder, point)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result))


def test_rungs_grow_by_equal_factors_and_keep_the_family(tmp_path: Path):
    config = proxy(tmp_path)
    ladder = plan(config, wish())
    flops = [rung.shape.run_flops(1.0) for rung in ladder.rungs]
    assert ladder.rungs[0].shape.hidden_size == 8
    assert flops[-1] == pytest.approx(2e9, rel=0.25)
    growth = np.diff(np.log(flops))
    assert growth.min() > 0.5 * growth.mean()
    for run in runs(ladder):
        model = run.point.config.model
        assert model.ffn_hidden_size == 2 * model.hidden_size
        assert run.point.config.completep.base_hidden_size == 8
        tokens = total_tokens(run.point.config)
        assert run.point.config.completep.base_total_tokens == total_tokens(config)
        assert tokens > 0
    ends = {run.rung for run in runs(ladder) if run.kind == "lr"}
    assert ends == {"01", "05"}


def test_rungs_that_do_not_grow_and_targets_below_them_are_refused(tmp_path: Path):
    config = proxy(tmp_path)
    with pytest.raises(ConfigError, match="do not grow"):
        plan(config, wish(rungs=30))
    with pytest.raises(ConfigError, match="not above the lowest"):
        plan(config, wish(largest_flops=1e3))
    with pytest.raises(ConfigError, match="not above the top rung"):
        plan(config, wish(target=Asked(8.0, 1.0, flops=1e9)))
    with pytest.raises(ConfigError, match="2 numbers for 5 rungs"):
        plan(config, wish(seeds=(1, 2)))
    # Its seeds would count twice.
    with pytest.raises(ConfigError, match="completep stands there more than once"):
        plan(config, wish(rules=("completep", "mup", "completep")))


def test_a_forecast_has_the_shape_that_the_ladder_was_asked_for(tmp_path: Path):
    ladder = plan(proxy(tmp_path), wish(ratio=16.0))
    ladders.save(ladder, tmp_path)
    write_results(ladder, tmp_path)
    figures = ladder_report.predict(tmp_path, (None, None, 6))
    assert (figures["num_layers"], figures["hidden_size"]) == (6, 96)
    # The same ladder is planned anew over a folder of before the ratio was kept, which has the
    # proxy's.
    own = plan(proxy(tmp_path), wish())
    ladders.save(own, tmp_path / "old")
    path = tmp_path / "old/ladder.json"
    content = json.loads(path.read_text())
    del content["ratio"]
    path.write_text(json.dumps(content))
    assert ladders.load(tmp_path / "old") == own
    ladders.save(own, tmp_path / "old")
    assert json.loads(path.read_text())["ratio"] == 8.0


def test_runs_that_are_missing_leave_the_others_with_their_seeds(tmp_path: Path):
    ladder = plan(proxy(tmp_path), wish(seeds=(3,)))
    write_results(ladder, tmp_path, effects=(0.03, 0.02, -0.05))
    (whole,) = analyse(ladder, tmp_path)
    for run in runs(ladder):
        if run.rung in ("02", "05") and run.point.seed == 0 and run.kind == "rung":
            sweep.result_path(tmp_path, run.point).unlink()
    (gappy,) = analyse(ladder, tmp_path)
    assert list(gappy.rungs[1].by_seed) == [1, 2]
    assert gappy.noise.sigma < 2 * whole.noise.sigma
    assert abs(gappy.holdout.miss) < 0.01
    assert abs(whole.holdout.miss) < 0.01


def test_all_rungs_have_the_shape_that_was_asked_for_and_others_are_named(tmp_path: Path):
    ladder = plan(proxy(tmp_path), wish(ratio=16.0, largest_flops=2e10))
    ratios = [rung.shape.ratio for rung in ladder.rungs]
    assert ladder.rungs[0].shape.ratio == 16.0
    assert max(ratios) / min(ratios) < 1.5
    far = [warning for warning in ladder_advice.warnings(ladder) if "N : L is 16" in warning]
    named = set(re.findall(r"(\d\d) \(", far[0])) if far else set()
    assert named == {r.name for r in ladder.rungs if abs(math.log(r.shape.ratio / 16)) > 0.1}
    # A ratio whose shapes lie too far apart is refused with what there is.
    with pytest.raises(ConfigError, match=r"N : L within a factor of 1.5 of 1 .* has \d"):
        plan(proxy(tmp_path), wish(ratio=1.0, scaling=Scaling(0.1)))


def test_a_study_shows_its_shapes_and_names_what_it_leaves_out(tmp_path: Path):
    ladder = plan(proxy(tmp_path), wish(largest_flops=2e10, ratios=(4.0, 8.0, 256.0)))
    names = [row[0] for row in ladders.table_rows(ladder)]
    shapes = sum(len(shapes) for shapes in ladder.study.values())
    assert shapes > 0
    assert len(names) == 5 + shapes
    gaps = ladder_advice.study_gaps(ladder, (4.0, 8.0, 256.0))
    assert "it has that shape" in gaps[-2]
    assert gaps[-1].startswith("--study 256 is left out at rungs 01 (nearest ")
    for name, row in ((row[0], row) for row in ladders.table_rows(ladder)):
        assert (name.endswith("study")) == (row[1] not in {str(r.shape) for r in ladder.rungs})


def test_text_that_is_read_twice_and_a_far_target_are_warned_of(tmp_path: Path):
    config = proxy(tmp_path)
    target = Asked(8.0, 1.0, flops=1e12)
    ladder = plan(config, wish(target=target))
    # Without the files there is nothing to say of them.
    assert not any("more than once" in warning for warning in ladder_advice.warnings(ladder))
    write_markov_chain(tmp_path / "text", 8_000)
    said = "\n".join(ladder_advice.warnings(ladder))
    (tokens,) = [row[5] for row in ladders.table_rows(ladder) if row[0] == "05"]
    # By hand: the share of the 20 documents, of equal length, that is trained on.
    share = parse_split(config.data.split)[0] if config.data.split else 1.0
    epochs = int(tokens.replace(",", "")) / (round(20 * share) * 400)
    (repeated,) = [line for line in said.splitlines() if "more than once" in line]
    assert f"05 ({epochs:.3g} times)" in repeated
    assert "01 (" not in repeated
    assert "times the compute of the top rung" in said
    near = plan(config, wish(target=Asked(8.0, 1.0, flops=8e9)))
    assert not any("top rung" in warning for warning in ladder_advice.warnings(near))


def test_whatever_is_no_forecast_ends_with_another_code(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    ladder = plan(proxy(tmp_path), wish(seeds=(3,)))
    for name in ("good", "bent", "gone"):
        ladders.save(ladder, tmp_path / name)
        write_results(ladder, tmp_path / name)
    ask = ["--flops", "4e9"]
    assert main(["predict", str(tmp_path / "good"), *ask]) == 0
    # Rungs in turn above and below any law.
    for run in runs(ladder):
        path = sweep.result_path(tmp_path / "bent", run.point)
        result = json.loads(path.read_text())
        result["validation_loss"] += 0.2 * (run.rung in ("02", "04"))
        path.write_text(json.dumps(result))
    assert main(["fit", str(tmp_path / "bent")]) == 3
    assert "no power law" in capsys.readouterr().out
    assert main(["predict", str(tmp_path / "bent"), *ask]) == 3
    # Four rungs of five still give a law, and the reader is told.
    for run in runs(ladder):
        if run.rung == "05":
            sweep.result_path(tmp_path / "gone", run.point).unlink()
    main(["predict", str(tmp_path / "gone"), *ask])
    assert "5 missing (5 of rung 05)" in capsys.readouterr().out
    (gone,) = analyse(ladder, tmp_path / "gone")
    assert "5 of rung 05" in ladder_report.findings(ladder, [gone], {"05": 5})[0]
    # A run that diverged.
    path = sweep.result_path(tmp_path / "bent", runs(ladder)[0].point)
    path.write_text(json.dumps({**json.loads(path.read_text()), "diverged": True}))
    assert main(["predict", str(tmp_path / "bent"), *ask]) == 3
    assert "no law: a run of the ladder diverged" in capsys.readouterr().out


def test_a_known_ladder_is_forecast_and_a_wrong_top_rung_is_seen(tmp_path: Path):
    ladder = plan(proxy(tmp_path), wish(seeds=(3,), target=Asked(8.0, 1.0, flops=6e9)))
    write_results(ladder, tmp_path / "right")
    (right,) = analyse(ladder, tmp_path / "right")
    assert right.holdout is not None and right.target is not None
    assert right.holdout.is_inside
    assert abs(right.holdout.miss) < 0.02
    truth = 1.0 + 2.0 * (ladder.target.flops / 1e8) ** -0.15
    assert right.target.value == pytest.approx(truth, abs=0.01)
    assert [end.verdict for end in right.ends] == ["holds", "holds"]
    assert right.collapse == "collapses"
    # The control: a top rung that is worse than its law, and whose best rate is another.
    write_results(ladder, tmp_path / "wrong", moved=0.1, wrong=0.2)
    (wrong,) = analyse(ladder, tmp_path / "wrong")
    assert wrong.holdout is not None
    assert not wrong.holdout.is_inside
    assert wrong.holdout.miss == pytest.approx(0.2, abs=0.02)
    assert [end.verdict for end in wrong.ends] == ["holds", "moved"]


def test_a_moved_rate_and_a_missed_top_rung_leave_no_forecast(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    ladder = plan(proxy(tmp_path), wish(seeds=(3,), target=Asked(8.0, 1.0, flops=6e9)))
    ladders.save(ladder, tmp_path)
    write_results(ladder, tmp_path)
    (right,) = analyse(ladder, tmp_path)
    assert right.target_verdict == ladder_report.overall(right) == "forecast"
    top = right.holdout
    missed = replace(right, holdout=replace(top, measured=top.forecast.high + 0.001))
    assert missed.target_verdict == ladder_report.overall(missed) == "top rung missed"
    assert main(["fit", str(tmp_path)]) == 0
    write_results(ladder, tmp_path, moved=0.1)
    capsys.readouterr()
    assert main(["fit", str(tmp_path)]) == 3
    assert capsys.readouterr().out.splitlines()[-2].endswith(": learning rate moved")
    assert main(["predict", str(tmp_path), "--flops", "4e9"]) == 3


def test_a_prediction_says_how_far_its_shape_and_its_size_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    ladder = plan(proxy(tmp_path), wish(seeds=(3,)))
    ladders.save(ladder, tmp_path)
    write_results(ladder, tmp_path)
    assert main(["predict", str(tmp_path), "--depth", "4", "--json"]) == 0
    near = json.loads(capsys.readouterr().out)
    assert near["hidden_size"] == 32 and near["warnings"] == []
    assert main(["predict", str(tmp_path), "--flops", "1e12", "--json"]) == 0
    told = capsys.readouterr()
    far = json.loads(told.out)
    assert re.search(r"N : L \S+, .* FLOPs \([+-]\d+\.\d% from what was asked\)", told.err)
    assert any("times the compute of the top rung" in warning for warning in far["warnings"])
    is_off = abs(math.log(far["hidden_size"] / far["num_layers"] / 8)) > math.log(1.1)
    assert is_off == any("that of the rungs 8" in warning for warning in far["warnings"])
    # The control: a shape of another N : L.
    shape = replace(ladder.rungs[0].shape, num_layers=2)
    (warning,) = ladder_advice.ratio_warnings(ladder, shape)
    assert warning.startswith("N : L is 4 (2 layers x 8), that of the rungs 8")


def test_a_plan_names_what_it_could_not_keep(tmp_path: Path):
    config = proxy(tmp_path)
    fine = change(config, training={"micro_batch_size": 1})
    said = "\n".join(ladder_advice.warnings(plan(fine, wish()), (), 1e3))
    assert "--from-flops 1e+03: the lowest rung has " in said
    assert f"data.train: {config.data.train[0].prefix}: not here" in said
    assert "rounded to micro-batches" not in said
    training = {"micro_batch_size": 4, "global_batch_size": 4, "stop_at_step": 3}
    coarse = plan(change(config, training=training), wish(scaling=Scaling(1.0)))
    said = "\n".join(ladder_advice.warnings(coarse))
    (batches,) = [line for line in said.splitlines() if "micro-batches of 4" in line]
    exact = 4 * np.array(
        [total_tokens(r.point.config) / total_tokens(coarse.proxy) for r in runs(coarse)]
    )
    by_rung = dict(zip([r.rung for r in runs(coarse)], exact**0.383 * 4**0.617, strict=True))
    for name, batch in by_rung.items():
        rounded = max(4, round(batch / 4) * 4)
        assert (abs(rounded / batch - 1) > 0.1) == (f"{name} (" in batches), (name, batch)
    assert "training.stop_at_step of the proxy is left out" in said
    lengths = Scaling(1.0, batch_power=0.0)
    kept = ladder_advice.warnings(plan(change(config, training=training), wish(scaling=lengths)))
    assert not any("micro-batches" in warning for warning in kept)


def test_another_plan_in_a_folder_leaves_no_rung_of_the_first(tmp_path: Path):
    ladders.save(plan(proxy(tmp_path), wish()), tmp_path)
    (tmp_path / "ladder.json").unlink()
    (tmp_path / "rungs/mine.yaml").write_text("a user's own")
    ladders.save(plan(proxy(tmp_path), wish(rungs=4)), tmp_path)
    names = sorted(path.name for path in (tmp_path / "rungs").iterdir())
    assert names == ["01.yaml", "02.yaml", "03.yaml", "04.yaml", "mine.yaml"]


def test_the_cost_is_that_of_all_runs(tmp_path: Path):
    ladder = plan(proxy(tmp_path), wish(rules=("completep", "mup")))
    by_rung = ladders.flops_by_rung(ladder)
    one = {rung.name: rung.shape.run_flops(1.0) for rung in ladder.rungs}
    # Two seeds, and at the ends two more learning rates; at the proxy's depth the rules are one.
    assert by_rung["01"] == pytest.approx(4 * one["01"], rel=0.1)
    assert by_rung["03"] == pytest.approx(2 * 2 * one["03"], rel=0.1)
    assert by_rung["05"] == pytest.approx(2 * (2 + 2) * one["05"], rel=0.1)
    assert ladders.total_flops(ladder) == sum(by_rung.values())


def test_curves_that_reach_the_floor_are_not_measured(tmp_path: Path):
    ladder = plan(proxy(tmp_path), wish())
    write_results(ladder, tmp_path)
    (analysis,) = analyse(ladder, tmp_path)
    assert curve_spread(analysis.rungs, 1.0) is not None
    lowest = min(rung.curve[-1] for rung in analysis.rungs)
    assert curve_spread(analysis.rungs, lowest) is None
    assert collapse_verdict(analysis.rungs, None) == "not measured"


def test_a_learning_rate_moved_only_by_more_than_the_noise():
    losses = {-1.0: 2.1, 0.0: 2.0, 1.0: 1.98}
    assert end_of("05", losses, Noise(0.02, 8)).verdict == "holds"
    assert end_of("05", losses, Noise(0.002, 8)).verdict == "moved"
    assert end_of("05", losses, Noise(float("nan"), 0)).verdict.startswith("unresolved")


def averaged_curve(tau: float, scale: float, floor: float) -> np.ndarray:
    """Losses of weights that are a mean over the last share `tau` of a run's updates.

    What they began with is forgotten as exp(-share / tau), and the noise of the updates is averaged
    in as fast: the limit of AdamW with decay (arXiv 2405.13698).
    """
    share = (np.arange(CURVE_GROUPS) + 0.5) / CURVE_GROUPS
    forgotten = np.exp(-2 * share / tau)
    return floor + scale * (forgotten + 0.1 * tau * (1 - forgotten))


def test_curves_collapse_at_equal_tau_alone(tmp_path: Path):
    ladder = plan(proxy(tmp_path), wish())
    write_results(ladder, tmp_path / "runs")
    (analysis,) = analyse(ladder, tmp_path / "runs")

    def with_tau(taus: Sequence[float]) -> list[Finished]:
        rungs = []
        for number, (rung, tau) in enumerate(zip(analysis.rungs, taus, strict=True)):
            curve = averaged_curve(tau, 3.0 * 0.7**number, 1.0)
            rungs.append(replace(rung, curve=curve, tau=tau))
        return rungs

    alike = with_tau([0.3] * 5)
    assert curve_spread(alike, 1.0) <= COLLAPSES
    assert collapse_verdict(alike, curve_spread(alike, 1.0)) == "collapses"
    # The control: the largest run's weights remember four times as long.
    mixed = with_tau([0.3, 0.3, 0.3, 0.3, 1.2])
    assert curve_spread(mixed, 1.0) >= DIFFERS
    verdict = collapse_verdict(mixed, curve_spread(mixed, 1.0))
    assert verdict == "does not collapse: tau is 0.3 to 1.2"


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers are threads: what a worker process does, without its start."""
    monkeypatch.setattr(sweep, "processes", lambda workers: ThreadPoolExecutor(1))


@pytest.mark.usefixtures("in_this_process")
def test_the_tool_plans_runs_once_fits_and_predicts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    write_markov_chain(tmp_path / "text", 8_000)
    save_config(proxy(tmp_path), tmp_path / "proxy.yaml")
    folder = str(tmp_path / "ladder")
    words = ["plan", str(tmp_path / "proxy.yaml"), "--out", folder, "--to-flops", "3e8"]
    words += ["--tokens-per-parameter", "0.5", "--seeds", "2,1,1,1", "--rungs", "4", "--study", "4"]
    assert main([*words, "--parameterizations", "completep,mup"]) == 0
    assert load_config(tmp_path / "ladder/rungs/04.yaml").completep.base_num_layers == 1
    assert main(["run", folder, "--only", "0", "--workers", "1"]) == 0
    assert main(["run", folder, "--workers", "1"]) == 0
    ladder = ladders.load(tmp_path / "ladder")
    assert len(list((tmp_path / "ladder/points").iterdir())) == len(ladders.points(ladder))
    # Nothing is run twice, and another ladder is not planned over this one.
    capsys.readouterr()
    assert main(["run", folder]) == 0
    assert ", 0 to run" in capsys.readouterr().out
    with pytest.raises(DataError, match="another ladder"):
        main([*words, "--no-lr-check"])
    # So short runs may say anything, but they say it: 0 or 3.
    assert main(["fit", folder]) in (0, 3)
    report = json.loads((tmp_path / "ladder/report.json").read_text())
    assert [rule["rule"] for rule in report["rules"]] == ["completep", "mup"]
    assert len(report["rules"][0]["rungs"]) == 4
    assert {"report.html", "law.png", "shapes.png", "cost.png"} <= {
        path.name for path in (tmp_path / "ladder").iterdir()
    }
    assert main(["predict", folder, "--flops", "1e9", "--json"]) in (0, 3)
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["flops"] > 0


def test_the_job_files_name_every_run(tmp_path: Path):
    ladder = plan(proxy(tmp_path), wish())
    folder = tmp_path / "a ladder"
    ladders.save(ladder, folder)
    assert main(["run", str(folder), "--write-jobs"]) == 0
    count = len(ladders.points(ladder))
    script = folder / "jobs/ladder.sbatch"
    # As sbatch and a shell part them.
    lines = script.read_text().splitlines()
    (output,) = [line.partition("--output=")[2] for line in lines if "--output=" in line]
    assert shlex.split(output) == [str(folder / "jobs/slurm-%A_%a.log")]
    assert shlex.split(lines[1].partition(":")[2]) == ["sbatch", str(script)]
    assert f"#SBATCH --array=0-{count - 1}\n" in script.read_text()
    assert subprocess.run(["bash", "-n", str(script)], check=False).returncode == 0
    job = yaml.safe_load((folder / "jobs/ladder.yaml").read_text())
    assert job["spec"]["completions"] == count
    (command,) = job["spec"]["template"]["spec"]["containers"][0]["args"]
    assert f"run '{folder}' --workers 1 --only" in command
    with pytest.raises(ConfigError, match=f"has {count} runs"):
        main(["run", str(folder), "--only", str(count)])
    for words in (["--slurm", "timeout_min=1"], ["--only", "0"], ["--workers", "2"]):
        with pytest.raises(UserError, match="do not go together"):
            main(["run", str(folder), "--write-jobs", *words])

"""The instruments with Muon: what they train, what they expect, and what they must tell apart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_completep.completep import table_of
from megatron_completep.completep.tau import timescales
from megatron_completep.config import Config
from megatron_completep.errors import ConfigError
from megatron_completep.instruments import laziness
from megatron_completep.instruments.coordinate_check import Job, Plan, jobs_of, train
from megatron_completep.instruments.coordinate_verdict import BANDS, bands_of
from megatron_completep.instruments.lr_transfer_plan import transferred
from megatron_completep.instruments.mistakes import check_mistakes
from megatron_completep.instruments.sweep import Grid
from megatron_completep.instruments.trial import (
    Design,
    Trial,
    for_short_runs,
    read_batches,
    reshape,
    under,
)
from megatron_completep.parallel.context import ParallelContext
from megatron_completep.roles import Role
from megatron_completep.telemetry.telemetry import update_ratios
from tests.support.corpora import write_markov_chain
from tests.support.runs import proxy_config

MUON: dict[str, Any] = {"base_lr": 4e-2, "base_weight_decay": 0.05, "precision": "master"}


def config_of(folder: Path, **optimizer: Any) -> Config:
    settings = {"type": "muon", "base_lr": 1e-2, "muon": {**MUON, **optimizer.pop("muon", {})}}
    return proxy_config(folder, optimizer={**settings, **optimizer})


def test_short_runs_and_sweeps_change_both_parts_alike(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    short = for_short_runs(config, 3, base_weight_decay=0.0).optimizer
    assert short.muon is not None and short.muon.base_weight_decay == 0.0
    (own, swept) = Grid([2e-2], weight_decays=[0.1, 0.2], seeds=1).points(config)
    assert own.config.optimizer.muon.base_lr == pytest.approx(8e-2)
    assert own.config.optimizer.muon.base_weight_decay == 0.05  # the configuration's own
    taus = {scale.run for scale in timescales(swept.config, table_of(swept.config))}
    assert max(taus) == pytest.approx(min(taus), rel=1e-12)  # one tau for both parts
    solved = config_of(tmp_path, weight_decay_rule="tau", target_tau=0.5)
    assert for_short_runs(solved, 3, base_weight_decay=0.0).optimizer.weight_decay_rule == "table"


def test_a_plan_for_the_target_has_the_rule_that_was_swept(tmp_path: Path) -> None:
    class Curve:
        base_weight_decay = 0.1
        base_init_std = 0.02
        train_steps = 5

    target = reshape(proxy_config(tmp_path), 64, 4)
    written = transferred(config_of(tmp_path), target, 5e-3, Curve(), False)  # type: ignore[arg-type]
    assert written.optimizer.type == "muon" and written.optimizer.muon.base_lr == 2e-2
    back = transferred(proxy_config(tmp_path), written, 5e-3, Curve(), False)  # type: ignore[arg-type]
    assert back.optimizer.type == "adamw" and back.optimizer.muon is None


def test_the_bands_of_muon_differ_where_its_updates_do() -> None:
    adamw = {(band.axis, band.quantity): (band.low, band.high) for band in bands_of("adamw")}
    muon = {(band.axis, band.quantity): (band.low, band.high) for band in bands_of("muon")}
    assert len(adamw) == len(BANDS)
    assert {key for key in adamw if adamw[key] != muon.get(key)} == {
        ("width", "update, hidden matrices"),
        ("width", "update with large eps, in blocks"),
        ("depth", "update with large eps, in blocks"),
    }


def measured(config: Config, folder: Path, design: Design | None = None) -> dict[str, float]:
    write_markov_chain(folder / "text")
    job = Job("model", config, design or Design(), 2, "float32", {"base_weight_decay": 0.0})
    return train(job, ParallelContext.single()).moved


@pytest.mark.parametrize(
    ("mistake", "power"), [("muon_adam_width", -1.0), ("muon_adam_rms", 0.5), (None, 0.0)]
)
def test_a_mistake_beside_the_model_changes_muons_rate_alone(
    tmp_path: Path, mistake: str | None, power: float
) -> None:
    """By the power of the width that it puts on the update, for square and for other matrices."""
    config = config_of(tmp_path)
    growth = {}
    for width in (32, 128):
        shaped = reshape(config, width, 2)
        right = measured(shaped, tmp_path)
        plan = Plan([2], [width], steps=2, beside=[] if mistake is None else [mistake])
        job = jobs_of(shaped, plan, Design(), "width")[-1 if mistake else 0]
        moved = measured(shaped, tmp_path, job.design)
        growth[width] = moved[Role.HIDDEN_WEIGHT] / right[Role.HIDDEN_WEIGHT]
        assert moved[Role.EMBEDDING] == pytest.approx(right[Role.EMBEDDING], rel=0.2)
    assert growth[128] / growth[32] == pytest.approx(4.0**power, rel=0.1)


def test_mistakes_with_muon_are_refused_without_it(tmp_path: Path) -> None:
    check_mistakes(["sp", "muon_adam_rms"], config_of(tmp_path))
    with pytest.raises(ConfigError, match=r"--beside muon_adam_rms: .*optimizer\.type = adamw"):
        check_mistakes(["sp", "muon_adam_rms"], proxy_config(tmp_path))


def test_updates_over_width_shrink_as_the_rms_of_an_orthogonal_matrix(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    rms = {}
    for name, rule in (("table", "own"), ("control", "sp")):
        for width in (32, 128):
            shaped = under(reshape(config, width, 2), rule)
            rms[name, width] = measured(shaped, tmp_path)[Role.HIDDEN_WEIGHT]
    # Half at four times the width, less what a gradient of few tokens lacks in rank.
    assert rms["table", 128] / rms["table", 32] == pytest.approx(0.5, rel=0.2)
    assert rms["control", 128] / rms["control", 32] == pytest.approx(1.0, rel=0.2)


def test_laziness_is_measured_with_the_configured_rule(tmp_path: Path) -> None:
    write_markov_chain(tmp_path / "text")
    ours = laziness.collect(config_of(tmp_path), [2], 1, ["own"])
    adamw = laziness.collect(proxy_config(tmp_path), [2], 1, ["own"])
    assert all(0 < r < 10 for r in ours[0].blocks) and ours[0].blocks != adamw[0].blocks


def test_telemetry_has_the_update_of_every_role(tmp_path: Path) -> None:
    """Of an orthogonal update the ratio follows from the rate alone: RMS n^-1/2 over sigma / 1."""
    write_markov_chain(tmp_path / "text")
    config = config_of(tmp_path, base_weight_decay=0.0, muon={"base_weight_decay": 0.0})
    trial = Trial.build(for_short_runs(config, 1), ParallelContext.single())
    (batches,) = read_batches(trial.config, trial.context, 1)
    before = trial.optimizer.shards.master.clone()
    trial.step.run(batches, 1).read()
    ratios = update_ratios(trial.optimizer)
    assert set(ratios) == {f"update_ratio/{g.role}" for g in trial.optimizer.groups.values()}
    shards = trial.optimizer.shards
    moved = shards.master - before
    squares = {"update": 0.0, "weight": 0.0}
    for segment in shards.part_segments:
        group = trial.optimizer.groups[segment.group]
        if group.role is Role.HIDDEN_WEIGHT:
            squares["update"] += (moved[segment.in_shard] / group.lr_factor).square().sum().item()
            squares["weight"] += (
                trial.optimizer.shards.master[segment.in_shard].square().sum().item()
            )
    expected = (squares["update"] / squares["weight"]) ** 0.5
    assert ratios["update_ratio/hidden_weight"] == pytest.approx(expected, rel=1e-3)

"""The instruments with experts: what they train, what they measure, and what they tell apart."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_completep.completep import Table, table_of
from megatron_completep.completep.table import Matrix, Row
from megatron_completep.config import Config
from megatron_completep.errors import ConfigError
from megatron_completep.instruments import laziness
from megatron_completep.instruments.coordinate_check import (
    Measurement,
    Plan,
    Sample,
    collect,
    in_turn,
    run_probe,
)
from megatron_completep.instruments.coordinate_verdict import BANDS, Band, exponent
from megatron_completep.instruments.expert_taps import LoadTaps, expert_figures
from megatron_completep.instruments.lr_transfer import analyse
from megatron_completep.instruments.lr_transfer_plan import transferred, unlike_experts
from megatron_completep.instruments.mistakes import check_mistakes, table_with
from megatron_completep.instruments.sweep import Grid, result_path, run_and_keep, save_grid
from megatron_completep.instruments.trial import (
    Design,
    Trial,
    for_short_runs,
    read_batches,
    reshape,
    with_base,
)
from megatron_completep.model.routing import Routing, observing
from megatron_completep.parallel.context import ParallelContext
from megatron_completep.roles import Role
from tests.support.corpora import write_markov_chain
from tests.support.models import as_class
from tests.support.runs import proxy_config

SINGLE = ParallelContext.single()
MOE: dict[str, Any] = {"num_experts": 4, "top_k": 1, "ffn_hidden_size": 48}


def config_of(folder: Path, **moe: Any) -> Config:
    return proxy_config(folder, model={"moe": {**MOE, **moe}})


def test_experts_keep_their_shape_and_share_at_another_size(tmp_path: Path) -> None:
    config = config_of(tmp_path, shared_ffn_hidden_size=16)
    moe = reshape(config, 64, 2, 12).model.moe
    assert moe is not None
    assert (moe.num_experts, moe.top_k) == (12, 3)
    assert (moe.ffn_hidden_size, moe.shared_ffn_hidden_size) == (96, 32)
    base = reshape(config, 64, 2, 12).completep
    assert (base.base_num_experts, base.base_top_k, base.base_expert_ffn_hidden_size) == (4, 1, 48)
    with pytest.raises(ConfigError, match=r"6 experts: a token goes to 1 of 4.* multiple of 4"):
        reshape(config, 64, 2, 6)
    with pytest.raises(ConfigError, match=r"8 experts, but model\.moe is null"):
        reshape(proxy_config(tmp_path), 64, 2, 8)


def test_each_mistake_changes_one_factor_of_the_table(tmp_path: Path) -> None:
    """At four times the width and the experts: (factor on lr, init std, eps) by role."""
    config = reshape(config_of(tmp_path), 128, 2, 16)
    wrong = {
        "experts_summed": {Role.EXPERT_DOWN: (4.0, 4.0, 1.0)},
        "experts_eps": dict.fromkeys(
            (Role.EXPERT_UP, Role.EXPERT_DOWN, Role.ROUTER), (1.0, 1.0, 4.0)
        ),
        "router_lr": {Role.ROUTER: (4.0, 1.0, 1.0)},
        "router_init": {Role.ROUTER: (1.0, 2.0, 1.0)},
    }
    for mistake, factors in wrong.items():
        mistaken = table_with(mistake)(config)
        for role in Role:
            right = super(type(mistaken), mistaken)._row(role, 4.0, None)
            row = mistaken._row(role, 4.0, None)
            lr, std, eps = factors.get(role, (1.0, 1.0, 1.0))
            assert row.lr == pytest.approx(right.lr * lr), (mistake, role)
            assert row.variance == pytest.approx(right.variance * std**2), (mistake, role)
            assert row.eps == pytest.approx(right.eps * eps), (mistake, role)
            # What a step decays stays.
            assert row.lr * row.weight_decay == pytest.approx(right.lr * right.weight_decay)
    check_mistakes(wrong, config)
    with pytest.raises(ConfigError, match=r"--beside router_lr: .*model\.moe is null"):
        check_mistakes(["sp", "router_lr"], proxy_config(tmp_path))


def test_the_check_over_the_number_of_experts_tells_a_sum_and_a_wrong_eps_apart(
    tmp_path: Path,
) -> None:
    write_markov_chain(tmp_path / "text")
    config = with_base(config_of(tmp_path))
    plan = Plan([2], [32], steps=3, seeds=1, beside=["experts_eps"], experts=[4, 16])
    samples = collect(config, plan, in_turn(SINGLE))
    assert [s.size for s in samples if s.rule == "control"] == [4, 16]

    def slope(quantity: str, rule: str) -> float:
        estimate = exponent(samples, Band("experts", quantity), rule)
        assert estimate is not None
        return estimate.value

    assert abs(slope("experts' change", "model")) < 0.35
    assert slope("experts' change", "control") > 0.6
    assert slope("experts at init", "model") == pytest.approx(-0.5, abs=0.1)
    assert slope("experts at init", "control") == pytest.approx(0.5, abs=0.1)
    for kind in ("up", "down"):
        quantity = f"update with large eps, experts {kind}"
        assert abs(slope(quantity, "model")) < 0.35
        assert slope(quantity, "experts_eps") < slope(quantity, "model") - 0.8
    assert slope("gradient, experts", "model") == pytest.approx(-1.0, abs=0.25)
    # Every band of the axis has a figure.
    for band in BANDS:
        if band.axis == "experts":
            assert exponent(samples, band, "model") is not None, band.quantity


def test_a_branch_starts_smaller_by_the_root_of_the_inner_width_of_its_experts(
    tmp_path: Path,
) -> None:
    """arXiv 2601.20205's row of the last matrix; of one that starts at 1 / sqrt(fan-in) it would
    stay.
    """
    write_markov_chain(tmp_path / "text")
    right = starts_of(tmp_path, Design())
    assert right[1] / right[0] == pytest.approx(16**-0.5, rel=0.15)
    wrong = starts_of(tmp_path, Design(by_fan_in))
    assert wrong[0] == right[0] and wrong[1] / wrong[0] == pytest.approx(1.0, rel=0.15)


class FanInTable(Table):
    """Last matrices of experts start at 1 / sqrt(fan-in), whatever their granularity is."""

    def _row(self, role: Role, width_ratio: float, matrix: Matrix | None) -> Row:
        row = super()._row(role, width_ratio, matrix)
        is_last = role is Role.EXPERT_DOWN
        return replace(row, variance=1 / width_ratio if is_last else row.variance)


def by_fan_in(config: Config) -> Table:
    return as_class(FanInTable, table_of(config))


def starts_of(folder: Path, design: Design) -> list[float]:
    """The size of a routed branch at the start, at the proxy's inner width and 16 times that."""
    starts = []
    for inner in (32, 512):
        completep = {
            "base_num_experts": 4,
            "base_top_k": 1,
            "base_expert_ffn_hidden_size": 32,
            "allow_granularity_change": True,
        }
        moe = {**MOE, "ffn_hidden_size": inner}
        config = proxy_config(folder, model={"moe": moe}, completep=completep)
        trial = Trial.build(config, SINGLE, design)
        (batches,) = read_batches(config, SINGLE, 1)
        probe = run_probe(trial, batches).experts
        starts.append(expert_figures(probe, probe, probe, SINGLE)["experts at init"])
    return starts


def test_scores_of_routers_start_closer_by_the_root_of_the_width_and_the_mistake_shows(
    tmp_path: Path,
) -> None:
    """A router drawn as a hidden weight has scores whose spread no width changes."""
    write_markov_chain(tmp_path / "text")
    spreads: dict[str, list[float]] = {"right": [], "wrong": []}
    for width in (32, 256):
        config = reshape(with_base(config_of(tmp_path)), width, 2, 4)
        (batches,) = read_batches(config, SINGLE, 1)
        for name, design in (("right", Design()), ("wrong", Design(table_with("router_init")))):
            probe = run_probe(Trial.build(config, SINGLE, design), batches).experts
            figures = expert_figures(probe, probe, probe, SINGLE)
            spreads[name].append(figures["score spread at init"])
    assert spreads["right"][1] / spreads["right"][0] == pytest.approx(8**-0.5, rel=0.25)
    assert spreads["wrong"][1] / spreads["wrong"][0] == pytest.approx(1.0, rel=0.25)


def test_a_dense_model_has_no_rows_of_experts(tmp_path: Path) -> None:
    write_markov_chain(tmp_path / "text")
    plan = Plan([2, 4], [32], steps=1, seeds=1, check_eps=False)
    samples = collect(proxy_config(tmp_path), plan, in_turn(SINGLE))
    assert exponent(samples, Band("depth", "experts' change"), "model") is None
    assert exponent(samples, Band("depth", "stream change"), "model") is not None


def test_settings_of_experts_over_which_nothing_transfers_are_named() -> None:
    """Losses of the router are the proxy's, and so is the share of the MLP that all tokens see."""
    proxy = proxy_config(Path(), model={"moe": {**MOE, "shared_ffn_hidden_size": 16}}).model
    assert proxy.moe is not None
    wider = {"hidden_size": 2 * proxy.hidden_size}
    moe: dict[str, Any] = {"shared_ffn_hidden_size": 32}
    same = proxy.model_copy(update={**wider, "moe": proxy.moe.model_copy(update=moe)})
    assert unlike_experts(proxy, same) == []
    moe = {"balance_loss": 0.01, "router_z_loss": 0.001, "first_dense_layers": 1}
    other = proxy.model_copy(update={**wider, "moe": proxy.moe.model_copy(update=moe)})
    assert unlike_experts(proxy, other) == [
        "moe.first_dense_layers",
        "moe.balance_loss",
        "moe.router_z_loss",
        "moe.shared_ffn_hidden_size",
    ]


def test_choices_that_no_step_changes_have_no_exponent() -> None:
    """All experts are chosen. A quantity that is judged would have one that is not a number."""
    samples = []
    for experts in (8, 16):
        figures = {"choices changed by a step": 0.0, "experts' change": 0.0}
        measured = Measurement([1.0], [1.0], [1.0], [1.0], [], {}, {}, [], experts=figures)
        samples.append(Sample("experts", "model", 64, 2, 0, measured, num_experts=experts))
    assert exponent(samples, Band("experts", "choices changed by a step"), "model") is None
    judged = exponent(samples, Band("experts", "experts' change", -0.2, 0.2), "model")
    assert judged is not None and math.isnan(judged.value)


def choices_of(trial: Trial, tokens: torch.Tensor) -> dict[int, torch.Tensor]:
    choices: dict[int, torch.Tensor] = {}

    def keep(layer: int, routing: Routing) -> None:
        choices[layer] = routing.experts

    with observing(trial.chunks[0], keep), torch.no_grad():
        trial.chunks[0](tokens)
    return choices


def test_laziness_keeps_every_token_at_its_experts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is smooth has one derivative at every step of the difference. Where choices change with
    the weights, as they do in this step, it has none.
    """
    write_markov_chain(tmp_path / "text")
    settings = {"base_weight_decay": 0.0, "base_eps": 1e-30, "base_lr": 2**-5}
    config = for_short_runs(with_base(config_of(tmp_path)), 1, "float64", **settings)
    fixed = {}
    for step in (1e-4, 1e-3):
        monkeypatch.setattr(laziness, "STEP", step)
        fixed[step] = laziness.block_laziness(Trial.build(config, SINGLE))
    assert fixed[1e-4] == pytest.approx(fixed[1e-3], rel=1e-4)

    trial = Trial.build(config, SINGLE)
    (batches,) = read_batches(config, SINGLE, 1)
    before = choices_of(trial, batches[0].tokens)
    trial.step.run(batches, 1).read()
    after = choices_of(trial, batches[0].tokens)
    assert all((before[layer] != after[layer]).any() for layer in before)
    monkeypatch.setattr(laziness, "fixing", lambda model, choices: observing(model, print_nothing))
    free = laziness.block_laziness(Trial.build(config, SINGLE))
    assert all(r > 1.05 * held for r, held in zip(free, fixed[1e-3], strict=True))


def print_nothing(layer: int, routing: Routing) -> None:
    """An observer that does nothing."""


def test_a_sweep_over_experts_has_curves_of_its_own_and_their_loads(tmp_path: Path) -> None:
    write_markov_chain(tmp_path / "text")
    config = config_of(tmp_path)
    grid = Grid([2**-9, 2**-8], train_steps=[3], seeds=1, num_experts=[4, 8])
    points = grid.points(config)
    assert [point.config.model.moe.top_k for point in points] == [1, 1, 2, 2]
    # A number that is the configuration's own is the same run.
    (own, _) = Grid([2**-9, 2**-8], train_steps=[3], seeds=1).points(config)
    assert own.key == points[0].key
    save_grid(grid, config, tmp_path / "sweep")
    (tmp_path / "sweep" / "points").mkdir()
    for point in points:
        path = str(result_path(tmp_path / "sweep", point))
        run_and_keep(point.settings(), point.config.model_dump(mode="json"), path, "cpu")
    analysis = analyse(tmp_path / "sweep")
    assert [curve.num_experts for curve in analysis.curves] == [4, 8]
    few, many = analysis.optima
    assert few.drift is None and many.drift is not None  # the fewest are the base
    assert all(1.0 <= o.expert_load <= 4.0 for o in analysis.optima if o.expert_load is not None)
    assert analysis.drifts == []  # none over depth

    target = reshape(config, 64, 4)
    completep = target.completep.model_copy(
        update={"base_num_experts": None, "base_top_k": None, "base_expert_ffn_hidden_size": None}
    )
    bare = target.model_copy(update={"completep": completep})
    written = transferred(points[0].config, bare, 2**-8, analysis.curves[0], False)
    assert written.completep.base_expert_ffn_hidden_size == 48
    assert (written.completep.base_num_experts, written.completep.base_top_k) == (4, 1)


def test_loads_of_a_run_are_the_largest_over_the_mean(tmp_path: Path) -> None:
    """With as many experts as places all loads are equal; without experts there are none."""
    write_markov_chain(tmp_path / "text")
    seen = {}
    for name, config in (
        ("all", config_of(tmp_path, num_experts=2, top_k=2)),
        ("some", config_of(tmp_path)),
        ("none", proxy_config(tmp_path)),
    ):
        short = for_short_runs(config, 2)
        trial = Trial.build(short, SINGLE)
        loads = LoadTaps(trial.chunks)
        for number, batches in enumerate(read_batches(short, SINGLE, 2), start=1):
            with loads.recording():
                trial.step.run(batches, number).read()
        seen[name] = loads.largest(1.0)
    assert seen["all"] == 1.0 and seen["none"] is None
    assert seen["some"] is not None and 1.0 < seen["some"] <= 4.0


def test_a_plan_of_one_size_of_everything_is_refused() -> None:
    assert list(replace(Plan([2], [32]), experts=[4]).shapes()) == []

"""Whether float8 scales of a proxy hold: what is measured, and what follows from it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch

from megatron_completep.config import save_config
from megatron_completep.instruments import float8_scales
from megatron_completep.instruments.float8_scales import (
    CANNOT_TELL,
    DO_NOT,
    HOLD,
    Run,
    ScaleJob,
    bounds_of,
    cut_off,
    gradient_factor,
    judge,
    settings_of,
)
from megatron_completep.instruments.trial import change, for_short_runs, reshape, under
from megatron_completep.kernels.cpu.float8 import float8_cast
from megatron_completep.tools.coordinate_check import main
from tests.support.corpora import write_markov_chain
from tests.support.runs import proxy_config

BASE = (64, 2)
SITES = ("mlp.up input", "mlp.up gradient")


@pytest.mark.parametrize("kind", ["input", "gradient"])
@pytest.mark.parametrize("bound", [1.0, 448.0, 3e-7, 1.75])
def test_the_cut_off_is_where_the_cast_saturates(kind: str, bound: float) -> None:
    largest = cut_off(bound, kind)
    assert bound <= largest < 2.01 * bound
    x = torch.tensor([[largest, 1.2 * largest, 100 * largest]])
    data, scale, _ = float8_cast(x, torch.tensor(bound), kind == "gradient", False)
    assert (data.float() * scale).tolist() == [[pytest.approx(largest, rel=1e-6)] * 3]


def made_up(saturated: float = 0.0, apart: float = 0.0, control: float = 1.0, seeds: int = 3):
    """(dynamic, static) runs of the base and of one wide shape."""
    dynamic = []
    static = []
    for rule, share in (("model", saturated), ("control", control)):
        for shape, width_share in ((BASE, 0.0), ((512, 2), share)):
            for seed in range(seeds):
                loss = 2.0 + 0.01 * seed
                amax = {site: [1.0 + seed, 2.0, 1.0, 1.0] for site in SITES}
                run = Run(rule, "width", shape, seed, 64 / shape[0], loss, amax)
                dynamic.append(run)
                shares = dict.fromkeys(SITES, width_share)
                static.append(replace(run, amax={}, saturated=shares, loss=loss + apart))
    return dynamic, static


@pytest.mark.parametrize(
    ("settings", "exit_code"),
    [
        ({}, HOLD),
        ({"saturated": 1e-6}, HOLD),
        ({"saturated": 2e-6}, DO_NOT),
        ({"apart": 0.005}, HOLD),
        ({"apart": 0.02}, DO_NOT),
        ({"apart": float("nan")}, DO_NOT),
        ({"control": 0.0}, CANNOT_TELL),
        ({"seeds": 1}, CANNOT_TELL),
    ],
    ids=str,
)
def test_the_verdict_follows_from_what_was_cut_off_and_from_the_loss(settings, exit_code) -> None:
    assert judge(*made_up(**settings), BASE).exit_code == exit_code


def test_exponents_are_those_behind_the_table_s_factor() -> None:
    dynamic, static = made_up()
    slopes = {f.site: f for f in judge(dynamic, static, BASE).slopes if f.rule == "model"}
    assert slopes["mlp.up input"].at_start == pytest.approx(0.0, abs=1e-12)
    assert slopes["mlp.up gradient"].at_start == pytest.approx(1.0)  # it should have fallen


def test_static_bounds_have_the_headroom_of_the_largest_moment_of_all_seeds() -> None:
    proxies = [run for run in made_up()[0] if run.rule == "model" and run.shape == BASE]
    assert bounds_of(proxies, 0.125) == {"mlp.up input": 12.0, "mlp.up gradient": 1.5}
    others = [replace(run, factor=0.5) for run in proxies]  # the smallest shape is not the base
    assert bounds_of(others, 0.125) == {"mlp.up input": 12.0, "mlp.up gradient": 3.0}


def test_gradients_follow_what_the_table_multiplies(tmp_path: Path) -> None:
    config = proxy_config(tmp_path)
    width, depth = config.model.hidden_size, config.model.num_layers
    larger = reshape(config, 4 * width, 2 * depth)
    assert gradient_factor(config) == pytest.approx(1.0)
    assert gradient_factor(larger) == pytest.approx(1 / 8)
    assert gradient_factor(under(larger, "sp")) == 1.0


def test_the_program_measures_real_models_and_sees_scales_that_are_too_small(
    programs, tmp_path: Path
) -> None:
    write_markov_chain(tmp_path / "text")
    config = proxy_config(tmp_path)
    path = tmp_path / "config.yaml"
    save_config(config, path)
    widths = f"{config.model.hidden_size},{2 * config.model.hidden_size}"
    words = [path, "training.cpu_threads=1", "--widths", widths, "--float8", "--steps", "4"]
    words += ["--seeds", "2", "--out", tmp_path / "out"]
    with mock.patch.object(float8_scales, "HEADROOM", 0.25):
        ran = programs.run(main, *words)
    assert ran.code == DO_NOT, ran.err
    result = json.loads((tmp_path / "out" / "float8_scales.json").read_text())
    assert {f["site"] for f in result["slopes"]} == {
        f"{layer} {kind}"
        for layer in ("attention.qkv", "attention.output", "mlp.up", "mlp.down")
        for kind in ("input", "gradient")
    }
    assert min(finding["saturated"] for finding in result["shapes"]) > 1e-6
    dynamic = [run for run in result["runs"] if run["amax"]]
    assert len(dynamic) == 8 and all(len(a) == 4 for run in dynamic for a in run["amax"].values())
    refused = programs.run(main, *words, "--model", "tests.instruments.own_model:right")
    assert refused.code == 2 and "Leave out --model and torchrun" in refused.err
    unread = programs.run(main, *words, "--no-eps", "--beside", "mup")
    assert unread.code == 2 and "does not read --beside, --no-eps" in unread.err


def test_short_runs_are_without_float8_and_the_scales_keep_the_kind_of_weight_gradient(
    tmp_path: Path,
) -> None:
    float8 = {"float8": "tensorwise", "float8_weight_gradient": "float8", "float8_least_size": 16}
    config = change(proxy_config(tmp_path), training=float8)
    short = for_short_runs(config, 4).training
    assert (short.float8, short.float8_weight_gradient) == ("none", "high")
    measured = settings_of(ScaleJob("model", "width", config, 4, "float32", 0)).training
    assert (measured.float8, measured.float8_weight_gradient) == ("tensorwise", "float8")

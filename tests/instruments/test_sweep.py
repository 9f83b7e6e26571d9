"""Sweeps: which points a grid has, what a cached point depends on,
and that nothing is run twice.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from megatron_completep.config.derived import tokens_per_step
from megatron_completep.errors import ConfigError, DataError, UserError
from megatron_completep.instruments import sweep
from megatron_completep.instruments.trial import change
from tests.support.corpora import write_markov_chain
from tests.support.runs import proxy_config


def test_a_grid_of_octaves_holds_both_ends():
    assert sweep.octaves(-9, -7, 2) == [2**-9, 2**-8.5, 2**-8, 2**-7.5, 2**-7]


def test_a_grid_is_the_product_of_its_axes(tmp_path: Path):
    grid = sweep.Grid([0.01, 0.02], (2, 4), (32, 64), ("completep", "mup"), (0.0, 0.1), (), (), 3)
    points = grid.points(proxy_config(tmp_path))
    assert len(points) == 2 * 2 * 2 * 2 * 2 * 3
    point = points[-1]
    model = point.config.model
    assert (model.hidden_size, model.num_layers, model.ffn_hidden_size) == (64, 4, 256)
    assert point.config.optimizer.base_lr == 0.02
    assert (point.config.completep.base_hidden_size, point.config.completep.base_num_layers) == (
        32,
        2,
    )
    assert point.config.completep.parameterization == "mup"
    assert point.tau == pytest.approx(1 / (0.02 * 0.1 * 10))


def test_a_line_on_a_point_has_the_tau_that_its_rule_of_decay_gives(tmp_path: Path):
    config = proxy_config(tmp_path)

    def line(**sections: dict[str, Any]) -> str:
        (point,) = sweep.Grid([0.02], seeds=1).points(change(config, **sections))
        return sweep.describe(point)

    assert ", wd 0.1 (tau 50)," in line()
    assert ", tau 1.3," in line(optimizer={"weight_decay_rule": "tau", "target_tau": 1.3})
    # Four times the length at a square root: half the rate and half the decay of the proxy.
    length = {"base_total_tokens": tokens_per_step(config) * config.training.train_steps}
    assert ", wd 0.1 (tau 50)," in line(
        completep=length, training={"train_steps": 4 * config.training.train_steps}
    )
    assert ", wd 0 " not in line(optimizer={"base_weight_decay": 0.0})


def test_at_the_base_depth_rules_that_coincide_share_one_run(tmp_path: Path):
    grid = sweep.Grid([0.01], (2, 4), (), ("completep", "alpha_0.5", "mup"), (), (), (), 1)
    points = grid.points(proxy_config(tmp_path))
    assert len(points) == 6
    assert len({p.key for p in points if p.num_layers == 2}) == 1
    assert len({p.key for p in points if p.num_layers == 4}) == 3


def test_a_points_key_changes_with_every_setting_that_changes_its_result_and_no_other(
    tmp_path: Path,
):
    config = proxy_config(tmp_path)

    def key(changed):
        return sweep.Grid([0.01], seeds=1).points(changed)[0].key

    own = key(config)
    assert (
        key(
            change(
                config,
                training={"output_dir": "elsewhere"},
                logging={"interval": 3},
                checkpoint={"keep": 1},
            )
        )
        == own
    )
    different = [
        change(config, training={"seed": 5}),
        change(config, training={"train_steps": 11}),
        change(config, optimizer={"betas": (0.9, 0.99)}),
        change(config, model={"ffn_hidden_size": 96}),
        change(config, data={"seed": 5}),
        change(config, completep={"base_num_layers": 1}),
    ]
    assert len({own, *(key(changed) for changed in different)}) == len(different) + 1
    seeds = {p.key for p in sweep.Grid([0.01], seeds=3).points(config)}
    assert len(seeds) == 3


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers are threads: what a worker process does, without its start."""
    monkeypatch.setattr(sweep, "processes", lambda workers: ThreadPoolExecutor(1))


@pytest.mark.usefixtures("in_this_process")
def test_a_sweep_that_was_interrupted_runs_only_what_is_missing(tmp_path: Path):
    write_markov_chain(tmp_path / "text", 8_000)
    folder, config = tmp_path / "sweep", proxy_config(tmp_path, training={"train_steps": 3})
    grid = sweep.Grid([2**-9, 2**-7], (2,), (), ("completep", "mup"), (), (), (), 1)
    sweep.save_grid(grid, config, folder)
    sweep.save_grid(grid, config, folder)  # started again: the same grid is no second one
    points = grid.points(config)
    said: list[str] = []
    assert len(sweep.missing(points, folder)) == 2
    sweep.run_local(points, folder, 1, "cpu", said.append)
    assert sweep.missing(points, folder) == []
    first = sweep.result_path(folder, points[0])
    written = json.loads(first.read_text())
    assert written["steps"] == 3
    assert not written["diverged"]
    assert 2.0 < written["validation_loss"] < 4.0
    assert written["flops"] > 0
    first.unlink()
    assert [p.base_lr for p in sweep.missing(sweep.load_points(folder), folder)] == [2**-9]
    again = sweep.run_point(points[0].config)
    assert again["validation_loss"] == written["validation_loss"]  # bit for bit: the same run


@pytest.mark.usefixtures("in_this_process")
def test_points_of_another_text_are_not_joined_by_new_ones(tmp_path: Path):
    write_markov_chain(tmp_path / "text", 8_000)
    config = proxy_config(tmp_path, training={"train_steps": 2})
    points = sweep.Grid([2**-9, 2**-7], seeds=1).points(config)
    sweep.run_local(points[:1], tmp_path, 1, "cpu", print)
    path = sweep.result_path(tmp_path, points[0])
    result = json.loads(path.read_text())
    assert result["text"][0]["tokens"] == 8_000
    for suffix in (".bin", ".idx", ".json"):
        (tmp_path / f"text{suffix}").unlink(missing_ok=True)
    # Without the files a finished folder can still be looked at.
    sweep.run_local(points[:1], tmp_path, 1, "cpu", print)
    write_markov_chain(tmp_path / "text", 6_000)
    expected = "another text than .*text holds now .8,000 tokens in 20 documents then, 6,000"
    # Also where the finished point is not among those that are asked for, as in a job of an array.
    with pytest.raises(DataError, match=expected):
        sweep.run_local(points[1:], tmp_path, 1, "cpu", print)
    assert len(sweep.missing(points, tmp_path)) == 1
    # The control: a result of a version that kept no text.
    del result["text"]
    path.write_text(json.dumps(result))
    sweep.run_local(points, tmp_path, 1, "cpu", print)
    assert sweep.missing(points, tmp_path) == []


@pytest.fixture
def small_sweep(tmp_path: Path) -> tuple[Path, list[sweep.Point]]:
    """Two points of two steps."""
    write_markov_chain(tmp_path / "text", 8_000)
    points = sweep.Grid([2**-9, 2**-7], seeds=1).points(
        proxy_config(tmp_path, training={"train_steps": 2})
    )
    return tmp_path / "sweep", points


@pytest.mark.parametrize("cluster", ["debug", pytest.param("local", marks=pytest.mark.slow)])
def test_slurm_jobs_write_the_same_points_and_only_what_is_missing(small_sweep, cluster: str):
    """Through submitit, whose other executors stand in for Slurm:
    in this process, and in processes of their own.
    """
    pytest.importorskip("submitit", reason="pip install 'megatron-completep[slurm]'")
    folder, points = small_sweep
    done = sweep.result_path(folder, points[0])
    done.parent.mkdir(parents=True)
    done.write_text("{}")
    jobs = sweep.run_slurm(points, folder, {"timeout_min": 10}, "auto", cluster)
    assert len(jobs) == 1
    assert done.read_text() == "{}"
    assert jobs[0].result() == sweep.run_point(points[1].config)["validation_loss"]
    assert json.loads(sweep.result_path(folder, points[1]).read_text())["base_lr"] == 2**-7
    assert sweep.run_slurm(points, folder, {"timeout_min": 10}, "cpu", cluster) == []


def test_without_submitit_slurm_jobs_are_refused_clearly(
    small_sweep, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(UserError, match="pip install submitit"):
        sweep.run_slurm(small_sweep[1], small_sweep[0], {}, "cpu")


class Recorder(ThreadPoolExecutor):
    """A pool that runs nothing and keeps how many workers it was given,
    and where each point was sent.
    """

    workers = 0
    places: list[str] = []  # noqa: RUF012

    def __init__(self, workers: int):
        super().__init__(1)
        Recorder.workers, Recorder.places = workers, []

    def submit(self, function, settings, values, path, device):  # type: ignore[override]
        Recorder.places.append(device)
        return super().submit(lambda: 2.5)


def test_on_gpus_several_small_runs_share_each_device(
    small_sweep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(sweep, "processes", Recorder)
    monkeypatch.setattr(sweep.torch.cuda, "device_count", lambda: 2)
    points = sweep.Grid([2**-9, 2**-8, 2**-7], seeds=4).points(proxy_config(tmp_path))
    sweep.run_local(
        points, tmp_path / "gpus", sweep.default_workers("cuda"), "cuda", lambda text: None
    )
    assert Recorder.workers == 2 * sweep.WORKERS_PER_GPU > 2
    assert Recorder.places == ["cuda:0", "cuda:1"] * 6
    assert sweep.default_workers("cpu") == len(os.sched_getaffinity(0))


def test_a_run_whose_loss_is_not_finite_counts_as_diverged(tmp_path: Path):
    write_markov_chain(tmp_path / "text", 8_000)
    config = proxy_config(tmp_path, training={"train_steps": 3}, model={"logit_multiplier": 1e38})
    result = sweep.run_point(sweep.Grid([0.01], seeds=1).points(config)[0].config)
    assert result["diverged"]
    assert sweep.loss_of(result) == float("inf")


def test_an_unknown_rule_and_a_broken_result_are_named(tmp_path: Path):
    config = proxy_config(tmp_path)
    with pytest.raises(ConfigError, match=r"standard is not known.*completep, alpha_0.5, mup, sp"):
        sweep.Grid([0.01], parameterizations=("standard",)).points(config)
    with pytest.raises(ConfigError, match="hidden_size 40 is not a multiple of the head size 16"):
        sweep.Grid([0.01], widths=(40,)).points(config)
    points = sweep.Grid([0.01], seeds=1).points(config)
    path = sweep.result_path(tmp_path, points[0])
    path.parent.mkdir()
    path.write_text("{")
    with pytest.raises(DataError, match="not a result"):
        list(sweep.read_results(points, tmp_path))


@pytest.mark.parametrize(
    ("options", "cluster", "words"),
    [
        ({"timeout_mins": 5}, "local", "timeout_mins=5: submitit refuses it"),
        ({"timeout_min": "abc"}, "local", "expected type"),
        pytest.param(
            {"timeout_min": 5},
            "slurm",
            "srun",
            marks=pytest.mark.skipif(shutil.which("srun") is not None, reason="has Slurm"),
        ),
    ],
)
def test_options_that_submitit_does_not_take_are_refused_in_its_words(
    options: dict[str, int | str], cluster: str, words: str, tmp_path: Path
):
    pytest.importorskip("submitit", reason="pip install 'megatron-completep[slurm]'")
    with pytest.raises(UserError, match=words):
        sweep.slurm_executor(tmp_path, "sweep", options, cluster)
    assert sweep.slurm_executor(tmp_path, "sweep", {"timeout_min": 5}, "local")

"""The search at the proxy: a known optimum is found, a stopped search goes on, bad spaces are
refused before anything runs.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from megatron_completep.config import load_config, save_config
from megatron_completep.config.schema import Config
from megatron_completep.errors import ConfigError, DataError
from megatron_completep.instruments import proxy_report, proxy_search, sweep
from megatron_completep.instruments.search_space import (
    check_space,
    contains,
    dimension,
    from_coordinate,
    settings_of,
    to_coordinate,
    with_settings,
)
from megatron_completep.roles import Role
from megatron_completep.tools.tune_proxy import main
from tests.support.commands import Programs
from tests.support.configs import small_config
from tests.support.corpora import write_markov_chain
from tests.support.runs import proxy_config

optuna = pytest.importorskip("optuna", reason="the search is an optional extra: [tune]")

SPACE = tuple(
    map(dimension, ["base_lr=1e-4:1e-1", "base_init_std=0.002:0.2", "warmup_fraction=0:0.5"])
)
BEST = {"base_lr": 2**-8, "base_init_std": 2**-5, "warmup_fraction": 0.1}


@dataclass(frozen=True)
class Surface:
    """A loss whose lowest point is BEST; runs far above it diverge."""

    fails_at: int | None = None  # the call in which the process is interrupted

    def __call__(self, settings: proxy_search.Settings, watch: proxy_search.Watch) -> float:
        loss = 2.0
        for name, value in settings.items():
            distance = to_coordinate(name, value) - to_coordinate(name, BEST[name])
            loss += distance**2 * (0.1 if name != "warmup_fraction" else 1.0)
        if settings["base_lr"] > 2**-4:
            return math.inf
        for step in (2, 4, 6, 8, 10):
            watch(step, loss + 1 / step)
        return loss


def search_of(config: Config | None = None) -> proxy_search.Search:
    return proxy_search.Search(SPACE, config or small_config(), seed=3)


def test_the_known_optimum_of_a_surface_is_found(tmp_path: Path):
    search = search_of()
    proxy_search.prepare(search, tmp_path)
    proxy_search.run_local(tmp_path, 45, [Surface()])
    trials = proxy_report.trials_of(search, tmp_path)
    best = proxy_report.best_of(trials)
    assert best.loss is not None and best.loss < 2.1
    assert abs(math.log2(best.settings["base_lr"] / BEST["base_lr"])) < 1
    # The control: as many random points of the ranges are farther away.
    first = [trial.loss for trial in trials[:10] if trial.loss is not None]
    assert min(first) > best.loss
    # Some were given up, among them those that diverged, and what counts is known.
    states = [trial.state for trial in trials]
    assert states.count("pruned") > 0 and any(trial.diverged for trial in trials)
    shares = proxy_report.importances(search, tmp_path)
    assert set(shares) == set(BEST) and min(shares, key=shares.__getitem__) == "warmup_fraction"


def test_a_stopped_search_goes_on_and_tries_the_same_settings_again(tmp_path: Path):
    search = search_of()
    study = proxy_search.prepare(search, tmp_path)
    proxy_search.run_local(tmp_path, 3, [Surface()])

    def interrupted(settings: proxy_search.Settings, watch: proxy_search.Watch) -> float:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        proxy_search.run_local(tmp_path, 6, [interrupted])
    # A process that was killed leaves its trial under way.
    killed = study.ask()
    for one in SPACE:
        killed.suggest_float(one.name, *one.coordinates)
    killed.set_user_attr("process", [proxy_search.socket.gethostname(), 2**22 + 1])

    proxy_search.prepare(search, tmp_path)
    proxy_search.run_local(tmp_path, 6, [Surface()])
    trials = study.get_trials(deepcopy=False)
    assert proxy_search.count(study) == 6
    assert [trial.state.name for trial in trials].count("FAIL") == 2
    failed = [trial.params for trial in trials if trial.state.name == "FAIL"]
    finished = [trial.params for trial in trials if trial.state.name in ("COMPLETE", "PRUNED")]
    assert all(params in finished for params in failed)
    # A record that was cut off, by a full disk, is dropped; one in the middle is not the search's.
    journal = tmp_path / "journal.log"
    records = journal.read_bytes()
    journal.write_bytes(records + records[:30])
    assert len(proxy_search.prepare(search, tmp_path).trials) == len(trials)
    proxy_search.run_local(tmp_path, 7, [Surface()])
    assert proxy_search.count(proxy_search.open_study(tmp_path, 10)) == 7
    journal.write_bytes(records[:30] + b"\n" + records)
    with pytest.raises(DataError, match="no record"):
        proxy_search.prepare(search, tmp_path)
    # Another search does not go into the same folder.
    with pytest.raises(ConfigError, match="another search"):
        proxy_search.prepare(proxy_search.Search(SPACE[:1], small_config()), tmp_path)


def test_a_search_of_another_text_needs_another_folder(tmp_path: Path):
    write_markov_chain(tmp_path / "text", 8_000)
    config = proxy_config(tmp_path)
    search = proxy_search.Search(SPACE[:1], config)
    search.save(tmp_path / "search")
    search.save(tmp_path / "search")  # the control: the same text
    for suffix in (".bin", ".idx", ".json"):
        (tmp_path / f"text{suffix}").unlink(missing_ok=True)
    write_markov_chain(tmp_path / "text", 6_000)
    with pytest.raises(DataError, match="what is finished read another text"):
        search.save(tmp_path / "search")


def in_threads(folder: Path) -> None:
    """Two that search at once, as two processes would: each opens the journal for itself."""
    with ThreadPoolExecutor(2) as pool:
        jobs = [pool.submit(proxy_search.work, str(folder), 8, Surface(), n) for n in range(2)]
        assert sum(job.result() for job in jobs) >= 8


def in_processes(folder: Path) -> None:
    proxy_search.run_local(folder, 8, [Surface(), Surface()])


def by_submitit(folder: Path) -> None:
    """Jobs as Slurm would start them, in processes of this machine."""
    pytest.importorskip("submitit")
    jobs = proxy_search.run_slurm(folder, 8, Surface(), 2, {"timeout_min": 5}, cluster="local")
    for job in jobs:
        job.result()


@pytest.mark.parametrize(
    "run",
    [
        in_threads,
        pytest.param(in_processes, marks=pytest.mark.slow),
        pytest.param(by_submitit, marks=pytest.mark.slow),
    ],
)
def test_two_workers_share_a_search(run: Callable[[Path], None], tmp_path: Path):
    proxy_search.prepare(search_of(), tmp_path)
    run(tmp_path)
    study = proxy_search.open_study(tmp_path, 10)
    assert 8 <= proxy_search.count(study) <= 9
    settings = [tuple(trial.params.values()) for trial in study.get_trials(deepcopy=False)]
    assert len(set(settings)) == len(settings)


def test_the_configuration_itself_is_the_first_trial(tmp_path: Path):
    config = small_config("optimizer.base_lr=0.01", "optimizer.base_init_std=0.02")
    study = proxy_search.prepare(search_of(config), tmp_path)
    proxy_search.run_local(tmp_path, 1, [Surface()])
    (trial,) = study.trials
    own = settings_of(config, SPACE)
    assert from_coordinate("base_lr", trial.params["base_lr"]) == pytest.approx(own["base_lr"])
    assert contains(SPACE, own)


def test_settings_reach_the_configuration_and_leave_the_rest():
    config = small_config(completep={"factors": {"embedding": {"lr": 2.0, "eps": 3.0}}})
    values = {"base_lr": 0.5, "beta2": 0.99, "warmup_fraction": 0.25, "embedding.lr": 4.0}
    changed = with_settings(config, values)
    assert changed.optimizer.base_lr == 0.5 and changed.optimizer.warmup_fraction == 0.25
    assert changed.optimizer.betas == (config.optimizer.betas[0], 0.99)
    assert changed.completep.factors[Role.EMBEDDING].lr == 4.0
    assert changed.completep.factors[Role.EMBEDDING].eps == 3.0
    space = [dimension(f"{name}=0.01:0.9") for name in ("base_lr", "beta2")]
    assert settings_of(changed, space) == {"base_lr": 0.5, "beta2": 0.99}


def test_muons_values_follow_in_their_ratio_or_are_searched_themselves():
    muon = {"type": "muon", "base_lr": 0.01, "muon": {"base_lr": 0.1}}
    config = small_config(optimizer=muon)
    assert with_settings(config, {"base_lr": 0.02}).optimizer.muon.base_lr == pytest.approx(0.2)
    both = {"base_lr": 0.02, "muon.base_lr": 0.3}
    assert with_settings(config, both).optimizer.muon.base_lr == 0.3
    space = [dimension("base_lr=0.001:1"), dimension("muon.base_lr=0.01:1")]
    check_space(space, config)
    assert settings_of(config, space) == {"base_lr": 0.01, "muon.base_lr": 0.1}
    with pytest.raises(ConfigError, match="not Muon"):
        check_space(space, small_config())


@pytest.mark.parametrize(
    ("over", "words"),
    [
        ("base_lrr=1:2", "Did you mean base_lr?"),
        ("base_lr=2:1", "LOW is below HIGH"),
        ("base_lr=0:1", "above 0"),
        ("beta1=0.5:1", "below 1"),
        ("base_lr=1e-3", "NAME=LOW:HIGH"),
        ("base_lr=1e-3:1e38", "float32"),
        ("base_lr=1e-3:1e30,embedding.lr=1:1e10", "all settings at their highest"),
        ("pre_norm.init_std=0.5:2", "never acts"),
        ("embedding.rate=1:2", "cannot be searched"),
    ],
)
def test_a_range_that_no_search_could_use_is_refused(
    over: str, words: str, tmp_path: Path, programs: Programs
):
    save_config(small_config(), tmp_path / "proxy.yaml")
    out = tmp_path / "out"
    ended = programs.run(
        main, "search", tmp_path / "proxy.yaml", "--out", out, "--over", f"beta2=0.9:0.99,{over}"
    )
    assert ended.code == 2 and words in ended.err and not out.exists()


def test_all_that_the_proxy_cannot_be_searched_over_is_said_at_once():
    config = small_config(model={"bias": False, "qkv_bias": False, "qk_norm": False})
    over = ["qk_norm.lr=0.5:2", "hidden_bias.lr=0.5:2", "base_lr=1e-3:1", "base_lr=1e-2:1"]
    with pytest.raises(ConfigError) as refused:
        check_space([dimension(one) for one in over], config)
    for words in ("no QK-norm", "no biases", "given 2 times"):
        assert words in str(refused.value)
    check_space([dimension("base_lr=1e-3:1")], config)


def test_whether_the_best_is_better_is_said_with_the_noise_of_seeds():
    noisy = [(3.0, 2.9), (3.1, 3.2), (2.9, 2.7)]
    clear = [(3.0, 2.9), (3.1, 2.99), (2.9, 2.8)]
    diverged = [(math.inf, 2.9), (3.1, 2.99)]
    verdicts = []
    for losses in (noisy, clear, diverged, [(best, own) for own, best in clear]):
        gains = [own - best for own, best in losses]
        gain = proxy_report.mean_estimate(gains)
        verdicts.append(proxy_report.Comparison(losses, gain).verdict)
    assert verdicts[0] == "not better by more than seed noise"
    assert verdicts[1] == "better by more than seed noise"
    assert verdicts[2] == "a run diverged"
    assert verdicts[3] == "worse by more than seed noise"


def test_the_tool_searches_reports_and_writes_a_proxy_that_loads(
    tmp_path: Path, programs: Programs
):
    write_markov_chain(tmp_path / "text")
    config = proxy_config(tmp_path, training={"train_steps": 4})
    save_config(config, tmp_path / "proxy.yaml")
    out = tmp_path / "search"
    words = ["search", tmp_path / "proxy.yaml", "--out", out, "--over", "base_lr=1e-3:1e-2"]
    words += ["--trials", "3", "--workers", "1"]
    assert "3 to run" in programs.output(main, *words)
    assert "0 to run" in programs.output(main, *words)

    # The runs of the report, in this process: its own would be started for them.
    search = proxy_search.Search.load(out)
    best = proxy_report.best_of(proxy_report.trials_of(search, out))
    for pair in proxy_report.points_of(search, proxy_report.rounded(best.settings), 2):
        for point in pair:
            path = sweep.result_path(out, point)
            path.parent.mkdir(exist_ok=True)
            values = point.config.model_dump(mode="json")
            sweep.run_and_keep(point.settings(), values, str(path), "cpu")
    text = programs.output(main, "report", out, "--seeds", "2", "--workers", "1", "--json")
    answer = json.loads(text)
    assert answer["trials"] == 3 and answer["verdict"].endswith("seed noise")
    found = load_config(out / "proxy.yaml")
    assert found.optimizer.base_lr == answer["best"]["base_lr"]
    assert "own" in (out / "report.md").read_text()

"""The search at the proxy: trials by Optuna, in a journal on a shared file, without a server.

Any number of processes, on any number of machines that see the folder, ask the journal for settings
and tell it losses. A search that was stopped goes on where it was.
"""

from __future__ import annotations

import json
import math
import os
import socket
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import as_completed
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_completep.config import config_from_mapping
from megatron_completep.config.json_text import read_json_object
from megatron_completep.config.schema import Config
from megatron_completep.errors import ConfigError, DataError, UserError
from megatron_completep.files import write_whole
from megatron_completep.instruments.search_space import (
    Dimension,
    contains,
    from_coordinate,
    settings_of,
    to_coordinate,
    with_settings,
)
from megatron_completep.instruments.sweep import loss_of, run_point, slurm_executor
from megatron_completep.instruments.swept_text import check_text, text_of
from megatron_completep.instruments.trial import change
from megatron_completep.instruments.workers import processes
from megatron_completep.parallel.context import choose_device

Settings = Mapping[str, float]
Watch = Callable[[int, float], None]  # a step and its loss; raises where the trial is given up
Objective = Callable[[Settings, Watch], float]  # the loss of a whole run; infinite: it diverged
Say = Callable[[str], None]

STUDY = "proxy"
REPORTS = 20  # a run: how often a trial's loss is compared with the others'
RANDOM_TRIALS = 10  # before the model of the losses is asked
# A trial is given up where its loss is above the median of the others', after a fifth of the run:
# earlier, the warm-up decides.
FIRST_PRUNED_SHARE = 0.2


def optuna_package() -> Any:
    """The package, which is optional. Raises UserError where it is not installed."""
    try:
        import optuna
    except ImportError as error:
        raise UserError(
            "the search needs the package optuna: pip install 'megatron-completep[tune]'."
        ) from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


@dataclass(frozen=True)
class Search:
    """What is searched, as it stands in search.json; part of it are the proxy's settings."""

    space: tuple[Dimension, ...]
    config: Config
    seed: int = 0

    def save(self, folder: Path) -> None:
        """Write search.json.

        Raises ConfigError where the folder holds another search, and DataError where its trials
        are of another text.
        """
        content: dict[str, Any] = {
            "space": [asdict(one) for one in self.space],
            "config": self.config.model_dump(mode="json"),
            "seed": self.seed,
        }
        path = folder / "search.json"
        if path.exists():
            kept = read_json_object(path)
            text = kept.pop("text", None)
            if kept != json.loads(json.dumps(content)):
                raise ConfigError(
                    f"{path}: another search, with other ranges or another configuration. "
                    "Give the same again, or choose another folder."
                )
            check_text([(path, text)])
            return
        content["text"] = text_of(self.config)
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(content, indent=1).encode())

    @classmethod
    def load(cls, folder: Path) -> Search:
        """The search of a folder. Raises DataError where there is none."""
        path = folder / "search.json"
        try:
            content = read_json_object(path)
            space = tuple(Dimension(**one) for one in content["space"])
            return cls(space, config_from_mapping(content["config"]), int(content["seed"]))
        except (DataError, KeyError, TypeError, ValueError) as error:
            raise DataError(
                f"{path}: not a search ({error}). Make one with tools/tune_proxy.py search."
            ) from None


@dataclass(frozen=True)
class TrainProxy:
    """The objective: train the proxy with a trial's settings. Is sent to processes."""

    config_values: dict[str, Any]
    device: str

    @classmethod
    def of(cls, config: Config, device: str) -> TrainProxy:
        """For short runs, which are evaluated at their ends alone."""
        return cls(short_run(config).model_dump(mode="json"), device)

    def __call__(self, settings: Settings, watch: Watch) -> float:
        config = with_settings(config_from_mapping(self.config_values), settings)
        device = self.device if ":" in self.device else str(choose_device(self.device, 0))
        every = max(1, config.training.train_steps // REPORTS)
        recent: list[float] = []

        def watch_means(step: int, loss: float) -> None:
            # Single batches are noisy.
            recent.append(loss)
            if step % every == 0:
                watch(step, sum(recent) / len(recent))
                recent.clear()

        return loss_of(run_point(config, device, watch_means))


def short_run(config: Config) -> Config:
    """The configuration of a trial, which is evaluated at its end."""
    return change(config, training={"validation_interval": None, "stop_at_step": None})


def open_study(folder: Path, steps: int, seed: int = 0) -> Any:
    """The study of a folder, made where there is none. steps: of a run, for giving up.

    Raises DataError if the journal cannot be read.
    """
    optuna = optuna_package()
    path = folder / "journal.log"
    backend = optuna.storages.journal.JournalFileBackend(str(path))
    try:
        storage = optuna.storages.JournalStorage(backend)
    except ValueError as error:
        raise DataError(
            f"{path}: a line is no record ({error}). Delete what was not written by the search, or "
            "choose another folder."
        ) from None
    return optuna.create_study(
        study_name=STUDY,
        storage=storage,
        sampler=optuna.samplers.TPESampler(
            n_startup_trials=RANDOM_TRIALS, multivariate=True, constant_liar=True, seed=seed
        ),
        pruner=optuna.pruners.MedianPruner(
            n_startup_trials=RANDOM_TRIALS,
            n_warmup_steps=math.ceil(FIRST_PRUNED_SHARE * steps),
        ),
        direction="minimize",
        load_if_exists=True,
    )


def work(folder: str, trials: int, objective: Objective, number: int) -> int:
    """Run trials until the study has `trials` of them; how many this process ran.

    number: of this process among those that search, for its random numbers.
    """
    torch.set_num_threads(1)
    optuna = optuna_package()
    search = Search.load(Path(folder))
    steps = search.config.training.train_steps
    study = open_study(Path(folder), steps, search.seed)
    # Processes and later starts must not draw the same settings again.
    study.sampler = optuna.samplers.TPESampler(
        n_startup_trials=RANDOM_TRIALS,
        multivariate=True,
        constant_liar=True,
        seed=search.seed + 7919 * number + len(study.trials),
    )
    done = 0
    while count(study) < trials:
        _run_trial(study, search.space, objective)
        done += 1
    return done


def count(study: Any) -> int:
    """Trials that are finished, given up or under way."""
    states = [trial.state.name for trial in study.get_trials(deepcopy=False)]
    return len(states) - states.count("FAIL") - states.count("WAITING")


def _run_trial(study: Any, space: Sequence[Dimension], objective: Objective) -> None:
    optuna = optuna_package()
    trial = study.ask()
    trial.set_user_attr("process", [socket.gethostname(), os.getpid()])
    settings = {}
    for one in space:
        coordinate = trial.suggest_float(one.name, *one.coordinates)
        settings[one.name] = from_coordinate(one.name, coordinate)

    def watch(step: int, loss: float) -> None:
        trial.report(loss, step)
        if trial.should_prune():
            raise optuna.TrialPruned

    states = optuna.trial.TrialState
    try:
        loss = objective(settings, watch)
    except optuna.TrialPruned:
        study.tell(trial, state=states.PRUNED)
        return
    except BaseException:
        # Ctrl-C, or an error: the settings are tried again when the search goes on.
        study.enqueue_trial(trial.params)
        study.tell(trial, state=states.FAIL)
        raise
    if math.isfinite(loss):
        study.tell(trial, loss)
        return
    # A loss without a number teaches the model nothing but that it was given up.
    trial.set_user_attr("diverged", True)
    study.tell(trial, state=states.PRUNED)


def prepare(search: Search, folder: Path) -> Any:
    """Make or open the study of a folder. The first trial is the configuration as it stands.

    Trials of processes of this machine that are gone are queued again.
    """
    optuna_package()
    search.save(folder)
    _drop_cut_record(folder / "journal.log")
    study = open_study(folder, search.config.training.train_steps, search.seed)
    own = settings_of(search.config, search.space)
    if not study.trials and contains(search.space, own):
        study.enqueue_trial({name: to_coordinate(name, value) for name, value in own.items()})
    _queue_abandoned(study)
    return study


def _drop_cut_record(path: Path) -> None:
    """Remove a last record that was not written to its end, as a full disk leaves it.

    The next record would be written behind it on the same line, and neither could be read.
    """
    if not path.exists():
        return
    lock = optuna_package().storages.journal.JournalFileSymlinkLock(str(path))
    lock.acquire()
    try:
        content = path.read_bytes()
        # No other process is writing: it would hold the lock.
        if not content.endswith(b"\n"):
            os.truncate(path, content.rfind(b"\n") + 1)
    finally:
        lock.release()


def _queue_abandoned(study: Any) -> None:
    states = optuna_package().trial.TrialState
    for trial in study.get_trials(deepcopy=False, states=(states.RUNNING,)):
        host, process = trial.user_attrs.get("process", ("", 0))
        if host != socket.gethostname() or _is_alive(process):
            continue
        study.enqueue_trial(trial.params)
        study.tell(trial.number, state=states.FAIL)


def _is_alive(process: int) -> bool:
    with suppress(PermissionError):
        try:
            os.kill(process, 0)
        except ProcessLookupError:
            return False
    return True


def run_local(
    folder: Path, trials: int, objectives: Sequence[Objective], say: Say = lambda text: None
) -> None:
    """Search in as many processes as there are objectives; one runs in this process."""
    if len(objectives) == 1:
        threads = torch.get_num_threads()
        try:
            work(str(folder), trials, objectives[0], 0)
        finally:
            torch.set_num_threads(threads)
        return
    with processes(len(objectives)) as pool:
        jobs = []
        for number, objective in enumerate(objectives):
            jobs.append(pool.submit(work, str(folder), trials, objective, number))
        for job in as_completed(jobs):
            say(f"a worker ran {job.result()} trials")


def run_slurm(
    folder: Path,
    trials: int,
    objective: Objective,
    workers: int,
    options: dict[str, Any],
    cluster: str = "slurm",
) -> list[Any]:
    """Submit workers to Slurm as one array job; returns submitit's jobs.

    Raises UserError where submitit is not installed.
    """
    executor = slurm_executor(folder, "tune_proxy", options, cluster)
    columns = ([str(folder)] * workers, [trials] * workers, [objective] * workers, range(workers))
    return list(executor.map_array(work, *columns))

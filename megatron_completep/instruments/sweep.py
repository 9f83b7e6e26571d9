"""Many small runs over a grid of learning rates, shapes and parameterizations.

Each run's result is kept in a file of its own, named by a hash of the configuration, so that no run
is repeated.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import as_completed
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import torch

from megatron_completep.completep import table_of
from megatron_completep.completep.tau import timescales
from megatron_completep.config import config_from_mapping
from megatron_completep.config.derived import tokens_per_step
from megatron_completep.config.json_text import read_json_object
from megatron_completep.config.schema import Config
from megatron_completep.errors import ConfigError, DataError, UserError
from megatron_completep.files import write_whole
from megatron_completep.instruments.expert_taps import LoadTaps
from megatron_completep.instruments.swept_text import Text, check_text, text_of
from megatron_completep.instruments.trial import (
    PARAMETERIZATIONS,
    Trial,
    change,
    following,
    read_batches,
    reshape,
    under,
    with_base,
    with_seed,
)
from megatron_completep.instruments.workers import processes
from megatron_completep.model.flops import training_flops_per_token
from megatron_completep.parallel.context import ParallelContext, choose_device
from megatron_completep.roles import Role
from megatron_completep.training.build import build_validation

FORMAT = 1  # of a point's file; part of its key, so that a change of meaning runs everything anew
WORKERS_PER_GPU = 6  # small runs leave a GPU idle most of the time; several processes share it
SETTLED_PART = 1 / 3  # of the steps, at the end: balancing takes its time
LAST_PART = 0.1  # of the steps: their mean training loss is the figure where nothing is held out
CURVE_PARTS = 100  # of a run: the means that a result keeps of its training losses
Say = Callable[[str], None]


@dataclass(frozen=True)
class Point:
    """One run: what is varied, and the whole configuration that follows."""

    parameterization: str
    hidden_size: int
    num_layers: int
    train_steps: int
    base_weight_decay: float
    base_init_std: float
    base_lr: float
    seed: int
    config: Config
    num_experts: int = 0  # 0: without any

    @property
    def key(self) -> str:
        """The hash of everything that the result depends on."""
        unrelated: Any = {
            "checkpoint": True,
            "logging": True,
            "training": {"output_dir", "cpu_threads"},
        }
        # Settings at their defaults are left out, so that points stay done when a later version
        # adds a setting.
        settings = self.config.model_dump(mode="json", exclude=unrelated, exclude_defaults=True)
        content = json.dumps([FORMAT, settings], sort_keys=True)
        return hashlib.blake2b(content.encode(), digest_size=12).hexdigest()

    @cached_property
    def tau(self) -> float:
        """The time scale of hidden weights' decay (`completep.tau`); infinite without decay."""
        config = self.config
        for scale in timescales(config, table_of(config)):
            if scale.role is Role.HIDDEN_WEIGHT:
                return scale.run
        return math.inf

    def settings(self) -> dict[str, Any]:
        """What is varied, for tables."""
        names = (field.name for field in fields(self))
        return {name: getattr(self, name) for name in names if name != "config"}


@dataclass(frozen=True)
class Grid:
    """The lists whose product is run; an empty one means the configuration's own value."""

    learning_rates: Sequence[float]
    depths: Sequence[int] = ()
    widths: Sequence[int] = ()
    parameterizations: Sequence[str] = ("completep",)
    weight_decays: Sequence[float] = ()
    init_stds: Sequence[float] = ()
    train_steps: Sequence[int] = ()
    seeds: int = 3
    num_experts: Sequence[int] = ()  # a token goes to the same share of them

    def points(self, config: Config) -> list[Point]:
        """All runs, one seed after the other, so that a sweep that is under way can be reported.

        Raises ConfigError for an unknown parameterization or a shape that is not allowed.
        """
        unknown = [name for name in self.parameterizations if name not in PARAMETERIZATIONS]
        if unknown:
            raise ConfigError(
                f"parameterization {', '.join(unknown)} is not known. "
                f"Use some of: {', '.join(PARAMETERIZATIONS)}."
            )
        config = with_base(config)
        moe = config.model.moe
        # The last axis varies fastest: the learning rates of a shape are run in sequence.
        axes = (
            range(self.seeds),
            self.depths or (config.model.num_layers,),
            self.widths or (config.model.hidden_size,),
            self.num_experts or (0 if moe is None else moe.num_experts,),
            self.train_steps or (config.training.train_steps,),
            self.weight_decays or (config.optimizer.base_weight_decay,),
            self.init_stds or (config.optimizer.base_init_std,),
            self.parameterizations,
            sorted(self.learning_rates),
        )
        return [_point(config, *coordinates) for coordinates in product(*axes)]


def _point(
    config: Config,
    seed: int,
    depth: int,
    width: int,
    num_experts: int,
    steps: int,
    decay: float,
    std: float,
    rule: str,
    rate: float,
) -> Point:
    """One point; the arguments after `config` are in the order of the grid's axes."""
    shaped = under(with_seed(reshape(config, width, depth, num_experts), seed), rule)
    # At the base depth the depth rules coincide: with one configuration they share one run.
    if depth == shaped.completep.base_num_layers and rule != "sp":
        shaped = under(shaped, "completep")
    base_values = {"base_lr": rate, "base_weight_decay": decay, "base_init_std": std}
    point_config = change(
        shaped,
        optimizer=following(shaped.optimizer, base_values),
        training={"train_steps": steps, "validation_interval": None, "stop_at_step": None},
    )
    return Point(rule, width, depth, steps, decay, std, rate, seed, point_config, num_experts)


def octaves(low: float, high: float, per_octave: int = 2) -> list[float]:
    """Powers of two from 2^low to 2^high, `per_octave` of them an octave."""
    count = round((high - low) * per_octave)
    return [2.0 ** (low + index / per_octave) for index in range(count + 1)]


def run_point(
    config: Config, device: str = "cpu", watch: Callable[[int, float], None] | None = None
) -> dict[str, Any]:
    """Train one model to the end of its schedule and evaluate it; nothing is written.

    `watch` gets the number and the loss of every step; what it raises ends the run.

    Returns validation_loss (None without held-out data), train_loss (mean over the last steps),
    expert_load (the largest load of an expert over the mean, of a step's tokens: mean over the last
    third of the steps, of the layer where it is largest; None without experts), diverged, steps,
    tokens, flops, seconds, and curve: the mean training losses of up to CURVE_PARTS equal parts of
    the run.
    """
    started = time.perf_counter()
    context = ParallelContext.single(device)
    trial = Trial.build(config, context)
    train_steps = config.training.train_steps
    losses: list[float] = []
    loads = LoadTaps(trial.chunks)
    for step, micro_batches in enumerate(read_batches(config, context, train_steps), start=1):
        with loads.recording():
            losses.append(trial.step.run(micro_batches, step).read().loss)
        # Nothing that follows a loss without a number could be compared.
        if not math.isfinite(losses[-1]):
            break
        if watch is not None:
            watch(step, losses[-1])

    diverged = not math.isfinite(losses[-1])
    validation_loss: float | None = None
    train_loss: float | None = None
    if not diverged:
        validation = build_validation(config, context)
        if validation is not None:
            validation_loss = trial.step.evaluate(validation)
        # The loss of single batches is noisy, so the figure is the mean of several.
        final_losses = losses[-max(1, round(LAST_PART * train_steps)) :]
        train_loss = sum(final_losses) / len(final_losses)
    tokens = len(losses) * tokens_per_step(config)
    return {
        "validation_loss": validation_loss,
        "train_loss": train_loss,
        "expert_load": loads.largest(SETTLED_PART),
        "diverged": diverged,
        "steps": len(losses),
        "tokens": tokens,
        "flops": tokens * training_flops_per_token(config.model),
        "seconds": time.perf_counter() - started,
        "curve": curve_of(losses),
    }


def curve_of(losses: Sequence[float]) -> list[float]:
    """The means of up to CURVE_PARTS equal parts of a run, in order."""
    parts = min(CURVE_PARTS, len(losses))
    bounds = [part * len(losses) // parts for part in range(parts + 1)]
    means = []
    for start, stop in pairwise(bounds):
        means.append(sum(losses[start:stop]) / (stop - start))
    return means


def run_and_keep(
    settings: dict[str, Any], config_values: dict[str, Any], path: str, device: str
) -> float:
    """Run one point and write its file in one move; returns its loss.

    settings: what is varied, for the file. config_values: the configuration as plain data, so that
    all arguments can be sent to another process. device: one device, or `auto` and `cuda`, which
    are looked up here, since a Slurm job sees other devices than the machine that submits it.
    """
    # There are as many workers as cores, and more threads would fight over them.
    torch.set_num_threads(1)
    one_device = device if ":" in device else str(choose_device(device, 0))
    config = config_from_mapping(config_values)
    text = text_of(config)
    result = run_point(config, one_device)
    content = json.dumps({**settings, **result, "text": text, "config": config_values})
    write_whole(path, content.encode())
    return loss_of(result)


def loss_of(result: dict[str, Any]) -> float:
    """The loss by which points are compared; infinite for a run that diverged.

    It is the held-out loss where there is one, else the training loss of the last steps.
    """
    loss = result["validation_loss"]
    if loss is None:
        loss = result["train_loss"]
    return math.inf if result["diverged"] or loss is None else float(loss)


def result_path(folder: Path, point: Point) -> Path:
    """The file of a point's result in a sweep's folder."""
    return folder / "points" / f"{point.key}.json"


def missing(points: Sequence[Point], folder: Path) -> list[Point]:
    """The points without a file, each configuration once."""
    by_key = {point.key: point for point in points if not result_path(folder, point).exists()}
    return list(by_key.values())


def default_workers(device: str) -> int:
    """One worker a core, or WORKERS_PER_GPU a GPU."""
    if device.startswith("cuda"):
        return WORKERS_PER_GPU * max(1, torch.cuda.device_count())
    return max(1, len(os.sched_getaffinity(0)))


def run_local(points: Sequence[Point], folder: Path, workers: int, device: str, say: Say) -> None:
    """Run the missing points in `workers` processes of one thread each.

    On GPUs the points are dealt out in turn. `say` gets one line a finished point. Raises DataError
    where finished ones are of another text.
    """
    check_text(_texts(folder))
    missing_points = missing(points, folder)
    count = len(missing_points)
    (folder / "points").mkdir(parents=True, exist_ok=True)
    say(f"{len(points)} points, {count} to run, {workers} at a time")
    if not missing_points:
        return

    # Each worker trains on one device: small models gain nothing from several.
    gpus = torch.cuda.device_count() if device.startswith("cuda") else 0
    started = time.perf_counter()
    with processes(min(workers, count)) as pool:
        jobs = {}
        for number, point in enumerate(missing_points):
            one_device = f"cuda:{number % gpus}" if gpus else "cpu"
            job = pool.submit(run_and_keep, *_job_arguments(point, folder), one_device)
            jobs[job] = point
        for done, job in enumerate(as_completed(jobs), 1):
            say(f"[{done}/{count}] {describe(jobs[job])}: loss {job.result():.4f}")
    say(f"{count} points in {time.perf_counter() - started:.0f} s")


def _job_arguments(point: Point, folder: Path) -> tuple[dict[str, Any], dict[str, Any], str]:
    """The arguments of run_and_keep before the device, as plain data."""
    config_values = point.config.model_dump(mode="json")
    return point.settings(), config_values, str(result_path(folder, point))


def run_slurm(
    points: Sequence[Point],
    folder: Path,
    options: dict[str, Any],
    device: str,
    cluster: str = "slurm",
    name: str = "lr_transfer",
) -> list[Any]:
    """Submit the missing points to Slurm as one array job; returns submitit's jobs.

    The points' files appear as the jobs end. Raises UserError where submitit is not installed, and
    DataError as `run_local` does.
    """
    check_text(_texts(folder))
    rows = [(*_job_arguments(point, folder), device) for point in missing(points, folder)]
    (folder / "points").mkdir(parents=True, exist_ok=True)
    executor = slurm_executor(folder, name, options, cluster)
    if not rows:
        return []
    # map_array takes one sequence an argument of the function, as map does.
    columns = zip(*rows, strict=True)
    return list(executor.map_array(run_and_keep, *columns))


def slurm_executor(folder: Path, name: str, options: dict[str, Any], cluster: str = "slurm") -> Any:
    """submitit's executor, whose files go to `folder`/slurm.

    Raises UserError without submitit or Slurm, and for options that submitit does not know.
    """
    # The package is optional, so it is imported only here.
    try:
        import submitit
    except ImportError as error:
        raise UserError("Slurm jobs need the package submitit: pip install submitit.") from error
    try:
        executor = submitit.AutoExecutor(folder=str(folder / "slurm"), cluster=cluster)
        executor.update_parameters(name=name, **options)
    except (AssertionError, NameError, RuntimeError, TypeError, ValueError) as error:
        # Its own words: "Could not detect srun", or the names of all options there are.
        settings_text = ", ".join(f"{key}={value}" for key, value in options.items())
        raise UserError(f"--slurm {settings_text}: submitit refuses it: {error}") from error
    return executor


def describe(point: Point) -> str:
    """One line on a point, with the time scale of its weight decay."""
    shape = f"{point.parameterization} {point.num_layers} x {point.hidden_size}"
    if point.num_experts:
        shape += f", {point.num_experts} experts"
    rate = f"lr 2^{math.log2(point.base_lr):.3g}"
    decay = ""
    if point.config.optimizer.weight_decay_rule == "tau":
        decay = f", tau {point.tau:.3g}"
    elif point.base_weight_decay:
        decay = f", wd {point.base_weight_decay:g} (tau {point.tau:.3g})"
    return f"{shape}, {rate}{decay}, {point.train_steps} steps, seed {point.seed}"


def read_results(points: Sequence[Point], folder: Path) -> Iterator[tuple[Point, dict[str, Any]]]:
    """The points that are done, with their results. Raises DataError for a file that is none."""
    for point in points:
        path = result_path(folder, point)
        if not path.exists():
            continue
        try:
            result = read_json_object(path, finite=False)
            # A file without the figures of the analysis is refused here, where its path is known.
            loss_of(result)
            float(result["flops"])
        except (DataError, KeyError, TypeError, ValueError) as error:
            raise DataError(
                f"{path}: not a result: {error}. Remove it; the next sweep runs the point again."
            ) from None
        yield point, result


def _texts(folder: Path) -> Iterator[tuple[Path, Text | None]]:
    """Path and text of every result of a folder, whichever points are to be run beside them."""
    for path in sorted((folder / "points").glob("*.json")):
        try:
            yield path, read_json_object(path, finite=False).get("text")
        except DataError:
            continue  # the report refuses the file, and says what to do


def save_grid(grid: Grid, config: Config, folder: Path) -> None:
    """Write what `report` needs to find the points; a further grid is added to those there are.

    Raises DataError where the file that is there is no sweep, or cannot be replaced; it then stays
    as it is.
    """
    path = folder / "sweep.json"
    grids = _grids(path) if path.exists() else []
    entry = {"grid": asdict(grid), "config": config.model_dump(mode="json")}
    # As it is read back, with lists in place of tuples: the same sweep started again adds nothing.
    entry_in_json = json.loads(json.dumps(entry))
    if entry_in_json not in grids:
        grids.append(entry_in_json)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps({"grids": grids}, indent=1).encode())
    except OSError as error:
        raise DataError(
            f"{path} cannot be written: {error.strerror}. "
            "Choose another folder, or free some space."
        ) from None


def _grids(path: Path) -> list[dict[str, Any]]:
    """The grids of a sweep.json. Raises DataError for any other file."""
    try:
        grids = read_json_object(path).get("grids")
    except DataError as error:
        raise DataError(f"{error} Restore the file, or sweep into another folder.") from None
    if not isinstance(grids, list) or not all(isinstance(entry, dict) for entry in grids):
        raise DataError(
            f"{path}: holds no list of grids. Restore the file, or sweep into another folder."
        )
    return grids


def load_points(folder: Path) -> list[Point]:
    """All points of all grids of a folder, each once. Raises DataError where there is no sweep."""
    path = folder / "sweep.json"
    points: dict[tuple[str, str], Point] = {}
    try:
        for entry in _grids(path):
            grid = Grid(**entry["grid"])
            for point in grid.points(config_from_mapping(entry["config"])):
                # The key alone would merge the rules that share a run at the base depth.
                points[point.parameterization, point.key] = point
    except (DataError, KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"{path}: not a sweep ({error}). Make one with tools/lr_transfer.py sweep."
        ) from None
    return list(points.values())

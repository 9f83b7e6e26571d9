"""Many small runs over a grid of learning rates, shapes and parameterizations; each is kept in a file of its own and never run twice."""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import as_completed
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch

from megatron_completep.config import config_from_mapping
from megatron_completep.config.derived import tokens_per_step
from megatron_completep.config.json_text import read_json_object
from megatron_completep.config.schema import Config
from megatron_completep.errors import ConfigError, DataError, UserError
from megatron_completep.files import write_whole
from megatron_completep.instruments.trial import (
    PARAMETERIZATIONS,
    Trial,
    change,
    read_batches,
    reshape,
    under,
    with_base,
    with_seed,
)
from megatron_completep.instruments.workers import processes
from megatron_completep.model.flops import training_flops_per_token
from megatron_completep.parallel.context import ParallelContext, choose_device
from megatron_completep.training.build import build_validation

FORMAT = 1  # of a point's file; part of its key, so that a change of meaning runs everything anew
WORKERS_PER_GPU = 6  # small runs leave a GPU idle most of the time; several processes share it
LAST_PART = 0.1  # of the steps: their mean training loss is the figure where nothing is held out
Say = Callable[[str], None]


@dataclass(frozen=True)
class Point:
    """One run: what was varied, and the whole configuration that follows."""

    parameterization: str
    hidden_size: int
    num_layers: int
    train_steps: int
    base_weight_decay: float
    base_init_std: float
    base_lr: float
    seed: int
    config: Config

    @property
    def key(self) -> str:
        """The hash of everything that the result depends on. Settings at their defaults are left out, so that a setting which a later
        version adds runs nothing anew."""
        unrelated: Any = {
            "checkpoint": True,
            "logging": True,
            "training": {"output_dir", "cpu_threads"},
        }
        kept = self.config.model_dump(mode="json", exclude=unrelated, exclude_defaults=True)
        return hashlib.blake2b(
            json.dumps([FORMAT, kept], sort_keys=True).encode(), digest_size=12
        ).hexdigest()

    @property
    def tau(self) -> float:
        """Time scale of weight decay in runs: 1 / (lr * wd * steps); infinite without decay."""
        decay = self.base_lr * self.base_weight_decay * self.train_steps
        return 1 / decay if decay else math.inf

    def settings(self) -> dict[str, Any]:
        """What was varied, for tables."""
        return {name: value for name, value in vars(self).items() if name != "config"}


@dataclass(frozen=True)
class Grid:
    """The product of all of these is run; an empty list means the configuration's own value."""

    learning_rates: Sequence[float]
    depths: Sequence[int] = ()
    widths: Sequence[int] = ()
    parameterizations: Sequence[str] = ("completep",)
    weight_decays: Sequence[float] = ()
    init_stds: Sequence[float] = ()
    train_steps: Sequence[int] = ()
    seeds: int = 3

    def points(self, config: Config) -> list[Point]:
        """All runs, a whole seed after the other, so that what is done early can already be reported."""
        unknown = [name for name in self.parameterizations if name not in PARAMETERIZATIONS]
        if unknown:
            raise ConfigError(
                f"parameterization {', '.join(unknown)} is not known. Use some of: {', '.join(PARAMETERIZATIONS)}."
            )
        config = with_base(config)
        axes = (
            range(self.seeds),
            self.depths or (config.model.num_layers,),
            self.widths or (config.model.hidden_size,),
            self.train_steps or (config.training.train_steps,),
            self.weight_decays or (config.optimizer.base_weight_decay,),
            self.init_stds or (config.optimizer.base_init_std,),
            self.parameterizations,
            sorted(self.learning_rates),
        )
        return [_point(config, *values) for values in product(*axes)]


def _point(
    config: Config,
    seed: int,
    depth: int,
    width: int,
    steps: int,
    decay: float,
    std: float,
    rule: str,
    rate: float,
) -> Point:
    shaped = under(with_seed(reshape(config, width, depth), seed), rule)
    if depth == shaped.completep.base_num_layers and rule != "sp":
        shaped = under(
            shaped, "completep"
        )  # at the base depth the depth rules coincide: run it once
    changed = change(
        shaped,
        optimizer={"base_lr": rate, "base_weight_decay": decay, "base_init_std": std},
        training={"train_steps": steps, "validation_interval": None, "stop_at_step": None},
    )
    return Point(rule, width, depth, steps, decay, std, rate, seed, changed)


def octaves(low: float, high: float, per_octave: int = 2) -> list[float]:
    """Powers of two from low to high, `per_octave` of them an octave. low and high are exponents: -10, -5."""
    count = round((high - low) * per_octave)
    return [2.0 ** (low + index / per_octave) for index in range(count + 1)]


def run_point(config: Config, device: str = "cpu") -> dict[str, Any]:
    """Train one model from the beginning to the end of its schedule and evaluate it; nothing is written.

    Returns validation_loss (null without held-out data), train_loss (mean over the last steps), diverged, steps, tokens, flops, seconds.
    """
    started = time.perf_counter()
    context = ParallelContext.single(device)
    trial = Trial.build(config, context)
    steps, losses = config.training.train_steps, []
    for number, batches in enumerate(read_batches(config, context, steps), 1):
        losses.append(trial.step.run(batches, number).read().loss)
        if not math.isfinite(losses[-1]):
            break
    diverged = not math.isfinite(losses[-1])
    validation = None if diverged else build_validation(config, context)
    tokens = len(losses) * tokens_per_step(config)
    last = losses[-max(1, round(LAST_PART * steps)) :]
    return {
        "validation_loss": None if validation is None else trial.step.evaluate(validation),
        "train_loss": None if diverged else sum(last) / len(last),
        "diverged": diverged,
        "steps": len(losses),
        "tokens": tokens,
        "flops": tokens * training_flops_per_token(config.model),
        "seconds": time.perf_counter() - started,
    }


def run_and_keep(settings: dict[str, Any], values: dict[str, Any], path: str, device: str) -> float:
    """Run one point and write its file in one move; returns its loss. Arguments are plain, so that they travel between processes.

    device: one device, or `auto` and `cuda`, which are looked up here: a Slurm job sees other devices than the machine that submits it.
    """
    torch.set_num_threads(1)
    here = device if ":" in device else str(choose_device(device, 0))
    result = run_point(config_from_mapping(values), here)
    write_whole(path, json.dumps({**settings, **result, "config": values}).encode())
    return loss_of(result)


def loss_of(result: dict[str, Any]) -> float:
    """Held-out loss where there is one, else the training loss of the last steps; infinite for a run that diverged."""
    loss = (
        result["validation_loss"] if result["validation_loss"] is not None else result["train_loss"]
    )
    return math.inf if result["diverged"] or loss is None else float(loss)


def result_path(folder: Path, point: Point) -> Path:
    return folder / "points" / f"{point.key}.json"


def missing(points: Sequence[Point], folder: Path) -> list[Point]:
    """Points without a file, each configuration once."""
    left = {point.key: point for point in points if not result_path(folder, point).exists()}
    return list(left.values())


def default_workers(device: str) -> int:
    """As many as fit: one a core, or several a GPU."""
    if device.startswith("cuda"):
        return WORKERS_PER_GPU * max(1, torch.cuda.device_count())
    return max(1, len(os.sched_getaffinity(0)))


def run_local(points: Sequence[Point], folder: Path, workers: int, device: str, say: Say) -> None:
    """Run what is missing in `workers` processes of one thread each; on GPUs they are dealt out in turn."""
    left = missing(points, folder)
    (folder / "points").mkdir(parents=True, exist_ok=True)
    say(f"{len(points)} points, {len(left)} to run, {workers} at a time")
    if not left:
        return
    gpus = torch.cuda.device_count() if device.startswith("cuda") else 0
    started = time.perf_counter()
    with processes(min(workers, len(left))) as pool:
        futures = {}
        for number, point in enumerate(left):
            where = f"cuda:{number % gpus}" if gpus else "cpu"
            job = pool.submit(
                run_and_keep,
                point.settings(),
                point.config.model_dump(mode="json"),
                str(result_path(folder, point)),
                where,
            )
            futures[job] = point
        for done, job in enumerate(as_completed(futures), 1):
            say(f"[{done}/{len(left)}] {describe(futures[job])}: loss {job.result():.4f}")
    say(f"{len(left)} points in {time.perf_counter() - started:.0f} s")


def run_slurm(
    points: Sequence[Point],
    folder: Path,
    options: dict[str, Any],
    device: str,
    cluster: str = "slurm",
) -> list[Any]:
    """Hand what is missing to Slurm as one array job; returns submitit's jobs. The files appear as the jobs end."""
    try:
        import submitit
    except ImportError as error:
        raise UserError("Slurm jobs need the package submitit: pip install submitit.") from error
    left = missing(points, folder)
    (folder / "points").mkdir(parents=True, exist_ok=True)
    executor = submitit.AutoExecutor(folder=str(folder / "slurm"), cluster=cluster)
    executor.update_parameters(name="lr_transfer", **options)
    rows = [
        (p.settings(), p.config.model_dump(mode="json"), str(result_path(folder, p)), device)
        for p in left
    ]
    return list(executor.map_array(run_and_keep, *zip(*rows, strict=True))) if rows else []


def describe(point: Point) -> str:
    """One line of what a point is, with the time scale of its weight decay."""
    decay = (
        f", wd {point.base_weight_decay:g} (tau {point.tau:.3g})" if point.base_weight_decay else ""
    )
    rate = f"lr 2^{math.log2(point.base_lr):.3g}"
    return f"{point.parameterization} {point.num_layers} x {point.hidden_size}, {rate}{decay}, {point.train_steps} steps, seed {point.seed}"


def read_results(points: Sequence[Point], folder: Path) -> Iterator[tuple[Point, dict[str, Any]]]:
    """Points that are done, with their results; DataError for a file that is no result."""
    for point in points:
        path = result_path(folder, point)
        if not path.exists():
            continue
        try:
            result = read_json_object(path, finite=False)
            loss_of(result), float(result["flops"])
        except (DataError, KeyError, TypeError, ValueError) as error:
            raise DataError(
                f"{path}: not a result: {error}. Remove it; the next sweep runs the point again."
            ) from None
        yield point, result


def save_grid(grid: Grid, config: Config, folder: Path) -> None:
    """What `report` needs to find the points again; another grid in the same folder is added to the first.

    Raises DataError: the file that is there is no sweep, or cannot be replaced. It stays as it is then.
    """
    path = folder / "sweep.json"
    grids = _grids(path) if path.exists() else []
    entry = {"grid": asdict(grid), "config": config.model_dump(mode="json")}
    if entry not in grids:
        grids.append(json.loads(json.dumps(entry)))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps({"grids": grids}, indent=1).encode())
    except OSError as error:
        raise DataError(
            f"{path} cannot be written: {error.strerror}. Choose another folder, or free some space."
        ) from None


def _grids(path: Path) -> list[dict[str, Any]]:
    """The grids of a sweep.json. Raises DataError."""
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
    """All points of all grids of a folder, each once. DataError where there is no sweep."""
    path = folder / "sweep.json"
    found: dict[tuple[str, str], Point] = {}
    try:
        for entry in _grids(path):
            for point in Grid(**entry["grid"]).points(config_from_mapping(entry["config"])):
                found[point.parameterization, point.key] = point
    except (DataError, KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"{path}: not a sweep ({error}). Make one with tools/lr_transfer.py sweep."
        ) from None
    return list(found.values())

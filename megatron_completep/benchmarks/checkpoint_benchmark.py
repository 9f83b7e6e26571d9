"""How fast checkpoints are written and read, against what the disk and the memory give for the same bytes in the same run."""

from __future__ import annotations

import os
import shutil
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

from megatron_completep.checkpoint import Checkpointer
from megatron_completep.completep import table_of
from megatron_completep.config.bare import bare_config
from megatron_completep.config.schema import (
    CheckpointConfig,
    ModelConfig,
)
from megatron_completep.model.gpt import GPT
from megatron_completep.optim.optimizer import DistributedOptimizer
from megatron_completep.parallel.context import ParallelContext
from megatron_completep.run.state import RunState

CHUNK = 4 << 20


@dataclass(frozen=True)
class Speed:
    """Seconds of each round."""

    name: str
    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


@dataclass(frozen=True)
class CheckpointSpeeds:
    """All of one run of the benchmark; `bytes` is what each of them moved."""

    bytes: int
    speeds: dict[str, Speed]

    def ratio(self, one: str, other: str) -> float:
        """How many times as long `one` takes as `other`: the median over rounds of ratios within a round."""
        pairs = zip(self.speeds[one].seconds, self.speeds[other].seconds, strict=True)
        return statistics.median(a / b for a, b in pairs)


def benchmark_checkpoints(folder: Path, megabytes: int, rounds: int) -> CheckpointSpeeds:
    """Write and read a checkpoint of about `megabytes` in `folder`, turn by turn with the baselines. Leaves nothing behind."""
    folder = folder / f"benchmark_checkpoint.{os.getpid()}"
    folder.mkdir(parents=True)
    try:
        run = _Bench(folder, megabytes)
        run.measure()  # the first round makes buffers and is not counted
        found: dict[str, list[float]] = {}
        for _ in range(rounds):
            for name, seconds in run.measure().items():
                found.setdefault(name, []).append(seconds)
        return CheckpointSpeeds(
            run.bytes, {name: Speed(name, tuple(seconds)) for name, seconds in found.items()}
        )
    finally:
        shutil.rmtree(folder, ignore_errors=True)


class _Bench:
    def __init__(self, folder: Path, megabytes: int):
        self.folder = folder
        hidden = 512
        layers = max(1, round(megabytes * 1e6 / 12 / (16 * hidden * hidden)))
        model = ModelConfig(
            hidden_size=hidden,
            num_layers=layers,
            num_attention_heads=8,
            ffn_hidden_size=4 * hidden,
            vocab_size=512,
            seq_length=64,
        )
        self.config = bare_config(
            model,
            training={"output_dir": str(folder / "run")},
            checkpoint=CheckpointConfig(keep=1),
        )
        context = ParallelContext.single("cpu")
        table = table_of(self.config)
        chunk = GPT(model, table, context)
        for parameter in chunk.parameters():
            parameter.data.normal_()
        self.optimizer = DistributedOptimizer(
            [chunk], table, self.config.optimizer, context, None, torch.float32
        )
        for state in self.optimizer.rule.states.values():
            state.normal_()
        self.flats: dict[str, Tensor] = dict(self.optimizer.states)
        self.copies = {name: torch.empty_like(flat) for name, flat in self.flats.items()}
        self.bytes = sum(flat.nbytes for flat in self.flats.values())
        blocking = self.config.model_copy(
            update={"checkpoint": CheckpointConfig(keep=1, async_save=False)}
        )
        self.saver, self.blocking_saver = (
            Checkpointer(config, context, self.optimizer, table, report=lambda text: None)
            for config in (self.config, blocking)
        )

    def measure(self) -> dict[str, float]:
        """Seconds of everything, once."""
        found = {
            "plain write": timed(self._plain_write),
            "save": timed(lambda: self.blocking_saver.save(RunState(step=1))),
            "torch DCP save": timed(self._library_save),
            "memory copy": timed(self._copy),
            "asynchronous save blocks": self._blocked(),
        }
        forget(self.folder)
        found["plain read"] = timed(self._plain_read)
        forget(self.folder)
        found["load"] = timed(self.blocking_saver.load_latest)
        return found

    def _plain_write(self) -> None:
        with open(self.folder / "plain", "wb", buffering=0) as file:
            for flat in self.flats.values():
                view = memoryview(flat.numpy()).cast("B")
                for start in range(0, len(view), CHUNK):
                    file.write(view[start : start + CHUNK])
            os.fsync(file.fileno())

    def _plain_read(self) -> None:
        with open(self.folder / "plain", "rb", buffering=0) as file:
            for copy in self.copies.values():
                view = memoryview(copy.numpy()).cast("B")
                for start in range(0, len(view), CHUNK):
                    file.readinto(view[start : start + CHUNK])

    def _library_save(self) -> None:
        target = self.folder / "library"
        shutil.rmtree(target, ignore_errors=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dcp.save(
                dict(self.flats),
                storage_writer=dcp.FileSystemWriter(target, sync_files=True),
                no_dist=True,
            )

    def _copy(self) -> None:
        for name, flat in self.flats.items():
            self.copies[name].copy_(flat)

    def _blocked(self) -> float:
        report = self.saver.save(RunState(step=1))
        self.saver.close()
        return report.blocked_seconds


def timed(action: Callable[[], object]) -> float:
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def forget(folder: Path) -> None:
    """Drop the files' pages from the operating system's cache, so that reading reads the disk."""
    os.sync()
    for path in folder.rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

"""How fast checkpoints are written and read, compared with plain input, output and memory copies.

The baselines run in the same process and in turn with the checkpoints, so that all of them see the
same state of the machine.
"""

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
from torch import Tensor
from torch.distributed.checkpoint import state_dict_saver
from torch.distributed.checkpoint.filesystem import FileSystemWriter

from megatron_completep.checkpoint import Checkpointer
from megatron_completep.completep import Table, table_of
from megatron_completep.config import Config
from megatron_completep.config.bare import bare_config
from megatron_completep.config.schema import CheckpointConfig, ModelConfig
from megatron_completep.model.gpt import GPT
from megatron_completep.optim.optimizer import DistributedOptimizer
from megatron_completep.parallel.context import ParallelContext
from megatron_completep.run.state import RunState

CHUNK = 4 << 20  # bytes of one plain read or write
HIDDEN = 512


@dataclass(frozen=True)
class Speed:
    """Seconds of each round of one action."""

    name: str
    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


@dataclass(frozen=True)
class CheckpointSpeeds:
    """All actions of one run of the benchmark; `bytes` is what each of them moved."""

    bytes: int
    speeds: dict[str, Speed]

    def ratio(self, name: str, baseline: str) -> float:
        """How many times as long `name` takes as `baseline`: median of the ratios of each round."""
        seconds = self.speeds[name].seconds
        baseline_seconds = self.speeds[baseline].seconds
        rounds = zip(seconds, baseline_seconds, strict=True)
        return statistics.median(action / action_baseline for action, action_baseline in rounds)


def benchmark_checkpoints(folder: Path, megabytes: int, rounds: int) -> CheckpointSpeeds:
    """Write and read a checkpoint of about `megabytes` in `folder`, in turn with the baselines.

    The files are removed at the end, after an error too.
    """
    folder = folder / f"benchmark_checkpoint.{os.getpid()}"
    folder.mkdir(parents=True)
    try:
        bench = _CheckpointBench(folder, megabytes)
        # The first round allocates buffers and fills caches, so it is not counted.
        bench.measure()

        seconds_by_name: dict[str, list[float]] = {}
        for _ in range(rounds):
            for name, seconds in bench.measure().items():
                seconds_by_name.setdefault(name, []).append(seconds)

        speeds = {name: Speed(name, tuple(seconds)) for name, seconds in seconds_by_name.items()}
        return CheckpointSpeeds(bench.bytes, speeds)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


class _CheckpointBench:
    """A model, its optimizer state and the actions that are timed on them, in one CPU process."""

    def __init__(self, folder: Path, megabytes: int):
        self.folder = folder
        self.config = _config_of_size(megabytes, folder / "run")
        context = ParallelContext.single("cpu")
        table = table_of(self.config)
        self.optimizer = _random_optimizer(self.config, table, context)
        self.flats: dict[str, Tensor] = dict(self.optimizer.states)
        self.copies = {name: torch.empty_like(flat) for name, flat in self.flats.items()}
        self.bytes = sum(flat.nbytes for flat in self.flats.values())

        # Both write the same files; only the second makes its caller wait until they are on disk.
        self.saver = self._make_saver(self.config, table, context)
        blocking = CheckpointConfig(keep=1, async_save=False)
        blocking_config = self.config.model_copy(update={"checkpoint": blocking})
        self.blocking_saver = self._make_saver(blocking_config, table, context)

    def _make_saver(self, config: Config, table: Table, context: ParallelContext) -> Checkpointer:
        return Checkpointer(config, context, self.optimizer, table, report=lambda text: None)

    def measure(self) -> dict[str, float]:
        """Seconds of each action, performed once."""
        seconds = {
            "plain write": timed(self._plain_write),
            "save": timed(lambda: self.blocking_saver.save(RunState(step=1))),
            "torch DCP save": timed(self._library_save),
            "memory copy": timed(self._copy),
            "asynchronous save blocks": self._blocked(),
        }
        # Without this, reads would be served from the page cache that the writes have filled.
        forget(self.folder)
        seconds["plain read"] = timed(self._plain_read)
        forget(self.folder)
        seconds["load"] = timed(self.blocking_saver.load_latest)
        return seconds

    def _plain_write(self) -> None:
        with open(self.folder / "plain", "wb", buffering=0) as file:
            for flat in self.flats.values():
                view = memoryview(flat.numpy()).cast("B")
                for start in range(0, len(view), CHUNK):
                    file.write(view[start : start + CHUNK])
            # A checkpoint counts as saved once it is on the disk; the baseline has to wait too.
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
        writer = FileSystemWriter(target, sync_files=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch notes that only this process saves
            state_dict_saver.save(dict(self.flats), storage_writer=writer, no_dist=True)

    def _copy(self) -> None:
        for name, flat in self.flats.items():
            self.copies[name].copy_(flat)

    def _blocked(self) -> float:
        """Seconds for which an asynchronous save stops its caller. Returns once it has finished."""
        report = self.saver.save(RunState(step=1))
        self.saver.close()
        return report.blocked_seconds


def _config_of_size(megabytes: int, output_dir: Path) -> Config:
    """The configuration of a model whose checkpoint has about `megabytes`."""
    # A block has 4 H^2 parameters in its attention and 12 H^2 in its SwiGLU MLP. Each parameter
    # takes 12 bytes in a checkpoint: the float32 master and two float32 moments.
    layers = max(1, round(megabytes * 1e6 / 12 / (16 * HIDDEN * HIDDEN)))
    model = ModelConfig(
        hidden_size=HIDDEN,
        num_layers=layers,
        num_attention_heads=8,
        ffn_hidden_size=4 * HIDDEN,
        vocab_size=512,
        seq_length=64,
    )
    training = {"output_dir": str(output_dir)}
    return bare_config(model, training=training, checkpoint=CheckpointConfig(keep=1))


def _random_optimizer(
    config: Config, table: Table, context: ParallelContext
) -> DistributedOptimizer:
    """An optimizer with random parameters and states, which no file system can compress."""
    chunk = GPT(config.model, table, context)
    for parameter in chunk.parameters():
        parameter.data.normal_()
    optimizer = DistributedOptimizer([chunk], table, config.optimizer, context, None, torch.float32)
    for state in optimizer.rule.states.values():
        state.normal_()
    return optimizer


def timed(action: Callable[[], object]) -> float:
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def forget(folder: Path) -> None:
    """Drop the files' pages from the operating system's cache, so that reading reads the disk."""
    os.sync()  # a page that is not yet written back cannot be dropped
    for path in folder.rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

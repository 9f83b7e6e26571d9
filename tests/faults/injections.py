"""How each kind of fault is caused inside a rank. Imported in forked test processes only."""

from __future__ import annotations

import dataclasses
import errno
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from megatron_completep.checkpoint import files, retention, save
from megatron_completep.guards import hooks
from megatron_completep.parallel.gradients import GradientQueue
from megatron_completep.run import assemble
from megatron_completep.run.step import TrainingStep
from megatron_completep.training import build
from tests.faults.harness import Fault, at_point, disk_full, kill_self


def inject(fault: Fault) -> Callable[[str], None]:
    """Arrange for the fault; returns the fail point that `pretrain` is given."""
    match fault.kind:
        case "kill":
            if fault.steps:
                _at_steps(fault, kill_self)
            return at_point(fault, kill_self)
        case "disk_full":
            return at_point(fault, disk_full)
        case "hang":
            _at_steps(fault, lambda: time.sleep(3600))
        case "signal":
            _at_steps(fault, lambda: signal.raise_signal(int(fault.seconds)))
        case "wait":
            _at_steps(fault, lambda: wait_for_file(Path(fault.point)))
        case "hang_early":
            build.build_training_loader = lambda *_: time.sleep(3600)
        case "stop_early":
            build.build_training_loader = lambda *_: os.kill(os.getpid(), signal.SIGSTOP)
        case "clock":
            _set_the_clock(fault.seconds)
        case "stop":
            _at_steps(fault, lambda: os.kill(os.getpid(), signal.SIGSTOP))
        case "slow":
            _at_steps(fault, lambda: time.sleep(fault.seconds), "_counted_tokens")
        case "nan" | "inf":
            _poison_gradient(fault)
        case "stuck":
            _refuse_removal(fault)
        case "folder_gone":
            _at_steps(fault, lambda: shutil.rmtree(fault.point))
        case "slow_disk":
            _slow_disk(fault)
        case "flip":
            _flip_bit(fault)
        case "spike":
            _scale_weights(fault)
        case "bad_samples":
            _spike_at_samples(fault)
        case "spike_once":
            _scale_weights(fault, every_time=False)
    return lambda name: None


def wait_for_file(path: Path) -> None:
    while not path.exists():
        time.sleep(0.01)


def _set_the_clock(seconds: float) -> None:
    """The clock of the day is set while the model is built."""
    original, time_of_day = assemble.build_model, time.time

    def build_model(*arguments: Any) -> Any:
        time.time = lambda: time_of_day() + seconds
        return original(*arguments)

    assemble.build_model = build_model


def _at_steps(fault: Fault, action: Callable[[], None], method: str = "run") -> None:
    """Before the steps begin, or inside of them before another method of `TrainingStep`."""
    original_run, original = TrainingStep.run, getattr(TrainingStep, method)
    current = 0

    def run(self: TrainingStep, batches: Any, step: int, *rest: Any) -> Any:
        nonlocal current
        current = step
        return (acting if method == "run" else original_run)(self, batches, step, *rest)

    def acting(self: TrainingStep, *arguments: Any) -> Any:
        if current in fault.steps:
            action()
        return original(self, *arguments)

    setattr(TrainingStep, method, acting)
    TrainingStep.run = run  # type: ignore[method-assign]


def _refuse_removal(fault: Fault) -> None:
    """The checkpoints of these steps cannot be renamed to be removed."""
    rename, names = os.rename, {f"step_{step:08d}" for step in fault.steps}

    def refuse(source: Any, target: Any) -> None:
        if Path(source).name in names and Path(target).name.startswith(".removing"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(source))
        rename(source, target)

    retention.os.rename = refuse  # type: ignore[assignment]


def _slow_disk(fault: Fault) -> None:
    """Every block of 4 KiB that rank 0 writes takes so long.

    On all ranks, which must agree about the size of a block.
    """
    for module in (files, save):
        module.BLOCK_SIZE = 4096  # type: ignore[attr-defined]
    files.BlockHasher.__init__.__defaults__ = (4096,)  # type: ignore[attr-defined]
    update = files.BlockHasher.update

    def slow(self: Any, data: Any) -> None:
        if os.environ["RANK"] == "0":
            time.sleep(fault.seconds)
        update(self, data)

    files.BlockHasher.update = slow  # type: ignore[method-assign]


def _poison_gradient(fault: Fault) -> None:
    """One element of one parameter's gradient becomes NaN or infinite,
    on this rank only, as its first contribution arrives.
    """
    poisoned = "layers.1.mlp.down.weight"
    original_run, original_push = TrainingStep.run, GradientQueue.push
    active: list[Any] = []

    def run(self: TrainingStep, batches: Any, step: int, *rest: Any) -> Any:
        active[:] = [self.optimizer.shards.parameters[poisoned]] if step in fault.steps else []
        return original_run(self, batches, step, *rest)

    def push(self: GradientQueue, parameter: Any, accumulate: Any) -> None:
        def poison(main_grad: Any, first: bool) -> None:
            accumulate(main_grad, first)
            main_grad.view(-1)[3] = float(fault.kind)

        original_push(
            self, parameter, poison if any(parameter is p for p in active) else accumulate
        )

    TrainingStep.run, GradientQueue.push = run, push  # type: ignore[method-assign]


def _flip_bit(fault: Fault) -> None:
    """One bit of this rank's copy of the weights, before they are compared."""
    original = hooks.replica_hashes

    def flipped(optimizer: Any, context: Any) -> Any:
        optimizer.wait_for_parameters()
        words = optimizer.shards.flat.view(torch.int32)
        words[11] ^= 1 << 20
        return original(optimizer, context)

    hooks.replica_hashes = flipped


def _spike_at_samples(fault: Fault) -> None:
    """A step that reads one of the samples (`steps`, on any rank) reports a loss 5 nats higher;
    slowed, so that it can be killed.
    """
    original = TrainingStep.run

    def run(self: TrainingStep, batches: Any, step: int, *rest: Any) -> Any:
        time.sleep(fault.seconds)
        # Of the step's 4 samples.
        pending = original(self, batches, step, *rest)
        first = int(batches[0].sample_ids[0]) // 4 * 4
        if any(first <= sample < first + 4 for sample in fault.steps):
            read = pending.read
            pending.read = lambda: dataclasses.replace(read(), loss=read().loss + 5.0)
        return pending

    TrainingStep.run = run  # type: ignore[method-assign]


def _scale_weights(fault: Fault, every_time: bool = True) -> None:
    """The weights jump, on all ranks; not every_time:
    when the steps come for the first time only.
    """
    coming = set(fault.steps)

    def scale(step: TrainingStep) -> None:
        step.optimizer.wait_for_parameters()
        step.optimizer.shards.master.mul_(30.0)
        step.optimizer.shards.load_from_masters()

    original = TrainingStep.run

    def run(self: TrainingStep, batches: Any, step: int, *rest: Any) -> Any:
        if step in (fault.steps if every_time else coming):
            scale(self)
            coming.discard(step)
        return original(self, batches, step, *rest)

    TrainingStep.run = run  # type: ignore[method-assign]

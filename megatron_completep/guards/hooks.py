"""Guards that look at every finished step. They talk over a group of their own, and all ranks decide alike."""

from __future__ import annotations

import gc
import math
import platform
import statistics
from collections.abc import Callable
from pathlib import Path

from megatron_completep.config.schema import Config, TrainingConfig
from megatron_completep.data.loader import Layout
from megatron_completep.guards.replicas import replica_hashes, who_differs
from megatron_completep.guards.rollback import Rollbacks
from megatron_completep.guards.spikes import LossSpikes
from megatron_completep.guards.watchdog import Watchdog
from megatron_completep.optim.optimizer import DistributedOptimizer
from megatron_completep.parallel.context import ParallelContext
from megatron_completep.parallel.exchange import Exchange
from megatron_completep.parallel.gradients import main_grad_of
from megatron_completep.run.hook import Hook, Stage, StepRecord
from megatron_completep.run.state import ExitCode, RunState, RunStopped
from megatron_completep.telemetry.metrics import METRICS

Say = Callable[[str], None]


class Heartbeat(Hook):
    """Tells the watchdog that steps come."""

    stage = Stage.GUARD

    def __init__(self, watchdog: Watchdog):
        self._watchdog, self._begun = watchdog, False

    def before_step(self, step: int) -> None:
        if not self._begun:
            self._watchdog.beat(step - 1)
        self._begun = True

    def after_step(self, record: StepRecord) -> None:
        self._watchdog.beat(record.state.step)

    def rewind(self, state: RunState) -> None:
        self._watchdog.beat(state.step)

    def close(self) -> None:
        self._watchdog.stop()


class GarbageCollection(Hook):
    """Python collects its garbage after the same step on all ranks, instead of whenever one rank happens to reach a threshold."""

    stage = Stage.GUARD

    def __init__(self, interval: int):
        self._interval = interval
        gc.disable()

    def after_step(self, record: StepRecord) -> None:
        if record.state.step % self._interval == 0:
            gc.collect()

    def close(self) -> None:
        gc.enable()


class SkippedSteps(Hook):
    """Says where a gradient was not finite, and stops the run after too many such steps in a row."""

    stage = Stage.GUARD

    def __init__(
        self,
        optimizer: DistributedOptimizer,
        context: ParallelContext,
        training: TrainingConfig,
        exchange: Exchange,
        limit: int,
        say: Say,
    ):
        self._optimizer, self._context, self._training = optimizer, context, training
        self._exchange, self._limit, self._say = exchange, limit, say
        self._in_a_row = 0

    def due(self, step: int) -> bool:
        """After a first such step each is looked at before the next one's gradients come, which would hide who began."""
        return self._in_a_row > 0

    def after_step(self, record: StepRecord) -> None:
        if record.figures.passed_over:
            return
        if not record.figures.skipped:
            self._in_a_row = 0
            return
        self._in_a_row += 1
        found = self._exchange.all_gather((not_finite(self._optimizer), self.own_samples(record)))
        where = {rank: (names, samples) for rank, (names, samples) in enumerate(found) if names}
        parts = [
            f"rank {rank}: {describe(names)}, samples {samples}"
            for rank, (names, samples) in where.items()
        ]
        text = "; ".join(parts[:4]) or nobody(
            self._context.device.type == "cuda" and self._in_a_row == 1, self.own_samples(record)
        )
        step = record.state.step
        self._say(
            f"step {step}: a gradient was not finite, nothing was updated ({self._in_a_row} in a row). {text}"
        )
        if self._in_a_row >= self._limit:
            raise RunStopped(
                f"step {step}: {self._in_a_row} steps in a row without a finite gradient (guards.max_skipped_steps). {text}\n"
                "The weights are those before the first of them. Go back to an older checkpoint, lower optimizer.base_lr, "
                "or look at the data.",
                ExitCode.NOT_FINITE,
            )

    def rewind(self, state: RunState) -> None:
        self._in_a_row = 0

    def own_samples(self, record: StepRecord) -> str:
        """Numbers within the run of the samples that this data rank read in the step."""
        first = record.state.consumed_samples - record.samples
        layout = Layout(
            self._training.micro_batch_size, self._context.data.rank, self._context.data.size
        )
        return ", ".join(
            f"{first + part.start}-{first + part.stop - 1}"
            for part in layout.micro_batches(record.samples)
        )


def not_finite(optimizer: DistributedOptimizer) -> list[str]:
    """Parameters whose gradient on this rank, before any sum over ranks, is not finite; in the order of the forward pass."""
    names = reversed(optimizer.shards.parameters)
    return [
        name
        for name in names
        if not math.isfinite(main_grad_of(optimizer.shards.parameters[name]).double().sum().item())
    ]


def nobody(replaced: bool, samples: str) -> str:
    """What to say when no rank's gradient shows it (any more)."""
    why = (
        "by now the next step's have replaced them"
        if replaced
        else "the sum over ranks or the loss was not finite"
    )
    return f"No rank's own gradient shows it: {why}; samples {samples} on rank 0"


def describe(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more parameters"


class Replicas(Hook):
    """Compares hashes of what several ranks must hold alike, and stops the run naming the rank that differs."""

    stage = Stage.GUARD

    def __init__(
        self,
        optimizer: DistributedOptimizer,
        context: ParallelContext,
        exchange: Exchange,
        interval: int,
    ):
        self._optimizer, self._context, self._exchange, self._interval = (
            optimizer,
            context,
            exchange,
            interval,
        )

    def due(self, step: int) -> bool:
        return step % self._interval == 0

    def after_step(self, record: StepRecord) -> None:
        if not self.due(record.state.step):
            return
        found = who_differs(
            self._exchange.all_gather(replica_hashes(self._optimizer, self._context))
        )
        if found:
            raise RunStopped(
                f"step {record.state.step}: replicas differ: {'; '.join(found)}. Memory or a link of that host is not sound. "
                "Nothing was saved; take it out and continue from the last checkpoint.",
                ExitCode.REPLICAS_DIFFER,
            )


class Stragglers(Hook):
    """Compares the time that each rank takes for its own part of a step: reading data, forward and backward.

    Adds the slowest rank, and its time over the median rank's, to the step's record.
    """

    stage = Stage.GUARD

    def __init__(self, exchange: Exchange, interval: int, ratio: float, say: Say):
        self._exchange, self._interval, self._ratio, self._say = exchange, interval, ratio, say
        self._total, self._steps = 0.0, 0

    def after_step(self, record: StepRecord) -> None:
        self._total += record.figures.own_seconds + record.data_wait_seconds
        self._steps += 1
        if record.state.step % self._interval:
            return
        found = self._exchange.all_gather((self._total / self._steps, platform.node()))
        self._total, self._steps = 0.0, 0
        times = [seconds for seconds, _ in found]
        median, slowest = (
            statistics.median_low(times),
            max(range(len(times)), key=times.__getitem__),
        )
        record.slowest_rank = slowest
        record.slowest_rank_ratio = times[slowest] / median if median else 1.0
        for rank, (seconds, host) in enumerate(found):
            if seconds > self._ratio * median:
                self._say(
                    f"step {record.state.step}: rank {rank} on {host} is a straggler: {seconds:.3f} s for its part of a step, "
                    f"{seconds / median:.1f} times the median rank's {median:.3f} s"
                )


def guard_hooks(
    config: Config,
    context: ParallelContext,
    optimizer: DistributedOptimizer,
    state: RunState,
    watchdog: Watchdog,
    rollbacks: Rollbacks,
    exchange: Exchange,
    say: Say,
) -> list[Hook]:
    """The guards that the configuration asks for."""
    guards = config.guards
    hooks: list[Hook] = [Heartbeat(watchdog)]
    hooks.append(
        SkippedSteps(optimizer, context, config.training, exchange, guards.max_skipped_steps, say)
    )
    if guards.gc_interval is not None:
        hooks.append(GarbageCollection(guards.gc_interval))
    if guards.spike_threshold is not None or guards.rollback_threshold is not None:
        metrics = Path(config.training.output_dir) / METRICS
        hooks.append(LossSpikes(guards, rollbacks, exchange, metrics, state, say))
    if context.world_size > 1 and guards.replica_check_interval is not None:
        hooks.append(Replicas(optimizer, context, exchange, guards.replica_check_interval))
    if context.world_size > 1 and guards.straggler_interval is not None:
        hooks.append(Stragglers(exchange, guards.straggler_interval, guards.straggler_ratio, say))
    return hooks

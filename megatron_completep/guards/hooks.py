"""Guards that look at every finished step.

They communicate over a process group of their own (`Exchange`), and all ranks come to the same
decision.
"""

from __future__ import annotations

import gc
import math
import platform
import statistics
from collections.abc import Callable
from pathlib import Path

from megatron_completep.config.schema import Config, TrainingConfig
from megatron_completep.data.loader import SampleAssignment
from megatron_completep.guards.replicas import replica_hashes, who_differs
from megatron_completep.guards.rollback import Rollbacks
from megatron_completep.guards.spikes import LossSpikes
from megatron_completep.guards.watchdog import Watchdog
from megatron_completep.optim.optimizer import DistributedOptimizer
from megatron_completep.parallel.context import ParallelContext
from megatron_completep.parallel.exchange import Exchange
from megatron_completep.parallel.gradients import main_grad_of
from megatron_completep.run.hook import BeginRecord, Hook, Stage, StepRecord
from megatron_completep.run.state import ExitCode, RunState, RunStopped
from megatron_completep.telemetry.metrics import METRICS

Say = Callable[[str], None]


class Heartbeat(Hook):
    """Tells the watchdog of every finished step."""

    stage = Stage.GUARD

    def __init__(self, watchdog: Watchdog):
        self._watchdog = watchdog
        self._begun = False

    def before_training(self, record: BeginRecord) -> None:
        self._watchdog.heartbeat()  # a validation may follow, and has the whole time

    def before_step(self, step: int) -> None:
        # The first step ends the phases of the start. From then on only finished steps are signs of
        # life: the host may launch a step while the device hangs in the one before.
        if not self._begun:
            self._watchdog.step_done(step - 1)
        self._begun = True

    def after_step(self, record: StepRecord) -> None:
        self._watchdog.step_done(record.state.step)

    def rewind(self, state: RunState) -> None:
        self._watchdog.step_done(state.step)

    def close(self) -> None:
        self._watchdog.stop()


class GarbageCollection(Hook):
    """Lets Python collect its garbage after the same step on all ranks.

    Otherwise each rank would collect when it happens to reach a threshold, and the others would
    wait for it each time.
    """

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
    """Reports where a gradient was not finite, and stops the run after too many such steps.

    Args:
        exchange: for the report, which all ranks contribute to.
        limit: guards.max_skipped_steps, of steps in a row.
    """

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
        self._optimizer = optimizer
        self._context = context
        self._training = training
        self._exchange = exchange
        self._limit = limit
        self._say = say
        self._in_a_row = 0

    def due(self, step: int) -> bool:
        """After a step without an update, look at each step before the next one is launched.

        The next step would overwrite the gradients that show which rank was the first.
        """
        return self._in_a_row > 0

    def after_step(self, record: StepRecord) -> None:
        # A step of training.skip_steps computed nothing, so it neither counts nor resets the count.
        if record.figures.passed_over:
            return
        if not record.figures.skipped:
            self._in_a_row = 0
            return

        self._in_a_row += 1
        origin = self._origin(record)
        if record.figures.counted_tokens == 0:
            origin = "No label of the step counts, so that there is no mean loss: look at the data."
        step = record.state.step
        self._say(
            f"step {step}: a gradient was not finite, nothing was updated "
            f"({self._in_a_row} in a row). {origin}"
        )
        if self._in_a_row >= self._limit:
            raise RunStopped(
                f"step {step}: {self._in_a_row} steps in a row without a finite gradient "
                f"(guards.max_skipped_steps). {origin}\n"
                "None of these steps changed the weights. Go back to an older checkpoint, "
                "lower optimizer.base_lr, or look at the data.",
                ExitCode.NOT_FINITE,
            )

    def rewind(self, state: RunState) -> None:
        self._in_a_row = 0

    def _origin(self, record: StepRecord) -> str:
        """The ranks, parameters and samples whose gradient is not finite. Collective."""
        own_samples = self._own_samples(record)
        if not self._optimizer.shards.gradients.kept:
            return self._origin_of_sums(own_samples)
        reports = self._exchange.all_gather((nonfinite_gradients(self._optimizer), own_samples))
        origins = []
        for rank, (names, samples) in enumerate(reports):
            if names:
                origins.append(f"rank {rank}: {summary(names)}, samples {samples}")
        # A few ranks are enough: activations and their gradients spread a NaN or an infinity from
        # the first rank to the others.
        if origins:
            return "; ".join(origins[:4])
        return unknown_origin(self._may_be_replaced(), own_samples)

    def _origin_of_sums(self, own_samples: str) -> str:
        """The parameters whose summed gradient is not finite, of which ranks have the shards."""
        reports = self._exchange.all_gather(nonfinite_sums(self._optimizer))
        not_finite = {name for names in reports for name in names}
        names = [name for name in reversed(self._optimizer.shards.parameters) if name in not_finite]
        if not names:
            return unknown_origin(self._may_be_replaced(), own_samples)
        return (
            f"Not finite in the sum over ranks: {summary(names)}; which rank was the first is not "
            f"known, as parallel.sharding = gradients keeps none's own; samples {own_samples} on "
            "rank 0"
        )

    def _may_be_replaced(self) -> bool:
        # On a GPU the host comes here when the next step has been launched, except where `due`
        # made it wait.
        return self._context.device.type == "cuda" and self._in_a_row == 1

    def _own_samples(self, record: StepRecord) -> str:
        """Which samples this data rank read in the step, by their run-wide numbers."""
        data = self._context.data
        assignment = SampleAssignment(self._training.micro_batch_size, data.rank, data.size)
        step_start = record.state.consumed_samples - record.samples
        ranges = []
        for micro_batch in assignment.micro_batches(record.samples):
            start = step_start + micro_batch.start
            stop = step_start + micro_batch.stop
            ranges.append(f"{start}-{stop - 1}")
        return ", ".join(ranges)


def nonfinite_gradients(optimizer: DistributedOptimizer) -> list[str]:
    """Names of parameters whose gradient is not finite on this rank, in the order of forward.

    These are the gradients before any sum over ranks. Waits for the device.
    """
    parameters = optimizer.shards.parameters  # in backward order
    names = []
    for name in reversed(parameters):
        # The sum is not finite where an element is not, and float32 elements that are finite do not
        # overflow in float64.
        total = main_grad_of(parameters[name]).double().sum().item()
        if not math.isfinite(total):
            names.append(name)
    return names


def nonfinite_sums(optimizer: DistributedOptimizer) -> list[str]:
    """Names of parameters with a summed gradient in this rank's shard that is not finite.

    Empty where the sums are freed already. Waits for the device.
    """
    shards = optimizer.shards
    names: list[str] = []
    for segment in shards.segments if shards.grad_shard.numel() else ():
        if not math.isfinite(shards.grad_shard[segment.in_shard].double().sum().item()):
            names.append(segment.name)
    return names


def unknown_origin(replaced: bool, samples: str) -> str:
    """What to say when no rank's gradients show where one was not finite.

    replaced: they may have been overwritten by the next step. samples: those of rank 0.
    """
    reason = "the sum over ranks or the loss was not finite"
    if replaced:
        reason = "the next step may have overwritten them already"
    return f"No rank's gradients show where: {reason}; samples {samples} on rank 0"


def summary(names: list[str]) -> str:
    """The first name, and how many more there are."""
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more parameters"


class Replicas(Hook):
    """Compares hashes of what several ranks must hold alike, and stops the run where they differ.

    The message names the ranks that are wrong. Collective every `interval` steps.
    """

    stage = Stage.GUARD

    def __init__(
        self,
        optimizer: DistributedOptimizer,
        context: ParallelContext,
        exchange: Exchange,
        interval: int,
    ):
        self._optimizer = optimizer
        self._context = context
        self._exchange = exchange
        self._interval = interval

    def due(self, step: int) -> bool:
        return step % self._interval == 0

    def after_step(self, record: StepRecord) -> None:
        if not self.due(record.state.step):
            return
        hashes = replica_hashes(self._optimizer, self._context)
        differences = who_differs(self._exchange.all_gather(hashes))
        if differences:
            raise RunStopped(
                f"step {record.state.step}: replicas differ: {'; '.join(differences)}. "
                "The memory or a network link of a host of these ranks is faulty. This step was "
                "not saved. Exclude that host, and continue from the last checkpoint.",
                ExitCode.REPLICAS_DIFFER,
            )


class Stragglers(Hook):
    """Compares the time that each rank takes for its own work: reading data, forward and backward.

    Adds the slowest rank, and its time over the median rank's, to the step's record. Collective
    every `interval` steps.

    ratio: of a rank's time to the median rank's; a rank that takes longer is reported.
    """

    stage = Stage.GUARD

    def __init__(self, exchange: Exchange, interval: int, ratio: float, say: Say):
        self._exchange = exchange
        self._interval = interval
        self._ratio = ratio
        self._say = say
        self._total_seconds = 0.0
        self._steps = 0

    def after_step(self, record: StepRecord) -> None:
        self._total_seconds += record.figures.own_seconds + record.data_wait_seconds
        self._steps += 1
        if record.state.step % self._interval:
            return

        # The mean of the interval, as one slow step alone makes no straggler.
        mean_seconds = self._total_seconds / self._steps
        reports = self._exchange.all_gather((mean_seconds, platform.node()))
        self._total_seconds = 0.0
        self._steps = 0

        times = [seconds for seconds, _ in reports]
        median = statistics.median_low(times)
        slowest_rank = times.index(max(times))
        record.slowest_rank = slowest_rank
        # A clock that is too coarse may read 0 on the median rank.
        record.slowest_rank_ratio = times[slowest_rank] / median if median else 1.0
        for rank, (seconds, host) in enumerate(reports):
            if seconds > self._ratio * median:
                self._say(
                    f"step {record.state.step}: rank {rank} on {host} is a straggler: "
                    f"{seconds:.3f} s for its part of a step, {seconds / median:.1f} times the "
                    f"median rank's {median:.3f} s"
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
    """The guards that the configuration asks for, in the order in which they see a step."""
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
    # These compare ranks, so a single process has no use for them.
    if context.world_size > 1 and guards.replica_check_interval is not None:
        hooks.append(Replicas(optimizer, context, exchange, guards.replica_check_interval))
    if context.world_size > 1 and guards.straggler_interval is not None:
        hooks.append(Stragglers(exchange, guards.straggler_interval, guards.straggler_ratio, say))
    return hooks

"""The training loop: batches -> step -> hooks, until the last step or until some rank is asked to stop."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_completep.config.derived import batch_size, is_skipped
from megatron_completep.config.schema import Config
from megatron_completep.data.loader import Loader
from megatron_completep.guards.rollback import Rollbacks
from megatron_completep.parallel.context import ParallelContext
from megatron_completep.run.hook import Hook, StepRecord
from megatron_completep.run.signals import StopSignals
from megatron_completep.run.state import ExitCode, GoBack, RunState
from megatron_completep.run.step import PendingFigures, TrainingStep


@dataclass(frozen=True)
class UnderWay:
    """A step that the device may still be working on."""

    before: RunState  # before the step; where its data began
    after: RunState
    figures: PendingFigures
    data_wait_seconds: float


class Readback:
    """Steps under way. On a GPU a step is read while the next one runs, so that the device never waits for the host."""

    def __init__(self, depth: int):
        self._depth = depth
        self._pending: deque[UnderWay] = deque()
        self._finished_at = time.perf_counter()

    def push(self, step: UnderWay) -> None:
        self._pending.append(step)

    def take(self, everything: bool) -> list[StepRecord]:
        """The records of the steps that are done: all but the newest, or all of them, waiting for the device."""
        records = []
        while len(self._pending) > (0 if everything else self._depth):
            step = self._pending.popleft()
            figures, now = step.figures.read(), time.perf_counter()
            samples = step.after.consumed_samples - step.before.consumed_samples
            records.append(
                StepRecord(
                    step.after, figures, samples, now - self._finished_at, step.data_wait_seconds
                )
            )
            self._finished_at = now
        return records

    def forget(self) -> None:
        """What is under way does not count."""
        self._pending.clear()
        self.restart_clock()

    def restart_clock(self) -> None:
        """Leave out of the next step's time what happened since the last one."""
        self._finished_at = time.perf_counter()


def train(
    config: Config,
    context: ParallelContext,
    step: TrainingStep,
    loader: Loader,
    state: RunState,
    hooks: Sequence[Hook],
    signals: StopSignals,
    rollbacks: Rollbacks,
) -> ExitCode:
    """Run from `state` to the last step, or to `training.stop_at_step`; REQUEUE when asked to stop before it.

    All ranks leave after the same step, with the run saved.
    """
    last = min(
        config.training.train_steps, config.training.stop_at_step or config.training.train_steps
    )
    readback = Readback(depth=1 if context.device.type == "cuda" else 0)
    stop = False
    hooks = sorted(hooks, key=lambda hook: hook.stage)
    try:
        signals.begin()
        while state.step < last and not stop:
            for hook in hooks:
                hook.before_step(state.step + 1)
            launched = launch(config, step, loader, rollbacks.past(state), signals)
            readback.push(launched)
            state = launched.after
            due = state.step == last or any(hook.due(state.step) for hook in hooks)
            try:
                stop = tell(hooks, readback, everything=due)
            except GoBack as back:
                state = back.state
                readback.forget()
                for hook in hooks:
                    hook.rewind(state)
            if due:
                readback.restart_clock()
        for hook in hooks:
            hook.finish(state)
    finally:
        for hook in hooks:
            hook.close()
        loader.close()
    return ExitCode.DONE if state.step >= last else ExitCode.REQUEUE


def launch(
    config: Config, step: TrainingStep, loader: Loader, state: RunState, signals: StopSignals
) -> UnderWay:
    """Start the step after `state`, on the data from there on."""
    number, training = state.step + 1, config.training
    samples = batch_size(training, number)
    if is_skipped(training, number):
        figures = step.pass_over(signals.asked)
    else:
        if loader.consumed_samples != state.consumed_samples:
            loader.seek(state.consumed_samples)
        figures = step.run(loader.next_step(samples), number, signals.asked)
    return UnderWay(
        state, state.after_step(samples, config.model.seq_length), figures, loader.wait_seconds
    )


def tell(hooks: Sequence[Hook], readback: Readback, everything: bool) -> bool:
    """Let the hooks hear of the steps that are done; of all of them where some rank was asked to stop, which is returned."""
    records = readback.take(everything)
    stop = any(record.figures.stop for record in records)
    if stop:
        records += readback.take(everything=True)
    for record in records:
        for hook in hooks:
            hook.after_step(record)
    return stop

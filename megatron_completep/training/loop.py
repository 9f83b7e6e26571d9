"""The training loop: batches -> step -> hooks.

It runs until the last step, or until some rank is asked to stop.
"""

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

    before: RunState  # before the step: its data begin here
    after: RunState
    figures: PendingFigures
    data_wait_seconds: float


class Readback:
    """Steps under way, read in order.

    On a GPU the figures of a step are read while the next one runs (depth 1), so that the device
    never waits for the host.
    """

    def __init__(self, depth: int):
        self._depth = depth
        self._pending: deque[UnderWay] = deque()
        self._finished_at = time.perf_counter()

    def push(self, step: UnderWay) -> None:
        """Add the step that was just launched."""
        self._pending.append(step)

    def take(self, everything: bool) -> list[StepRecord]:
        """The records of the steps that are done, waiting for the device where necessary.

        everything: of all steps, including the newest `depth`.
        """
        records = []
        steps_to_leave = 0 if everything else self._depth
        while len(self._pending) > steps_to_leave:
            step = self._pending.popleft()
            figures = step.figures.read()
            now = time.perf_counter()
            record = StepRecord(
                state=step.after,
                figures=figures,
                samples=step.after.consumed_samples - step.before.consumed_samples,
                seconds=now - self._finished_at,
                data_wait_seconds=step.data_wait_seconds,
            )
            records.append(record)
            self._finished_at = now
        return records

    def forget(self) -> None:
        """Drop the steps under way: the run went back to before them."""
        self._pending.clear()
        self.restart_clock()

    def restart_clock(self) -> None:
        """Leave what happened since the last step out of the next step's time."""
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
    """Run from `state` to the last step, or to `training.stop_at_step`.

    All ranks leave after the same step, with the run saved. Returns REQUEUE when the run was asked
    to stop before that step.
    """
    training = config.training
    last_step = min(training.train_steps, training.stop_at_step or training.train_steps)
    readback = Readback(depth=1 if context.device.type == "cuda" else 0)
    hooks = sorted(hooks, key=lambda hook: hook.stage)
    stop = False
    try:
        signals.begin()
        while state.step < last_step and not stop:
            for hook in hooks:
                hook.before_step(state.step + 1)
            launched = launch_step(config, step, loader, rollbacks.past(state), signals)
            readback.push(launched)
            state = launched.after

            # A hook that validates or saves needs the weights of this very step: the next one must
            # not be launched before it is done.
            due = state.step == last_step or any(hook.due(state.step) for hook in hooks)
            try:
                stop = report(hooks, readback, everything=due)
            except GoBack as back:
                state = back.state
                readback.forget()
                # Every rank is here: a hook raises after the same step on all of them.
                for hook in hooks:
                    hook.rewind(state)
            if due:
                readback.restart_clock()
        # Not after an exception: what failed must not be saved.
        for hook in hooks:
            hook.finish(state)
    finally:
        for hook in hooks:
            hook.close()
        loader.close()
    return ExitCode.DONE if state.step >= last_step else ExitCode.REQUEUE


def launch_step(
    config: Config, step: TrainingStep, loader: Loader, state: RunState, signals: StopSignals
) -> UnderWay:
    """Start the step after `state`, on the data from there on."""
    training = config.training
    number = state.step + 1
    samples = batch_size(training, number)
    if is_skipped(training, number):
        figures = step.pass_over(signals.asked)
    else:
        # After a rollback or a skipped step the loader stands elsewhere.
        if loader.consumed_samples != state.consumed_samples:
            loader.seek(state.consumed_samples)
        figures = step.run(loader.next_step(samples), number, signals.asked)
    state_after = state.after_step(samples, config.model.seq_length)
    return UnderWay(state, state_after, figures, loader.take_wait_seconds())


def report(hooks: Sequence[Hook], readback: Readback, everything: bool) -> bool:
    """Call the hooks with the steps that are done; return whether some rank was asked to stop.

    If so, they are called with the steps under way, too.
    """
    records = readback.take(everything)
    stop = any(record.figures.stop for record in records)
    if stop:
        records += readback.take(everything=True)
    for record in records:
        for hook in hooks:
            hook.after_step(record)
    return stop

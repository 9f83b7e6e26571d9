"""The training loop: batches -> step -> hooks.

It runs until the last step, or until any rank has received a stop signal or has reached
training.exit_after_minutes.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_completep.config.derived import batch_size, is_passed_over
from megatron_completep.config.schema import Config
from megatron_completep.data.loader import Loader
from megatron_completep.guards.rollback import Rollbacks
from megatron_completep.parallel.context import ParallelContext
from megatron_completep.run.hook import BeginRecord, Hook, StepRecord
from megatron_completep.run.signals import StopSignals
from megatron_completep.run.state import ExitCode, GoBack, RunState
from megatron_completep.run.step import PendingFigures, TrainingStep


@dataclass(frozen=True)
class LaunchedStep:
    """A step that the device may still be working on."""

    before: RunState  # state before the step; its first sample is before.consumed_samples
    after: RunState
    figures: PendingFigures
    data_wait_seconds: float


class StepQueue:
    """The launched steps, whose figures are read in order.

    On a GPU the figures of a step are read while the next one runs (depth 1), so the device never
    waits for the host.
    """

    def __init__(self, depth: int):
        self._depth = depth
        self._pending: deque[LaunchedStep] = deque()
        self._finished_at = time.perf_counter()

    def push(self, step: LaunchedStep) -> None:
        """Add the step that was just launched."""
        self._pending.append(step)

    def take(self, everything: bool) -> list[StepRecord]:
        """The records of the finished steps, in order. Waits for the device if necessary.

        everything: also wait for the newest `depth` steps.
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
        """Drop launched steps that a rollback has undone."""
        self._pending.clear()
        self.restart_clock()

    def restart_clock(self) -> None:
        """Exclude the time since the last step (validation, saving) from the next step's time."""
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

    All ranks return after the same step, with the state saved. Returns REQUEUE if a stop was
    requested before the last step, else DONE.
    """
    training = config.training
    last_step = min(training.train_steps, training.stop_at_step or training.train_steps)
    queue = StepQueue(depth=1 if context.device.type == "cuda" else 0)
    hooks = sorted(hooks, key=lambda hook: hook.stage)
    stop_requested = False
    try:
        signals.begin()
        if state.step < last_step:
            beginning = BeginRecord(state)
            for hook in hooks:
                hook.before_training(beginning)
            queue.restart_clock()
        while state.step < last_step and not stop_requested:
            for hook in hooks:
                hook.before_step(state.step + 1)
            start = rollbacks.skip_left_out_data(state)
            launched = launch_step(config, step, loader, start, signals)
            queue.push(launched)
            state = launched.after

            # Validation and saving need the weights as of this step, so the next step must not be
            # launched before those hooks have run.
            due = state.step == last_step or any(hook.due(state.step) for hook in hooks)
            try:
                stop_requested = run_hooks(hooks, queue, everything=due)
            except GoBack as back:
                state = back.state
                queue.forget()
                # All ranks get here together, because hooks raise GoBack on every rank after the
                # same step.
                for hook in hooks:
                    hook.rewind(state)
            if due:
                queue.restart_clock()
        # Not reached after an exception, so a failed state is never saved.
        for hook in hooks:
            hook.finish(state)
    finally:
        for hook in hooks:
            hook.close()
        loader.close()
    return ExitCode.DONE if state.step >= last_step else ExitCode.REQUEUE


def launch_step(
    config: Config, step: TrainingStep, loader: Loader, state: RunState, signals: StopSignals
) -> LaunchedStep:
    """Launch the step that follows `state`, reading from state.consumed_samples."""
    training = config.training
    number = state.step + 1
    samples = batch_size(training, number)
    if is_passed_over(training, number):
        figures = step.pass_over(signals.asked)
    else:
        # After a rollback or a step in training.skip_steps the loader is at another sample.
        if loader.consumed_samples != state.consumed_samples:
            loader.seek(state.consumed_samples)
        figures = step.run(loader.next_step(samples), number, signals.asked)
    state_after = state.after_step(samples, config.model.seq_length)
    return LaunchedStep(state, state_after, figures, loader.take_wait_seconds())


def run_hooks(hooks: Sequence[Hook], queue: StepQueue, everything: bool) -> bool:
    """Call the hooks with the finished steps; return whether a stop was requested on some rank.

    On a stop request the hooks are also called with the steps still running.
    """
    records = queue.take(everything)
    stop_requested = any(record.figures.stop for record in records)
    if stop_requested:
        records += queue.take(everything=True)
    for record in records:
        for hook in hooks:
            hook.after_step(record)
    return stop_requested

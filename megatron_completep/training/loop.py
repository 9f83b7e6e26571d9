"""The training loop: batches -> step -> hooks, until the last step or until some rank is asked to stop."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence

from megatron_completep.config.schema import TrainingConfig
from megatron_completep.data.loader import Loader
from megatron_completep.parallel.context import ParallelContext
from megatron_completep.training.hooks import Hook, StepRecord, StopSignals
from megatron_completep.training.state import ExitCode, RunState
from megatron_completep.training.step import PendingFigures, TrainingStep


class Readback:
    """Steps under way. On a GPU a step is read while the next one runs, so that the device never waits for the host."""

    def __init__(self, depth: int):
        self._depth = depth
        self._pending: deque[tuple[RunState, PendingFigures, int, float]] = deque()
        self._finished_at = time.perf_counter()

    def push(self, state: RunState, figures: PendingFigures, samples: int, data_wait_seconds: float) -> None:
        self._pending.append((state, figures, samples, data_wait_seconds))

    def take(self, everything: bool) -> list[StepRecord]:
        """The records of the steps that are done: all but the newest, or all of them, waiting for the device."""
        records = []
        while len(self._pending) > (0 if everything else self._depth):
            state, pending, samples, waited = self._pending.popleft()
            figures, now = pending.read(), time.perf_counter()
            records.append(StepRecord(state, figures, samples, now - self._finished_at, waited))
            self._finished_at = now
        return records

    def restart_clock(self) -> None:
        """Leave out of the next step's time what happened since the last one."""
        self._finished_at = time.perf_counter()


def train(
    training: TrainingConfig,
    context: ParallelContext,
    step: TrainingStep,
    loader: Loader,
    state: RunState,
    hooks: Sequence[Hook],
    signals: StopSignals,
) -> ExitCode:
    """Run from `state` to the last step, or to `training.stop_at_step`; REQUEUE when asked to stop before it.

    All ranks leave after the same step, with the run saved.
    """
    last = min(training.train_steps, training.stop_at_step or training.train_steps)
    readback = Readback(depth=1 if context.device.type == "cuda" else 0)
    stop = False
    try:
        with signals:
            while state.step < last and not stop:
                batches = loader.next_step()
                figures = step.run(batches, state.step + 1, signals.asked)
                state = state.after_step(loader.global_batch_size, batches[0].tokens.shape[1])
                readback.push(state, figures, loader.global_batch_size, loader.wait_seconds)
                due = state.step == last or any(hook.due(state.step) for hook in hooks)
                for record in readback.take(everything=due):
                    stop = stop or record.figures.stop
                    for hook in hooks:
                        hook.after_step(record)
                if due:
                    readback.restart_clock()
            for record in readback.take(everything=True):
                for hook in hooks:
                    hook.after_step(record)
            for hook in hooks:
                hook.finish(state)
    finally:
        for hook in hooks:
            hook.close()
        loader.close()
    return ExitCode.DONE if state.step >= last else ExitCode.REQUEUE

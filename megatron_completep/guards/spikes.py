"""Loss spikes: reported and, where the configuration asks for it, undone by a rollback."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Callable
from pathlib import Path

from megatron_completep.config.schema import GuardsConfig
from megatron_completep.guards.rollback import Rollbacks
from megatron_completep.parallel.exchange import Exchange
from megatron_completep.run.hook import Hook, Stage, StepRecord
from megatron_completep.run.state import ExitCode, GoBack, RunState, RunStopped
from megatron_completep.telemetry.metrics import read_metrics

WINDOW = 50  # steps whose losses the next one is compared with
ENOUGH = 10  # losses from which on their median means something


class LossSpikes(Hook):
    """Reports a loss far above the median of the last steps, and may take the run back.

    Every rank has the same losses, which come out of a sum over all ranks, and the same window of
    them. A resumed run reads the window from the metrics in its folder. So all ranks decide alike,
    and alike whether or not the run was interrupted.

    Args:
        metrics: path of the run's metrics.jsonl.
        state: where the run starts.
    """

    stage = Stage.GUARD

    def __init__(
        self,
        guards: GuardsConfig,
        rollbacks: Rollbacks,
        exchange: Exchange,
        metrics: Path,
        state: RunState,
        say: Callable[[str], None],
    ):
        self._guards = guards
        self._rollbacks = rollbacks
        self._exchange = exchange
        self._metrics = metrics
        self._say = say
        self._recent: deque[float] = deque(maxlen=WINDOW)
        self.rewind(state)

    def rewind(self, state: RunState) -> None:
        # Rank 0 alone writes the file, and other nodes may see it late.
        losses = None
        if self._exchange.rank == 0:
            losses = recent_losses(self._metrics, state.step)
        self._recent.clear()
        self._recent.extend(self._exchange.broadcast(losses))

    def after_step(self, record: StepRecord) -> None:
        loss = record.figures.loss
        above = 0.0
        if len(self._recent) >= ENOUGH:
            above = loss - statistics.median(self._recent)

        report_threshold = self._guards.spike_threshold or math.inf
        rollback_threshold = self._guards.rollback_threshold or math.inf
        if above > min(report_threshold, rollback_threshold):
            # The loss of a spike stays out of the window, or a plateau of spikes would become the
            # norm unnoticed.
            record.loss_spike = above
            next_sample = record.state.consumed_samples
            first_sample = next_sample - record.samples
            description = (
                f"step {record.state.step}: loss {loss:.4f} is {above:.2f} above the median of the "
                f"last {len(self._recent)} steps; samples {first_sample}-{next_sample - 1}"
            )
            self._say(description)
            if above > rollback_threshold:
                self._undo(record, description)
        elif math.isfinite(loss):
            self._recent.append(loss)

    def _undo(self, record: StepRecord, description: str) -> None:
        """Go back, which raises GoBack, on all ranks after the same step.

        Where there is no checkpoint to go back to, the run goes on. Raises RunStopped when no
        rollback remains.
        """
        if self._rollbacks.remaining <= 0:
            raise RunStopped(
                f"{description}\nThe run went back {self._guards.max_rollbacks} times already "
                "(guards.max_rollbacks). Look at the samples and at optimizer.base_lr, or remove "
                "newer checkpoints to start from an older one.",
                ExitCode.SPIKES,
            )
        state = self._rollbacks.go_back(record.state)
        if state is not None:
            raise GoBack(state)
        self._say(
            f"step {record.state.step}: there is no checkpoint of two steps before or earlier; "
            "the run goes on"
        )


def recent_losses(metrics: Path, step: int) -> list[float]:
    """The losses that the step after `step` is compared with, oldest first.

    metrics: path of the run's metrics.jsonl.
    """
    rows = read_metrics(metrics) if metrics.exists() else []
    losses = []
    for row in rows:
        # A loss that was not finite is written as null, and spikes stay out as they did in the run.
        if row["step"] <= step and row.get("loss") is not None and "loss_spike" not in row:
            losses.append(row["loss"])
    return losses[-WINDOW:]

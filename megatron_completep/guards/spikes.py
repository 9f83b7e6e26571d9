"""Loss spikes: said, and, where the configuration asks for it, undone by a rollback."""

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

WINDOW, ENOUGH = 50, 10


class LossSpikes(Hook):
    """Says when the loss jumps above the median of the last steps, with the samples that were read, and may take the run back.

    Every rank has the same losses (they come out of a sum over all ranks) and the same window of them, which a resumed run reads from
    the folder's metrics: all decide alike, and alike whether or not the run was interrupted.
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
        self._guards, self._rollbacks, self._exchange, self._metrics, self._say = (
            guards,
            rollbacks,
            exchange,
            metrics,
            say,
        )
        self._recent: deque[float] = deque(maxlen=WINDOW)
        self.rewind(state)

    def rewind(self, state: RunState) -> None:
        self._recent.clear()
        self._recent.extend(
            self._exchange.broadcast(
                recent_losses(self._metrics, state.step) if self._exchange.rank == 0 else None
            )
        )

    def after_step(self, record: StepRecord) -> None:
        loss = record.figures.loss
        above = loss - statistics.median(self._recent) if len(self._recent) >= ENOUGH else 0.0
        report, undo = (
            bound or math.inf
            for bound in (self._guards.spike_threshold, self._guards.rollback_threshold)
        )
        if above > min(report, undo):
            record.loss_spike = above  # and not into the window: a plateau of spikes must not become the norm unnoticed
            last = record.state.consumed_samples
            text = (
                f"step {record.state.step}: loss {loss:.4f} is {above:.2f} above the median of the last "
                f"{len(self._recent)} steps; samples {last - record.samples}-{last - 1}"
            )
            self._say(text)
            if above > undo:
                self._undo(record, text)
        elif math.isfinite(loss):
            self._recent.append(loss)

    def _undo(self, record: StepRecord, text: str) -> None:
        """Go back, or raise RunStopped when that was done often enough. All ranks come here after the same step."""
        if self._rollbacks.left <= 0:
            raise RunStopped(
                f"{text}\nThe run went back {self._guards.max_rollbacks} times already (guards.max_rollbacks). "
                "Look at the samples and at optimizer.base_lr, or remove newer checkpoints to start from an older one.",
                ExitCode.SPIKES,
            )
        state = self._rollbacks.go_back(record.state)
        if state is not None:
            raise GoBack(state)
        self._say(
            f"step {record.state.step}: there is no checkpoint of two steps before or earlier; the run goes on"
        )


def recent_losses(metrics: Path, step: int) -> list[float]:
    """The losses that a run which stands after `step` compares the next one with, oldest first, from its metrics.jsonl."""
    rows = read_metrics(metrics) if metrics.exists() else []
    counted = [
        row["loss"]
        for row in rows
        if row["step"] <= step and row.get("loss") is not None and "loss_spike" not in row
    ]
    return counted[-WINDOW:]

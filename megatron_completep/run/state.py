"""How far a run has come, who saves it, and how it ends."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import IntEnum
from typing import Protocol

from megatron_completep.errors import UserError


@dataclass(frozen=True)
class RunState:
    """Progress of a run, an immutable value.

    A step depends on nothing else but the weights and the optimizer's state: data order and dropout
    are pure functions of the seeds and of these counts, so that no generator state is saved.
    """

    step: int = 0  # optimizer steps done, including those skipped for a non-finite gradient
    consumed_samples: int = 0  # sequences read; reading goes on from here
    tokens: int = 0  # tokens read

    def after_step(self, samples: int, seq_length: int) -> RunState:
        """The state after one more step, of `samples` sequences."""
        return replace(
            self,
            step=self.step + 1,
            consumed_samples=self.consumed_samples + samples,
            tokens=self.tokens + samples * seq_length,
        )


class Checkpointer(Protocol):
    """Saves and loads a run: its model, its optimizer and its configuration.

    Every method is collective unless it says otherwise: all ranks call it.
    """

    def save(self, state: RunState, local: bool = False) -> object:
        """Save the run as it stands after `state.step` steps; writing may go on in the background.

        local: as a snapshot on each node's own disk.
        """

    def take_figures(self) -> dict[str, float]:
        """Return what saving cost since the last call, for the metrics. Not collective."""

    def load_latest(self) -> RunState | None:
        """Load the newest complete checkpoint and return its state; None where there is none."""

    def settled_steps(self) -> list[int]:
        """Wait for the save under way; return the steps of all checkpoints, lowest first."""

    def go_back(self, step: int) -> RunState:
        """Remove the checkpoints after `step`, load the one of that step and return its state."""

    def close(self) -> None:
        """Wait until everything handed to `save` is written or has failed."""


class ExitCode(IntEnum):
    """What the process tells its launcher. docs/reliability.md lists the codes."""

    DONE = 0
    USER_ERROR = 2
    REQUEUE = 75  # stopped early on request, state saved: the same command continues (EX_TEMPFAIL)
    NOT_FINITE = 76  # too many steps in a row without a finite gradient
    HUNG = 77  # the watchdog ended a run that made no progress
    NO_PROGRESS = 78  # several restarts in a row began at the same step
    REPLICAS_DIFFER = 79  # ranks that must hold equal weights do not
    SPIKES = 80  # the loss spiked again after the last rollback that is allowed


class RunStopped(UserError):
    """Raised when a guard ends the run. Printed without a traceback; the exit code says why."""

    def __init__(self, message: str, code: ExitCode):
        super().__init__(message)
        self.exit_code = int(code)


class GoBack(Exception):
    """Raised by a hook, on every rank after the same step, when the run was rolled back.

    Weights and optimizer stand at `state` again.
    """

    def __init__(self, state: RunState):
        super().__init__(f"back to step {state.step}")
        self.state = state

"""How far a run is, who keeps it, and how a run ends."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import IntEnum
from typing import Protocol

from megatron_completep.errors import UserError


@dataclass(frozen=True)
class RunState:
    """Progress of a run, a value: step -> next state. Everything else that a step depends on is weights and optimizer state.

    Data order and dropout are pure functions of the seeds and these counts, so no generator state is kept.
    """

    step: int = 0  # optimizer steps done, those skipped for a gradient that was not finite included
    consumed_samples: int = 0  # sequences read; where the data goes on
    tokens: int = 0  # tokens read

    def after_step(self, samples: int, seq_length: int) -> RunState:
        """The state one step of `samples` sequences later."""
        return replace(
            self,
            step=self.step + 1,
            consumed_samples=self.consumed_samples + samples,
            tokens=self.tokens + samples * seq_length,
        )


class Checkpointer(Protocol):
    """Saves and loads a run; built over the model, the optimizer and the configuration. Every call is collective: all ranks make it."""

    def save(self, state: RunState, local: bool = False) -> object:
        """Save the run as it stands after `state.step` steps; may go on writing in the background. local: as a snapshot on each node."""

    def take_figures(self) -> dict[str, float]:
        """What saving cost since the last call, for the metrics. Not collective."""

    def load_latest(self) -> RunState | None:
        """Put the newest whole checkpoint into model and optimizer and return its state; None where there is none."""

    def settled_steps(self) -> list[int]:
        """Wait for the save under way; the steps of the checkpoints that there are, lowest first."""

    def go_back(self, step: int) -> RunState:
        """Remove the checkpoints after `step` and put that one into model and optimizer."""

    def close(self) -> None:
        """Wait until everything handed to `save` is written, or has failed."""


class ExitCode(IntEnum):
    """What the process tells its launcher. docs/reliability.md lists them."""

    DONE = 0
    USER_ERROR = 2
    REQUEUE = 75  # left early on request, state saved: the same command goes on (EX_TEMPFAIL)
    NOT_FINITE = 76  # too many steps in a row without a finite gradient
    HUNG = 77  # the watchdog ended a run in which no step came
    NO_PROGRESS = 78  # restart after restart found the same step
    REPLICAS_DIFFER = 79  # ranks that must hold equal weights do not
    SPIKES = 80  # the loss spiked again after the last rollback that is allowed


class RunStopped(UserError):
    """A guard ends the run: printed without a traceback; the exit code says which."""

    def __init__(self, message: str, code: ExitCode):
        super().__init__(message)
        self.exit_code = int(code)


class GoBack(Exception):
    """The run stands at an earlier `state` again, weights included: raised by a hook, on every rank after the same step."""

    def __init__(self, state: RunState):
        super().__init__(f"back to step {state.step}")
        self.state = state

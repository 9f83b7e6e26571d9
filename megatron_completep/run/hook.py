"""What happens around the steps of a run: the contract between the loop and whatever listens to it.

A hook hears of every step, in the order of the stages; the loop knows none by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

from megatron_completep.run.state import RunState
from megatron_completep.run.step import StepFigures

Row = Mapping[str, Any]  # the figures of one step, by name


class Stage(IntEnum):
    """When a hook hears of a step. Within a stage the order is that of the list."""

    GUARD = 0  # may end the run, or take it back: what follows a bad step must not happen
    MEASURE = 1  # adds figures to the record
    REPORT = 2  # tells the record to people
    SAVE = 3  # keeps the state, once its figures are told


@dataclass
class StepRecord:
    """One finished step, and what hooks found out about it."""

    state: RunState  # after the step
    figures: StepFigures
    samples: int  # sequences of the step
    seconds: float  # since the step before finished; without what hooks did in between
    data_wait_seconds: float
    loss_spike: float | None = None  # nats above the median of the last losses
    slowest_rank: int | None = None
    slowest_rank_ratio: float | None = None  # its own time over the median rank's
    startup_seconds: Mapping[str, float] = field(
        default_factory=dict
    )  # by phase, with the first step
    validation_loss: float | None = None
    parameterization: Mapping[str, float] = field(
        default_factory=dict
    )  # sizes of activations and updates
    checkpoint: Mapping[str, float] = field(
        default_factory=dict
    )  # what saving cost since the last step

    def found(self) -> Row:
        """What hooks found out, under the names of the metrics; nothing where they found nothing."""
        single = {
            "loss_spike": self.loss_spike,
            "slowest_rank": self.slowest_rank,
            "slowest_rank_ratio": self.slowest_rank_ratio,
        }
        row: dict[str, Any] = {name: value for name, value in single.items() if value is not None}
        row |= {f"startup_{phase}_seconds": value for phase, value in self.startup_seconds.items()}
        if self.startup_seconds:
            row["startup_seconds"] = sum(self.startup_seconds.values())
        if self.validation_loss is not None:
            row["validation_loss"] = self.validation_loss
        return {**row, **self.parameterization, **self.checkpoint}


class Hook:
    """Does nothing; subclasses say what they do, and when."""

    stage = Stage.MEASURE

    def due(self, step: int) -> bool:
        """Whether this hook must see the step before the next one starts (the loop then waits for the device)."""
        return False

    def before_step(self, step: int) -> None:
        """Called before step number `step` is launched."""

    def after_step(self, record: StepRecord) -> None:
        """Called once for every step, in order. May raise `GoBack`, on all ranks after the same step."""

    def rewind(self, state: RunState) -> None:
        """The run went back to `state`; what was heard of later steps does not count."""

    def finish(self, state: RunState) -> None:
        """The run ends as it should: done, or asked to stop."""

    def close(self) -> None:
        """The run ends, whatever the reason."""

"""What happens around the steps of a run: the contract between the loop and its hooks.

Every hook is called after every step, in the order of the stages. The loop knows none of them by
name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

from megatron_completep.run.state import RunState
from megatron_completep.run.step import StepFigures

Row = Mapping[str, Any]  # the figures of one step, by name
Figures = Mapping[str, float]


class Stage(IntEnum):
    """When a hook is called after a step; within a stage the order is that of the list of hooks."""

    GUARD = 0  # may end the run or take it back: what follows a bad step must not happen
    MEASURE = 1  # adds figures to the record
    REPORT = 2  # writes the record where people read it
    SAVE = 3  # saves the state, after its figures were reported


AT_POSITIONS = "validation_loss_at/"  # metrics of a validation by position: FIRST-LAST behind it


@dataclass
class StepRecord:
    """One finished step, and the figures that hooks have added."""

    state: RunState  # after the step
    figures: StepFigures
    samples: int  # sequences of the step
    seconds: float  # since the step before finished, without the time spent in hooks
    data_wait_seconds: float
    loss_spike: float | None = None  # nats above the median of the last losses
    slowest_rank: int | None = None
    slowest_rank_ratio: float | None = None  # time of the slowest rank over the median rank's
    startup_seconds: Figures = field(default_factory=dict)  # by phase, in the first step's record
    validation_loss: float | None = None
    validation_parts: Figures = field(default_factory=dict)  # losses of parts, by metrics name
    parameterization: Figures = field(default_factory=dict)  # sizes of activations and updates
    checkpoint: Figures = field(default_factory=dict)  # cost of saving since the last step

    def added_figures(self) -> Row:
        """The figures that hooks have added, under the names of the metrics; no others."""
        optional = {
            "loss_spike": self.loss_spike,
            "slowest_rank": self.slowest_rank,
            "slowest_rank_ratio": self.slowest_rank_ratio,
        }
        row: dict[str, Any] = {name: value for name, value in optional.items() if value is not None}
        for phase, seconds in self.startup_seconds.items():
            row[f"startup_{phase}_seconds"] = seconds
        if self.startup_seconds:
            row["startup_seconds"] = sum(self.startup_seconds.values())
        if self.validation_loss is not None:
            row.update(validation_figures(self.validation_loss, self.validation_parts))
        return {**row, **self.parameterization, **self.checkpoint}


def validation_figures(loss: float, parts: Figures) -> Figures:
    """The losses of a validation under the names of the metrics.

    parts: of sources and positions, under theirs.
    """
    return {"validation_loss": loss, **parts}


@dataclass
class BeginRecord:
    """What hooks find out before the first step of a start."""

    state: RunState  # where the run goes on
    figures: dict[str, Any] = field(default_factory=dict)  # by the names of the metrics


class Hook:
    """A hook that does nothing; subclasses override what they need."""

    stage = Stage.MEASURE

    def due(self, step: int) -> bool:
        """Whether this hook must be called before the next step starts.

        The loop then waits for the device after `step`.
        """
        return False

    def before_training(self, record: BeginRecord) -> None:
        """Called once, before the first step of this start."""

    def before_step(self, step: int) -> None:
        """Called before step number `step` is launched."""

    def after_step(self, record: StepRecord) -> None:
        """Called once for every step, in order.

        May raise `GoBack`, on all ranks after the same step.
        """

    def rewind(self, state: RunState) -> None:
        """Called when the run went back to `state`: figures of later steps no longer count."""

    def finish(self, state: RunState) -> None:
        """Called when the run ends as it should: all steps are done, or it was asked to stop."""

    def close(self) -> None:
        """Called when the run ends, whatever the reason."""

"""What a run says of a step without an update."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_completep.guards.hooks import SkippedSteps
from megatron_completep.run.state import RunStopped
from megatron_completep.run.step import StepFigures


class NamingOrigin(SkippedSteps):
    """The guard of one process, whose gradients are not looked at."""

    def __init__(self, limit: int, lines: list[str]):
        nothing: Any = None
        super().__init__(nothing, nothing, nothing, nothing, limit, lines.append)

    def _origin(self, record: Any) -> str:
        return "THE PARAMETER"


def skipped(step: int, counted_tokens: int) -> Any:
    figures = StepFigures(math.nan, math.nan, counted_tokens, skipped=True, stop=False)
    return SimpleNamespace(figures=figures, state=SimpleNamespace(step=step))


def test_a_step_without_a_label_says_that_and_another_one_where_the_gradient_broke() -> None:
    lines: list[str] = []
    guard = NamingOrigin(3, lines)
    guard.after_step(skipped(1, counted_tokens=0))
    guard.after_step(skipped(2, counted_tokens=64))
    assert "No label of the step counts" in lines[0] and "THE PARAMETER" not in lines[0]
    assert "THE PARAMETER" in lines[1] and "No label" not in lines[1]  # the control
    with pytest.raises(RunStopped, match="No label of the step counts"):
        guard.after_step(skipped(3, counted_tokens=0))

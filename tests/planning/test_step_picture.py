"""The picture of a step shows schedules that compute everything once,
in an order that works, with the planned bubble.
"""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import pytest

from megatron_completep.config.schema import ParallelConfig
from megatron_completep.planning.scaling import bubble_share
from megatron_completep.planning.step_picture import (
    Action,
    bubble,
    overlap,
    schedule_actions,
    simulate,
)
from megatron_completep.tools import draw_step


@pytest.mark.parametrize(("name", "virtual"), draw_step.SCHEDULES)
@pytest.mark.parametrize(("ranks", "micro_batches"), [(2, 4), (4, 8)])
def test_the_drawn_bubble_is_the_planned_one_and_nothing_is_left_out(
    name, virtual, ranks, micro_batches
):
    actions = schedule_actions(name, ranks, virtual, micro_batches)
    forward = Counter((a.stage, a.micro_batch) for queue in actions for a in queue if a.kind == "F")
    backward = Counter(
        (a.stage, a.micro_batch) for queue in actions for a in queue if a.kind in "BW"
    )
    assert (
        forward
        == backward
        == {
            (stage, number): 1
            for stage in range(ranks * virtual)
            for number in range(micro_batches)
        }
    )
    parallel = ParallelConfig(
        pipeline_parallel_size=ranks, virtual_pipeline_size=virtual, schedule=name
    )
    assert bubble(simulate(actions, virtual)) == pytest.approx(
        bubble_share(parallel, micro_batches)
    )


def test_an_order_that_waits_for_itself_is_noticed():
    """Negative control."""
    with pytest.raises(AssertionError, match="waits for itself"):
        simulate([[Action(0, "B", 0), Action(0, "F", 0)]], 1)


def test_only_the_ends_of_the_traffic_are_exposed():
    spans = overlap([10] * 10, transfer=0.5)
    compute = [span for span in spans if span.lane == 0]
    idle = sum(after.start - before.stop for before, after in pairwise(compute))
    # The last bucket's gradients, the first bucket's parameters.
    assert idle == pytest.approx(0.05 + 0.025)


def test_the_tool_writes_the_picture(programs, tmp_path):
    path = tmp_path / "step.svg"
    programs.output(draw_step.main, "--output", path, "--ranks", 2, "--micro-batches", 4)
    assert "<svg" in path.read_text()[:1000]

"""Chunks of the loss write to the main gradient in the forward pass, in every layout."""

from __future__ import annotations

from typing import Any

import pytest

from tests.parallel.loss_in_chunks import MICRO_BATCHES, difference

LAYOUTS: dict[str, dict[str, Any]] = {
    "tensor": {"world_size": 2, "tensor_parallel_size": 2},
    "1f1b": {"world_size": 2, "pipeline_parallel_size": 2, "schedule": "1f1b"},
    "zero bubble, virtual": {
        "world_size": 2,
        "pipeline_parallel_size": 2,
        "virtual_pipeline_size": 2,
        "schedule": "zero_bubble",
    },
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_gradients_are_those_of_the_loss_at_once(pool: Any, name: str) -> None:
    layout = LAYOUTS[name]
    seen = pool.run(layout["world_size"], difference, layout)
    lent = 0
    for relative_difference, never, often in seen:
        assert relative_difference < 1e-5
        assert never == 0
        lent += often
    # Once a micro-batch on every rank that has the loss.
    holders = layout.get("tensor_parallel_size", 1)
    assert lent == holders * MICRO_BATCHES

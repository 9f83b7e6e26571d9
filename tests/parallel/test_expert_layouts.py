"""Experts over ranks: routing, loss, norm, biases and weights of one process in every layout."""

from __future__ import annotations

import pytest

from tests.parallel.test_feature_pairs import problems, row_of

TWO = "experts, 2 ranks"
ALL = "softmax, shared, all ranks"


@pytest.mark.parametrize(
    "layout, mlp, others",
    [
        ("data 2", TWO, {}),
        # Experts over ranks of which each data rank has several, and over part of them.
        ("tensor 2, sequence, data 2", ALL, {"recomputation": "full", "micro-batch": "2"}),
        ("data 4, optimizer over 2", TWO, {"recomputation": "selective", "documents": "apart"}),
        ("tensor 2, sequence, pipeline 2, 1f1b", TWO, {"dropout": "0.2"}),
        ("pipeline 2, zero-bubble, data 2, optimizer over 1", "experts", {}),
        ("context 2, tensor 2, sequence", TWO, {"recomputation": "full"}),
    ],
)
def test_every_layout_of_experts_equals_one_process(pool, layout, mlp, others):
    row = row_of(layout=layout, mlp=mlp) | others
    assert problems(pool, row) == []

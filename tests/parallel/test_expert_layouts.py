"""Experts over ranks: routing, loss, norm, biases and weights of one process in every layout."""

from __future__ import annotations

import pytest
import torch

from megatron_completep.guards.replicas import who_differs
from tests.parallel.expert_ranks import hashes_with_a_wrong_expert, one_step
from tests.parallel.test_feature_pairs import problems, row_of

TWO = "experts, 2 ranks"
ALL = "softmax, shared, all ranks"


@pytest.mark.parametrize(
    "layout, mlp, others",
    [
        ("data 2", TWO, {}),
        # Experts over ranks of which each data rank has several, and over part of them.
        pytest.param(
            "tensor 2, sequence, data 2",
            ALL,
            {"recomputation": "full", "micro-batch": "2"},
            marks=pytest.mark.slow,
        ),
        ("data 4, optimizer over 2", TWO, {"recomputation": "selective", "documents": "apart"}),
        pytest.param(
            "tensor 2, sequence, pipeline 2, 1f1b", TWO, {"dropout": "0.2"}, marks=pytest.mark.slow
        ),
        ("pipeline 2, zero-bubble, data 2, optimizer over 1", TWO, {}),
        pytest.param(
            "context 2 by heads, tensor 2, sequence",
            TWO,
            {"recomputation": "full"},
            marks=pytest.mark.slow,
        ),
    ],
)
def test_every_layout_of_experts_equals_one_process(pool, layout, mlp, others):
    row = row_of(layout=layout, mlp=mlp) | others
    assert problems(pool, row) == []


SEQUENCE = {"tensor_parallel_size": 2, "sequence_parallel": True}


@pytest.mark.parametrize("forced", [[0, 1], [1, 3]], ids=["a rank without a row", "two alone"])
@pytest.mark.parametrize("recompute", ["none", "full"])
def test_uneven_loads_train_as_in_one_process(pool, forced, recompute):
    """All tokens to two experts, the others without any; then one rank has no row at all."""
    parallel = {"expert_parallel_size": 2}
    ranks = pool.run(2, one_step, parallel, recompute, "float64", forced)
    alone = one_step(0, {}, recompute, "float64", forced)
    passes = 2 if recompute == "full" else 1
    assert [trained.rows for trained in ranks] == (
        [96 * passes, 0] if forced == [0, 1] else [48 * passes, 48 * passes]
    )
    for trained in ranks:
        assert trained.loss == pytest.approx(alone.loss, rel=1e-12)
        assert trained.grad_norm == pytest.approx(alone.grad_norm, rel=1e-12)
        for name, bias in trained.biases.items():
            assert torch.equal(bias, alone.biases[name])


def test_the_norm_counts_every_element_once_over_expert_and_tensor_ranks(pool):
    """Megatron-LM's #5916, where experts beside tensor ranks were counted on one of them only; and
    #6080, where a sum over ranks was left out with experts on one rank.
    """
    alone = one_step(0, {}, "none", "float64", None)
    for ranks in (1, 2):
        parallel = {**SEQUENCE, "expert_parallel_size": ranks}
        for trained in pool.run(2, one_step, parallel, "none", "float64", None):
            assert trained.grad_norm == pytest.approx(alone.grad_norm, rel=1e-12)
            for name, bias in trained.biases.items():
                assert torch.equal(bias, alone.biases[name])
                assert torch.equal(trained.global_loads[name], alone.global_loads[name])
    # Each counted token has two experts.
    assert {int(load.sum()) for load in alone.global_loads.values()} == {2 * alone.counted}


def test_tokens_choose_the_same_experts_on_ranks_in_float32(pool):
    alone = one_step(0, {}, "none", "float32", None)
    parallel = {**SEQUENCE, "expert_parallel_size": 2}
    ranks = pool.run(2, one_step, parallel, "none", "float32", None)
    for layer, choices in alone.choices.items():
        assert len(choices) == 4  # micro-batches
        for number, whole in enumerate(choices):
            # Each rank has its part of the sequence.
            parts = torch.cat([rank.choices[layer][number] for rank in ranks])
            assert torch.equal(parts, whole)
    for trained in ranks:
        assert trained.loss == pytest.approx(alone.loss, rel=1e-5)


def test_the_replica_check_names_the_rank_with_a_wrong_expert(pool):
    """Ranks 1 and 3 hold the same two of four experts."""
    assert who_differs(pool.run(4, hashes_with_a_wrong_expert, -1)) == []
    (line,) = who_differs(pool.run(4, hashes_with_a_wrong_expert, 3))
    assert line.startswith("rank 3 in weights of stage 0, experts of rank 1, slice")

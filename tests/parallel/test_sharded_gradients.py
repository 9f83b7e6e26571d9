"""`parallel.sharding: gradients`: the bits of whole gradients, in the memory of two buckets."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.parallel.features import EXPERTS
from tests.parallel.layouts import Case
from tests.parallel.sharded_gradients import (
    origin_of_a_gradient_that_is_not_finite,
    reads_of_freed_gradients,
    train,
    warnings_of_a_start,
)
from tests.support.configs import TIED_GPT2

BUCKETS = {"bucket_megabytes": 0.01}
CLIPPED = {"grad_clip": 1e-3}  # the norm scales every gradient
MUON = {"type": "muon", "muon": {"base_lr": 0.02, "precision": "master"}}


def pair(
    ranks: int, layout: dict[str, Any] | None = None, steps: int = 5, **settings: Any
) -> tuple[Case, Case]:
    """The same run with whole gradients, and with sharded ones."""
    parallel = {"world_size": ranks, **BUCKETS, **(layout or {})}
    whole = Case(parallel, steps=steps, **settings)
    return whole, replace(whole, layout={**parallel, "sharding": "gradients"})


@pytest.mark.parametrize(
    ("ranks", "layout", "settings"),
    [
        (2, {}, {"model": TIED_GPT2, "optimizer": CLIPPED}),
        (4, {}, {"optimizer": CLIPPED}),
        (4, {"optimizer_shard_size": 2, "gradient_dtype": "bf16"}, {"precision": "bf16"}),
        pytest.param(
            4,
            {"expert_parallel_size": 2, "gradient_dtype": "bf16"},
            {"model": {"moe": EXPERTS}},
            marks=pytest.mark.slow,
        ),
    ],
)
def test_one_micro_batch_gives_the_bits_of_whole_gradients(pool, ranks, layout, settings):
    whole, sharded = pair(ranks, layout, **settings)
    wholes = pool.run(ranks, train, whole)
    for expected, outcome in zip(wholes, pool.run(ranks, train, sharded), strict=True):
        assert outcome.grad_norms == expected.grad_norms
        assert outcome.loads == expected.loads
        assert bool(outcome.loads) == ("moe" in settings.get("model", {}))
        for name, tensor in expected.parameters.items():
            assert torch.equal(outcome.parameters[name], tensor), name


@pytest.mark.parametrize(
    ("layout", "optimizer"),
    [({}, {}), ({"optimizer_shard_size": 2}, MUON)],
)
def test_several_micro_batches_give_the_sums_of_whole_gradients(pool, layout, optimizer):
    whole, sharded = pair(
        4,
        layout,
        2,
        optimizer={"base_eps": 1e-3, **optimizer},
        micro_batches=2,
        precision="float64",
    )
    wholes = pool.run(4, train, whole)
    for expected, outcome in zip(wholes, pool.run(4, train, sharded), strict=True):
        assert outcome.grad_norms == pytest.approx(expected.grad_norms, rel=1e-13)
        for name, tensor in expected.parameters.items():
            error = (outcome.parameters[name] - tensor).norm() / tensor.norm()
            assert error <= 1e-14, name


@pytest.mark.parametrize("model", [{}, TIED_GPT2], ids=["untied", "tied"])
def test_full_gradients_take_the_memory_of_two_buckets_and_a_tied_embedding(pool, model):
    whole, sharded = pair(2, model={"num_layers": 6, **model}, micro_batches=3)
    for outcome in pool.run(2, train, replace(sharded, steps=2)):
        largest = sorted(outcome.bucket_bytes)[-2:]
        assert bool(outcome.reused_bytes) == bool(model)
        assert outcome.live_bytes <= sum(largest) + outcome.reused_bytes
        # The plan also has what arrives beside the shard.
        assert outcome.live_bytes <= outcome.planned_bytes <= 1.8 * outcome.live_bytes
        assert outcome.live_bytes < 0.5 * (sum(outcome.bucket_bytes) + outcome.reused_bytes)
    # Controls: reductions that nobody waits for keep their buffers, and so does the whole.
    for outcome in pool.run(2, train, replace(sharded, steps=1), 10**9):
        assert outcome.live_bytes > sum(sorted(outcome.bucket_bytes)[-2:]) + outcome.reused_bytes
    for outcome in pool.run(2, train, replace(whole, steps=1)):
        assert outcome.live_bytes >= sum(outcome.bucket_bytes) + outcome.reused_bytes


def test_a_freed_gradient_raises_before_a_kernel_sees_it(pool):
    _, sharded = pair(2, micro_batches=2)
    for messages in pool.run(2, reads_of_freed_gradients, sharded):
        assert len(messages) == 3
        assert all("was reduced and freed" in message for message in messages), messages


def test_a_gradient_that_is_not_finite_is_named_by_its_sum(pool):
    _, sharded = pair(2)
    (_, said), (name, also_said) = pool.run(2, origin_of_a_gradient_that_is_not_finite, sharded)
    assert said == also_said
    assert f"Not finite in the sum over ranks: {name};" in said


def test_a_start_says_where_there_is_nothing_to_share(pool):
    whole, sharded = pair(1)
    assert "parallel.sharding = gradients changes nothing" in warnings_of_a_start(0, sharded)
    assert "changes nothing" not in warnings_of_a_start(0, whole)
    for said in pool.run(2, warnings_of_a_start, pair(2)[1]):
        assert "changes nothing" not in said

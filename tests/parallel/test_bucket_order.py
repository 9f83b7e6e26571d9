"""Reductions of gradients start in a fixed order,
and none of them waits for the end of backward for it.
"""

from __future__ import annotations

from typing import Any

import pytest

from megatron_completep.optim.reduction import OVERLAPPED
from tests.parallel.bucket_order import Seen, most_under_way, reductions

TWO_STAGES = {"world_size": 4, "pipeline_parallel_size": 2, "bucket_megabytes": 0.005}
LAYOUTS: dict[str, dict[str, Any]] = {
    "data": {"world_size": 2, "bucket_megabytes": 0.005},
    "gpipe": {**TWO_STAGES, "schedule": "gpipe"},
    "1f1b": {**TWO_STAGES, "schedule": "1f1b"},
    "interleaved": {**TWO_STAGES, "virtual_pipeline_size": 2, "schedule": "interleaved_1f1b"},
    "zero bubble": {**TWO_STAGES, "schedule": "zero_bubble"},
    "zero bubble, virtual": {**TWO_STAGES, "virtual_pipeline_size": 2, "schedule": "zero_bubble"},
}


def check_order(ranks: list[Seen], last: int = 0) -> None:
    """All buckets start, those that come `last` after the others, and both groups as they lie."""
    for seen in ranks:
        order = seen.started_in_step
        first, after = order[: len(order) - last], order[len(order) - last :]
        assert sorted(order) == list(range(seen.buckets))
        assert first == sorted(first) and after == sorted(after)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", LAYOUTS)
def test_every_bucket_is_reduced_as_soon_as_it_is_complete(
    pool: Any, name: str, tied: bool
) -> None:
    """To start each at once, in whatever order, could not start more before backward ends."""
    ranks = pool.run(
        LAYOUTS[name]["world_size"],
        reductions,
        LAYOUTS[name],
        {"num_layers": 8, "tied_embeddings": tied},
    )
    check_order(ranks)
    for seen in ranks:
        assert seen.buckets >= 8
        assert all(complete == started for complete, started in seen.counts)
        assert len(seen.started) == seen.buckets


def test_what_is_not_trained_is_reduced_last_and_holds_up_nothing(pool: Any) -> None:
    model = {"num_layers": 4}
    ranks = pool.run(2, reductions, LAYOUTS["data"], model, "layers.3.mlp")
    for seen in ranks:
        assert all(complete == started for complete, started in seen.counts)
        assert 0 < len(seen.started) < seen.buckets
    check_order(ranks, last=ranks[0].buckets - len(ranks[0].started))


@pytest.mark.parametrize("shards", [2, 1], ids=["shards", "replicas"])
def test_copies_of_buckets_in_the_type_that_is_sent_do_not_pile_up(pool: Any, shards: int) -> None:
    for most, buckets in pool.run(2, most_under_way, shards, OVERLAPPED):
        assert most <= 2 * OVERLAPPED < buckets
    # The control: without waiting, all of them are there when backward ends.
    for most, buckets in pool.run(2, most_under_way, shards, 1000):
        assert most == buckets

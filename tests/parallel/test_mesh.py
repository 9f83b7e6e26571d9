"""The mesh: which axis a rank stands on where, and over whom gradients are summed."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron_completep.config.schema import ParallelConfig
from megatron_completep.errors import ConfigError
from megatron_completep.parallel.axis import Axis
from megatron_completep.parallel.collectives import all_gather
from megatron_completep.parallel.context import ParallelContext, backend_options

AXES = ("tensor", "pipeline", "gradient", "data", "context", "shard", "replica")


def members(rank: int, axis: Axis) -> list[int]:
    """The ranks of the world that an axis connects, as its own group says."""
    return all_gather(torch.tensor([rank]), axis).tolist()


def stand(rank: int, world: int, sizes: dict[str, int]) -> dict[str, tuple[int, list[int]]]:
    """Axis -> (this rank's place, the ranks along it)."""
    parallel = ParallelConfig().model_copy(update=sizes)
    data_size = world // (
        parallel.tensor_parallel_size
        * parallel.pipeline_parallel_size
        * parallel.context_parallel_size
    )
    context = ParallelContext.over_world(parallel, torch.device("cpu"), rank, world, data_size)
    along = {name: context.axis(name) for name in AXES}
    assert context.reduction("gradient").size == context.gradient.size
    return {name: (axis.rank, members(rank, axis)) for name, axis in along.items()}


def expected_places(rank: int, world: int, sizes: dict[str, int]) -> dict[str, Any]:
    """The same from the ranks in one array, pipeline slowest and tensor fastest."""
    tensor = sizes.get("tensor_parallel_size", 1)
    context = sizes.get("context_parallel_size", 1)
    pipeline = sizes.get("pipeline_parallel_size", 1)
    gradient = world // (tensor * pipeline)
    shard = sizes.get("optimizer_shard_size", gradient)
    ranks = torch.arange(world).view(pipeline, gradient, tensor)
    p, g, t = (int(i) for i in (ranks == rank).nonzero()[0])
    neighbours = ranks[p, :, t]
    by_shard = neighbours.view(-1, shard)
    by_context = neighbours.view(-1, context)
    return {
        "tensor": (t, ranks[p, g].tolist()),
        "pipeline": (p, ranks[:, g, t].tolist()),
        "gradient": (g, neighbours.tolist()),
        "data": (g // context, by_context[:, g % context].tolist()),
        "context": (g % context, by_context[g // context].tolist()),
        "shard": (g % shard, by_shard[g // shard].tolist()),
        "replica": (g // shard, by_shard[:, g % shard].tolist()),
    }


MESHES = [
    (4, {"tensor_parallel_size": 2}),
    (4, {"optimizer_shard_size": 2}),
    (4, {"context_parallel_size": 2}),
    (4, {"context_parallel_size": 4, "optimizer_shard_size": 2}),
    (4, {"context_parallel_size": 2, "optimizer_shard_size": 1}),
    (4, {"context_parallel_size": 2, "pipeline_parallel_size": 2}),
    (8, {"context_parallel_size": 2, "optimizer_shard_size": 2, "tensor_parallel_size": 2}),
]


@pytest.mark.parametrize(("world", "sizes"), MESHES, ids=lambda value: str(value))
def test_every_axis_connects_the_ranks_that_it_says(
    pool: Any, world: int, sizes: dict[str, int]
) -> None:
    for rank, places in enumerate(pool.run(world, stand, world, sizes)):
        assert places == expected_places(rank, world, sizes)


def test_shards_that_do_not_divide_the_gradient_axis_are_refused() -> None:
    parallel = ParallelConfig().model_copy(
        update={"context_parallel_size": 2, "optimizer_shard_size": 3}
    )
    with pytest.raises(ConfigError, match=r"optimizer_shard_size = 3 does not divide .* 4\."):
        ParallelContext.over_world(parallel, torch.device("cpu"), 0, 4, 2)


def test_nccl_is_told_its_device_and_gloo_nothing() -> None:
    gpu = torch.device("cuda", 3)
    assert backend_options(gpu) == {"backend": "nccl", "device_id": gpu}
    assert backend_options(torch.device("cpu")) == {"backend": "gloo"}

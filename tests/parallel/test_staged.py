"""Collectives through the host, for several ranks on one GPU: they give what gloo gives."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megatron_completep.parallel.axis import Axis
from megatron_completep.parallel.collectives import start_all_reduce, start_reduce_scatter
from megatron_completep.parallel.staged import STAGED, join_staged
from tests.parallel.layouts import Case, Outcome, train

LAYOUTS = {
    "tensor and sequence": {"tensor_parallel_size": 2, "sequence_parallel": True},
    "pipeline": {"pipeline_parallel_size": 2, "schedule": "1f1b"},
    "data": {"bucket_megabytes": 0.03},
    "experts": {"expert_parallel_size": 2},
}
EXPERTS = {"bias": False, "moe": {"num_experts": 4, "top_k": 2, "ffn_hidden_size": 24}}


def join(rank: int, store: Path) -> None:
    """Leave the pool's group of gloo for a staged one."""
    dist.barrier()  # a rank that leaves at once would break the other's connection under way
    dist.destroy_process_group()
    join_staged(store, rank, 2, timedelta(seconds=100))
    assert dist.get_backend() == STAGED


def train_staged(rank: int, store: Path, case: Case) -> Outcome:
    join(rank, store)
    return train(rank, case)


def sums_before_and_after_waiting(rank: int, store: Path) -> list[list[float]]:
    join(rank, store)
    axis = Axis("data", rank, 2, dist.group.WORLD)
    x = torch.tensor([1.0, 2.0]) * (rank + 1)
    pending = start_all_reduce(x, axis)
    part = torch.zeros(1)
    scattering = start_reduce_scatter(torch.tensor([1.0, 10.0]) * (rank + 1), axis, part)
    before = x.tolist() + part.tolist()
    pending.wait()
    scattering.wait()
    return [before, x.tolist() + part.tolist()]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_ranks_train_to_the_same_bits_through_the_host(pool, tmp_path, layout):
    model = EXPERTS if layout == "experts" else {}
    case = Case({"world_size": 2, **LAYOUTS[layout]}, model, micro_batches=2, steps=2)
    staged = pool.run(2, train_staged, tmp_path / "store", case)
    for found, expected in zip(staged, pool.run(2, train, case), strict=True):
        assert found.losses == expected.losses
        assert found.grad_norms == expected.grad_norms
        for name, parameter in expected.parameters.items():
            assert torch.equal(found.parameters[name], parameter), name


def test_a_result_arrives_when_it_is_waited_for_and_not_before(pool, tmp_path):
    """So a wait that is missing in the trainer cannot pass unseen."""
    for rank, (before, after) in enumerate(
        pool.run(2, sums_before_and_after_waiting, tmp_path / "store")
    ):
        assert before == [rank + 1.0, 2.0 * (rank + 1), 0.0]
        assert after == [3.0, 6.0, [3.0, 30.0][rank]]

"""The gradient norm adds up whole runs of parameters, and still every element that counts once."""

from __future__ import annotations

import pytest
import torch

from megatron_completep import kernels
from tests.support.models import small_setup


def test_parameters_that_all_count_are_one_row_of_the_norm() -> None:
    _, optimizer, _ = small_setup(dtype=torch.float32)
    shards = optimizer.shards
    generator = torch.Generator().manual_seed(0)
    for start, size, _ in shards.counted_table.tolist():
        shards.grad_shard[start : start + size] = torch.randn(size, generator=generator)
    by_parameter = kernels.sum_of_squares(shards.grad_shard, shards.counted_table)
    assert shards.grad_norm_table.shape[0] == 1 < shards.counted_table.shape[0]
    assert shards.sum_of_squares().item() == pytest.approx(by_parameter.item(), rel=1e-7)


def test_a_parameter_that_another_rank_counts_parts_the_rows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    _, optimizer, _ = small_setup(dtype=torch.float32)
    shards = optimizer.shards
    other = shards.segments[len(shards.segments) // 2]
    spec = type(shards.specs[other.name])
    monkeypatch.setattr(spec, "is_primary", lambda self, name, context: name != other.name)
    shards.grad_shard.zero_()
    start = other.shard_start
    shards.grad_shard[start : start + other.size] = 1.0
    assert shards.grad_norm_table.shape[0] == 2 and shards.sum_of_squares().item() == 0.0
    # The control: the whole buffer is not zero.
    assert kernels.sum_of_squares(shards.grad_shard).item() == pytest.approx(other.size)

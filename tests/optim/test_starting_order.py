"""The order in which reductions start does not depend on the order in which gradients come."""

from __future__ import annotations

import random

import pytest
import torch

from megatron_completep.config.schema import ParallelConfig
from tests.support.models import (
    build_model,
    build_optimizer,
    model_config,
    optimizer_config,
    table_for,
)


@pytest.mark.parametrize("seed", range(5))
def test_buckets_start_as_they_lie_whichever_gradient_comes_last(seed: int) -> None:
    model = model_config()
    table = table_for(model)
    gpt = build_model(model, table)
    optimizer = build_optimizer(
        gpt, table, optimizer_config(), parallel=ParallelConfig(bucket_megabytes=0.02)
    )
    shards = optimizer.shards
    buckets = list(range(len(shards.layout.buckets)))
    assert len(buckets) > 5
    optimizer.begin_step(1)
    parameters = list(gpt.parameters())
    random.Random(seed).shuffle(parameters)
    # Nothing of its bucket and of later ones may start before its gradient is there.
    held = parameters.pop()
    (bucket,) = (
        piece.bucket for piece in shards.layout.pieces if shards.parameters[piece.name] is held
    )
    for parameter in parameters:
        gpt.queue.push(parameter, lambda main_grad, first: main_grad.fill_(0.5))
    assert shards.started == buckets[:bucket]
    gpt.queue.push(held, lambda main_grad, first: main_grad.fill_(0.5))
    assert shards.started == buckets
    optimizer.step(1e-3, torch.zeros(()), torch.tensor(1))


def test_a_parameter_without_a_contribution_is_reduced_when_the_step_ends() -> None:
    model = model_config()
    table = table_for(model)
    gpt = build_model(model, table)
    optimizer = build_optimizer(
        gpt, table, optimizer_config(), parallel=ParallelConfig(bucket_megabytes=0.02)
    )
    optimizer.begin_step(1)
    for parameter in gpt.parameters():
        if parameter is not gpt.final_norm.weight:
            gpt.queue.push(parameter, lambda main_grad, first: main_grad.fill_(0.5))
    assert len(optimizer.shards.started) < len(optimizer.shards.layout.buckets)
    optimizer.step(1e-3, torch.zeros(()), torch.tensor(1))
    assert optimizer.shards.started == list(range(len(optimizer.shards.layout.buckets)))
    assert not gpt.final_norm.weight.main_grad.any()

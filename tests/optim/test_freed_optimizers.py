"""A model and its optimizer are freed when nobody holds them any more: sweeps build many in one process."""

from __future__ import annotations

import gc
import weakref

import torch

from megatron_completep.optim.optimizer import DistributedOptimizer
from megatron_completep.parallel.context import ParallelContext
from tests.support.models import (
    build_model,
    completep_config,
    model_config,
    optimizer_config,
    table_for,
)


def buffers_after_a_step(keep: list[object]) -> weakref.ref[torch.Tensor]:
    config = model_config()
    table = table_for(config, completep_config())
    model = build_model(config, table, torch.float32)
    optimizer = DistributedOptimizer(
        [model], table, optimizer_config(), ParallelContext.single(), precision=torch.float32
    )
    tokens = torch.randint(config.vocab_size, (2, config.seq_length))
    optimizer.begin_step(1)
    loss = model(tokens, labels=tokens)
    loss.backward()
    optimizer.step(1e-3, loss, torch.tensor(tokens.numel()))
    if keep:
        keep.append(optimizer)
    return weakref.ref(optimizer.states["exp_avg"])


def test_an_optimizer_that_nobody_holds_is_freed():
    moments = buffers_after_a_step([])
    gc.collect()
    assert moments() is None


def test_an_optimizer_that_somebody_holds_stays():
    """Negative control."""
    keep: list[object] = [None]
    moments = buffers_after_a_step(keep)
    gc.collect()
    assert moments() is not None

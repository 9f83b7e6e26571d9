"""A model and its optimizer are freed when nobody holds them any more:
sweeps build many in one process.
"""

from __future__ import annotations

import gc
import weakref

import torch

from tests.support.models import (
    batch_of,
    small_setup,
    train_step,
)


def buffers_after_a_step(keep: list[object]) -> weakref.ref[torch.Tensor]:
    gpt, optimizer, _ = small_setup(dtype=torch.float32)
    train_step(gpt, optimizer, 1e-3, batch_of(gpt.config))
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

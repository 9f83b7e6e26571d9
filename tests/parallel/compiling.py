"""Workers that train the same small run with and without torch.compile."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron_completep.model.compile import compile_regions
from tests.parallel.counting import build_step, run_config

Result = tuple[list[float], dict[str, Tensor]]


def train_twice(
    rank: int, sections: dict[str, dict[str, Any]], backend: str
) -> tuple[Result, Result, int]:
    """Losses and final parameters without and with compiled regions,
    and how many graphs were compiled.
    """
    return train(rank, sections, None), *train_compiled(rank, sections, backend)


def train_compiled(
    rank: int, sections: dict[str, dict[str, Any]], backend: str
) -> tuple[Result, int]:
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    result = train(rank, sections, backend)
    return result, counters["stats"]["unique_graphs"]


def train(rank: int, sections: dict[str, dict[str, Any]], backend: str | None) -> Result:
    """Three steps of the training step of `pretrain`."""
    step, batches, _ = build_step(rank, run_config(sections))
    if backend is not None:
        for chunk in step.forward_backward.chunks:
            compile_regions(chunk, backend)
    losses = [step.run(batches, number).read().loss for number in (1, 2, 3)]
    step.optimizer.wait_for_parameters()
    return losses, {
        name: p.detach().clone() for name, p in step.optimizer.shards.parameters.items()
    }

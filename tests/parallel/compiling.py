"""Workers that train the same small run with the operators and with the compiled definitions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megatron_completep.kernels import CompiledDefinitions
from tests.parallel.counting import build_step, run_config

Result = tuple[list[float], dict[str, Tensor]]
Sections = dict[str, dict[str, Any]]
Backend = str | Callable[..., Any]


def train_twice(rank: int, sections: Sections, backend: Backend) -> tuple[Result, Result, int]:
    """Losses and final parameters without and with compiled definitions,
    and how many graphs were compiled.
    """
    plain = train(rank, sections, None)
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    compiled = train(rank, sections, CompiledDefinitions(backend))
    assert not counters["graph_break"], counters["graph_break"]
    return plain, compiled, counters["stats"]["unique_graphs"]


def train(rank: int, sections: Sections, compiled: CompiledDefinitions | None) -> Result:
    """Three steps of the training step of `pretrain`."""
    step, batches, _ = build_step(rank, run_config(sections), compiled)
    losses = [step.run(batches, number).read().loss for number in (1, 2, 3)]
    step.optimizer.wait_for_parameters()
    return losses, {
        name: p.detach().clone() for name, p in step.optimizer.shards.parameters.items()
    }

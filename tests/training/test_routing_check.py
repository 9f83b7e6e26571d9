"""What the first batch says of the routers, before anything trains."""

from __future__ import annotations

import pytest
import torch

from megatron_completep.completep import table_of
from megatron_completep.data.loader import Batch
from megatron_completep.errors import ConfigError, ExpertsDoNotFit
from megatron_completep.model.routing import routers
from megatron_completep.parallel import dispatch
from megatron_completep.parallel.context import ParallelContext
from megatron_completep.run.assemble import assemble
from megatron_completep.run.step import TrainingStep
from megatron_completep.training.routing_check import check_routing
from tests.support.configs import small_config

CONFIG = small_config(model={"moe": {"num_experts": 4, "top_k": 1, "first_dense_layers": 1}})
CONTEXT = ParallelContext.single()


def step_of() -> TrainingStep:
    return assemble(CONFIG, CONTEXT, table_of(CONFIG)).step


def batches_of(step: TrainingStep) -> list[Batch]:
    generator = torch.Generator().manual_seed(0)
    shape = CONFIG.training.micro_batch_size, CONFIG.model.seq_length
    tokens = torch.randint(CONFIG.model.vocab_size, shape, generator=generator)
    ones = torch.ones(shape)
    ids = torch.arange(shape[0])
    positions = torch.arange(shape[1]).expand(shape)
    batch = Batch(tokens, tokens, ones, positions, torch.zeros_like(tokens), ids)
    return [batch] * 4


def said_of(step: TrainingStep) -> list[str]:
    lines: list[str] = []
    check_routing(CONFIG, CONTEXT, step, batches_of(step), lines.append)
    return lines


def test_a_router_that_tells_no_experts_apart_is_refused() -> None:
    """The weights of one layer are zero, as in a checkpoint that was made of a dense one."""
    step = step_of()
    router = routers(step.chunks[0])[1]
    router.weight.data.zero_()
    said = r"the router of layer 2 gives all experts the same score"
    with pytest.raises(ConfigError, match=said):
        said_of(step)


def test_experts_without_a_token_are_a_warning_and_others_none() -> None:
    step = step_of()
    assert not [line for line in said_of(step) if "layer 3" in line]
    router = routers(step.chunks[0])[2]
    assert router.bias is not None
    router.bias.data.copy_(torch.tensor([0.0, 0.0, 9.0, 0.0]))
    assert any("layer 3: 0, 1, 3" in line for line in said_of(step))
    assert not router.observers


def test_rows_that_do_not_fit_are_named_with_the_check(monkeypatch: pytest.MonkeyPatch) -> None:
    step = step_of()

    def refuse(*_: object) -> None:
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(dispatch._Spread, "apply", refuse)
    with pytest.raises(ExpertsDoNotFit, match=r"check of the first batch, layer 1: the experts"):
        said_of(step)

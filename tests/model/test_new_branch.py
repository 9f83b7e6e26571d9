"""The test of the design: a new gated branch joins the model without any edit of completep.py.

Its modules declare roles where they create parameters; initial weights, groups and the plan read that, and it trains.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from small_models import batch_of, build_optimizer, completep_config, model_config, optimizer_config, table_for, train_step
from torch import Tensor, nn

from megatron_completep.completep import Table
from megatron_completep.config.schema import ModelConfig
from megatron_completep.errors import ConfigError
from megatron_completep.model.block import Block, pre_norm
from megatron_completep.model.gpt import GPT
from megatron_completep.model.initialize import initialize
from megatron_completep.parallel.context import ParallelContext
from megatron_completep.parallel.layer_context import LayerContext
from megatron_completep.parallel.linear import ColumnParallelLinear, RowParallelLinear
from megatron_completep.parallel.parameter import declare
from megatron_completep.roles import Role


class GatedBranch(nn.Module):
    """down(sigmoid(gate(x)) * value(x) * level): a fused projection of the project, an output projection, and a plain parameter."""

    def __init__(self, model: ModelConfig, table: Table, context: LayerContext, inner: int = 24, base_inner: int = 8):
        super().__init__()
        self.norm = pre_norm(model, Role.PRE_NORM, context)
        parts = {"gate": inner, "value": inner}
        self.gate_and_value = ColumnParallelLinear(model.hidden_size, parts, table.base_hidden_size, True, context)
        self.level = declare(nn.Parameter(torch.ones(inner)), Role.HIDDEN_BIAS)
        self.down = RowParallelLinear(inner, model.hidden_size, base_inner, False, context)

    def forward(self, residual: Tensor) -> Tensor:
        _, x = self.norm(residual)
        gate, value = self.gate_and_value(x).chunk(2, dim=-1)
        return self.down(torch.sigmoid(gate) * value * self.level)


class GatedBlock(Block):
    """A decoder layer with a third branch, added under the same multiplier."""

    def __init__(self, model: ModelConfig, table: Table, context: LayerContext, *rest: str):
        super().__init__(model, table, context, *rest)
        self.gated = GatedBranch(model, table, context)

    def forward(self, residual: Tensor, pending: Tensor | None, *rest) -> tuple[Tensor, Tensor]:
        residual, pending = super().forward(residual, pending, *rest)
        return residual, pending + self.gated(residual)


@pytest.fixture
def gated_model(monkeypatch: pytest.MonkeyPatch) -> tuple[GPT, Table]:
    monkeypatch.setattr("megatron_completep.model.gpt.Block", GatedBlock)
    model = model_config()
    table = table_for(model, completep_config())
    gpt = GPT(model, table, ParallelContext.single())
    initialize(gpt, table, optimizer_config(), 1)
    return gpt.double(), table


def test_a_new_gated_branch_is_initialized_grouped_and_trained_without_editing_completep(gated_model) -> None:
    gpt, table = gated_model  # m_N = 2, m_L = 2, alpha = 1; the branch's inner width is 3 times its base
    assert gpt.layers["1"].gated.down.weight.std().item() == pytest.approx(0.2 / 3**0.5, rel=0.1)
    optimizer = build_optimizer(gpt, table)
    group = optimizer.groups["layers.1.gated.down.weight"]
    assert group.lr_factor == pytest.approx(1 / 3, rel=1e-12)
    assert group.weight_decay == pytest.approx(0.1 * 3, rel=1e-12)
    assert group.eps == pytest.approx(1e-12 / 4, rel=1e-12)
    assert optimizer.groups["layers.1.gated.gate_and_value.weight"].lr_factor == 0.5
    assert (optimizer.groups["layers.1.gated.level"].lr_factor, optimizer.groups["layers.1.gated.level"].weight_decay) == (1.0, 0.0)
    before = {name: p.detach().clone() for name, p in gpt.named_parameters()}
    losses = [train_step(gpt, optimizer, 1e-2, batch_of(gpt.config)).loss.item() for _ in range(15)]
    assert losses[-1] < losses[0] - 1
    assert all((p - before[name]).abs().max() > 0 for name, p in gpt.named_parameters())


def test_gradients_of_the_new_branch_are_right(gated_model) -> None:
    """A finite difference through the whole model, on a direction in each of the new parameters."""
    gpt, _ = gated_model
    tokens, labels = batch_of(gpt.config)
    gpt(tokens, labels=labels).backward()
    for name, parameter in gpt.named_parameters():
        if ".gated." in name and name.startswith("layers.0"):
            gradient = parameter.main_grad if getattr(parameter, "main_grad", None) is not None else parameter.grad
            direction = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
            losses = []
            with torch.no_grad():
                for step in (1e-5, -1e-5):
                    parameter.data.add_(direction, alpha=step)
                    losses.append(gpt(tokens, labels=labels).item())
                    parameter.data.add_(direction, alpha=-step)
            assert (losses[0] - losses[1]) / 2e-5 == pytest.approx((gradient * direction).sum().item(), rel=1e-6), name


def test_a_branch_that_declares_no_role_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    class Careless(Block):
        def __init__(self, *arguments: object):
            super().__init__(*arguments)
            self.extra = nn.Linear(4, 4)

        def forward(self, *arguments: Tensor) -> tuple[Tensor, Tensor]:
            residual, pending = super().forward(*arguments)
            return residual, pending + 0 * F.relu(self.extra.weight.sum())

    monkeypatch.setattr("megatron_completep.model.gpt.Block", Careless)
    model = model_config()
    table = table_for(model, completep_config())
    gpt = GPT(model, table, ParallelContext.single())
    for attempt in (lambda: initialize(gpt, table, optimizer_config(), 1), lambda: build_optimizer(gpt, table)):
        with pytest.raises(ConfigError, match=r"layers\.\d\.extra\.(weight|bias)"):
            attempt()

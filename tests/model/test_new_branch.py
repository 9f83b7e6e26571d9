"""The test of the design: a new gated branch joins the model through its seam,
without an edit of the model or the table.

Its modules declare roles where they create parameters; initial weights, groups and the plan read
that, and it trains.
"""

from __future__ import annotations

from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_completep import kernels
from megatron_completep.completep import Table
from megatron_completep.config.schema import ModelConfig
from megatron_completep.errors import ConfigError
from megatron_completep.model.attention import AttentionInputs
from megatron_completep.model.block import BRANCHES
from megatron_completep.model.gpt import GPT, ChunkRange
from megatron_completep.model.initialize import initialize
from megatron_completep.model.stream import Branch
from megatron_completep.parallel.context import ParallelContext
from megatron_completep.parallel.layer_context import LayerContext
from megatron_completep.parallel.linear import ColumnParallelLinear, RowParallelLinear
from megatron_completep.parallel.own_losses import with_own_loss
from megatron_completep.parallel.parameter import declare
from megatron_completep.roles import Role
from tests.support.models import (
    batch_of,
    build_optimizer,
    group_of,
    model_config,
    optimizer_config,
    table_for,
    train_step,
)


class GatedBranch(nn.Module):
    """down(sigmoid(gate(x)) * value(x) * level):
    a fused projection of the project, an output projection, and a plain parameter.

    Its own loss is 0.1 * sum |gate|.
    """

    def __init__(
        self,
        model: ModelConfig,
        table: Table,
        context: LayerContext,
        layer: int,
        recompute_selectively: bool,
    ):
        super().__init__()
        inner, base_inner = 24, 8
        parts = {"gate": inner, "value": inner}
        self.gate_and_value = ColumnParallelLinear(
            model.hidden_size, parts, table.base_hidden_size, True, context
        )
        self.level = declare(nn.Parameter(torch.ones(inner)), Role.HIDDEN_BIAS)
        self.down = RowParallelLinear(inner, model.hidden_size, base_inner, True, context)
        self.own_losses = context.own_losses
        self.own_losses.declare("gates")

    def forward(self, x: Tensor, inputs: AttentionInputs) -> Branch:
        gate, value = self.gate_and_value(x).chunk(2, dim=-1)
        gate = with_own_loss(gate, 0.1 * gate.abs().sum(), "gates", self.own_losses)
        return Branch(self.down(torch.sigmoid(gate) * value * self.level), self.down.bias)


BRANCHES_AND_GATED = {**BRANCHES, "gated": GatedBranch}


def gated_gpt(
    table: Table, model: ModelConfig, recompute: str = "none", stage: ChunkRange | None = None
) -> GPT:
    gpt = GPT(
        model,
        table,
        ParallelContext.single(),
        stage,
        recompute=recompute,
        branches=BRANCHES_AND_GATED,
    )
    initialize(gpt, table, optimizer_config(), 1)
    return gpt.double()


@pytest.fixture
def gated_model() -> tuple[GPT, Table]:
    model = model_config(bias=True)
    table = table_for(model)
    return gated_gpt(table, model), table


def gradients_of(*gpts: GPT) -> dict[str, Tensor]:
    found = {}
    for name, parameter in (pair for gpt in gpts for pair in gpt.named_parameters()):
        gradient = getattr(parameter, "main_grad", None)
        found[name] = (parameter.grad if gradient is None else gradient).clone()
    return found


def test_a_new_gated_branch_is_initialized_grouped_and_trained_without_editing_completep(
    gated_model,
) -> None:
    gpt, table = (
        gated_model  # m_N = 2, m_L = 2, alpha = 1; the branch's inner width is 3 times its base
    )
    assert gpt.layers["1"].gated.down.weight.std().item() == pytest.approx(0.2 / 3**0.5, rel=0.1)
    optimizer = build_optimizer(gpt, table)
    group = optimizer.groups["layers.1.gated.down.weight"]
    assert group.lr_factor == pytest.approx(1 / 3, rel=1e-12)
    assert group.weight_decay == pytest.approx(0.1 * 3, rel=1e-12)
    assert group.eps == pytest.approx(1e-12 / 4, rel=1e-12)
    assert group_of(optimizer.groups, "layers.1.gated.gate_and_value.weight").lr_factor == 0.5
    level = optimizer.groups["layers.1.gated.level"]
    assert (level.lr_factor, level.weight_decay) == (1.0, 0.0)
    before = {name: p.detach().clone() for name, p in gpt.named_parameters()}
    losses = [train_step(gpt, optimizer, 1e-2, batch_of(gpt.config)).loss.item() for _ in range(15)]
    assert losses[-1] < losses[0] - 0.8
    assert all((p - before[name]).abs().max() > 0 for name, p in gpt.named_parameters())


def objective(gpt: GPT, tokens: Tensor, labels: Tensor) -> float:
    """The loss of the tokens and the branches' own, computed without injecting anything."""
    gates: list[Tensor] = []

    def look(_module: nn.Module, _inputs: object, output: Tensor) -> None:
        gates.append(output.chunk(2, dim=-1)[0].abs().sum())

    hooks = [block.gated.gate_and_value.register_forward_hook(look) for _, block in gpt.blocks()]
    with torch.no_grad():
        loss = gpt(tokens, labels=labels).item()
    for hook in hooks:
        hook.remove()
    return loss + 0.1 * sum(gates).item()


def test_gradients_of_the_new_branch_and_of_its_own_loss_are_right(gated_model) -> None:
    """A finite difference of the whole objective,
    on a direction in each of the new parameters and in what stands before them.
    """
    gpt, _ = gated_model
    tokens, labels = batch_of(gpt.config)
    gpt(tokens, labels=labels).backward()
    gradients = gradients_of(gpt)
    for name, parameter in gpt.named_parameters():
        if ".gated" in name or name in ("embedding.weight", "layers.0.mlp.down.bias"):
            direction = torch.randn(
                parameter.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64
            )
            values = []
            for step in (1e-6, -1e-6):
                parameter.data.add_(direction, alpha=step)
                values.append(objective(gpt, tokens, labels))
                parameter.data.add_(direction, alpha=-step)
            expected = (values[0] - values[1]) / 2e-6
            assert (gradients[name] * direction).sum().item() == pytest.approx(
                expected, rel=1e-5, abs=1e-7
            ), name


def test_an_own_loss_counts_once_a_backward_pass_and_not_without_gradients(gated_model) -> None:
    gpt, table = gated_model
    tokens, labels = batch_of(gpt.config)
    with torch.no_grad():
        gpt(tokens, labels=labels)
    assert gpt.own_losses.take() == {}
    expected = objective(gpt, tokens, labels) - gpt(tokens, labels=labels).item()
    gpt(tokens, labels=labels).backward()
    assert gpt.own_losses.take()["gates"].item() == pytest.approx(expected, rel=1e-12)
    plain = gradients_of(gpt)

    recomputed = gated_gpt(table, gpt.config, "full")
    recomputed(tokens, labels=labels).backward()
    assert recomputed.own_losses.take()["gates"].item() == pytest.approx(expected, rel=1e-12)
    assert all(
        torch.equal(gradient, plain[name]) for name, gradient in gradients_of(recomputed).items()
    )


def test_an_own_loss_of_an_early_stage_needs_no_sum_on_the_last(gated_model) -> None:
    """Two stages by hand: one tensor goes forward, its gradient comes back,
    weight gradients run when the schedule says so.
    """
    gpt, table = gated_model
    tokens, labels = batch_of(gpt.config)
    gpt(tokens, labels=labels).backward()
    whole = gradients_of(gpt)
    first = gated_gpt(table, gpt.config, stage=ChunkRange(0, 2, has_unembedding=False))
    second = gated_gpt(table, gpt.config, stage=ChunkRange(2, 4, has_embedding=False))
    for stage in (first, second):
        stage.queue.deferred = True
    sent = first(tokens)
    received = sent.detach().requires_grad_()
    second(received, labels=labels).backward()
    sent.backward(received.grad)
    for stage in (first, second):
        stage.queue.take()()
    for name, gradient in gradients_of(first, second).items():
        torch.testing.assert_close(gradient, whole[name], rtol=1e-11, atol=1e-12, msg=name)
    sums = [stage.own_losses.take()["gates"] for stage in (first, second)]
    assert sum(sums).item() == pytest.approx(gpt.own_losses.take()["gates"].item(), rel=1e-12)


def test_the_new_branch_goes_through_the_fused_join(
    gated_model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every branch but the stream's first joins in one call with the norm behind it:
    none is added by itself.
    """
    gpt, _ = gated_model
    calls: list[str] = []
    for name in ("scaled_residual_norm", "scaled_add", "norm"):
        original = getattr(kernels, name)
        monkeypatch.setattr(
            kernels, name, lambda *a, n=name, f=original, **k: (calls.append(n), f(*a, **k))[1]
        )
    gpt(batch_of(gpt.config)[0])
    assert Counter(calls) == {"norm": 1, "scaled_residual_norm": 3 * gpt.config.num_layers}


def test_a_branch_that_declares_no_role_is_refused_by_name() -> None:
    class Careless(nn.Module):
        def __init__(self, *_: object):
            super().__init__()
            self.extra = nn.Linear(4, 4)

        def forward(self, x: Tensor, inputs: AttentionInputs) -> Branch:
            return Branch(x + 0 * F.relu(self.extra.weight.sum()))

    model = model_config()
    table = table_for(model)
    gpt = GPT(model, table, ParallelContext.single(), branches={**BRANCHES, "careless": Careless})
    for attempt in (
        lambda: initialize(gpt, table, optimizer_config(), 1),
        lambda: build_optimizer(gpt, table),
    ):
        with pytest.raises(ConfigError, match=r"layers\.\d\.careless\.extra\.(weight|bias)"):
            attempt()

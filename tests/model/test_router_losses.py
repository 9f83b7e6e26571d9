"""The losses that a router has of its own, against a plain definition and torch's autograd."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_completep.completep import Table
from megatron_completep.config.schema import ModelConfig
from megatron_completep.model.gpt import GPT
from megatron_completep.model.loads import shares_of
from megatron_completep.model.router_losses import (
    BALANCE_LOSS,
    ROUTER_Z_LOSS,
    balance_loss,
    router_z_loss,
)
from megatron_completep.model.routing import Routing, observing, routers
from megatron_completep.parallel.cross_entropy import IGNORED
from megatron_completep.parallel.gradients import main_grad_of
from tests.model.test_experts import EXPERTS, furthest, gradients_of
from tests.support.models import batch_of, build_model, completep_config, model_config, table_for
from tests.support.plain_twin import PlainTwin, cross_entropy_sum

BALANCE = 0.3
Z = 0.05
BOTH: dict[str, Any] = {"balance_loss": BALANCE, "router_z_loss": Z}
NO_AXIS: Any = None
# Every other of 3 layers has experts; the proxy has 2 layers, so that m_L = 1.5.
KINDS: dict[str, dict[str, Any]] = {
    "sigmoid, beside a bias": {**EXPERTS, **BOTH, "every": 2},
    "softmax": {**EXPERTS, **BOTH, "every": 2, "gate": "softmax", "balance": "loss"},
}


def model_of(moe: dict[str, Any]) -> ModelConfig:
    return model_config(num_layers=3, moe=moe)


@dataclass(frozen=True)
class TwinWithLogits(PlainTwin):
    """The plain twin, which keeps the logits [B, S, E] of its routers."""

    logits_of: dict[str, Tensor] = field(default_factory=dict)

    def experts(self, x: Tensor, prefix: str) -> Tensor:
        self.logits_of[prefix] = x @ self.weights[f"{prefix}.router.weight"].T
        return super().experts(x, prefix)

    def own_losses(self, labels: Tensor) -> dict[str, Tensor]:
        """Both losses as their papers have them: sequence by sequence, token by token."""
        moe = self.model.moe
        assert moe is not None
        depth = self.model.num_layers / (self.completep.base_num_layers or 1)
        balance = torch.zeros((), dtype=torch.float64)
        squares = torch.zeros((), dtype=torch.float64)
        for prefix, logits in self.logits_of.items():
            bias = self.weights.get(f"{prefix}.router.bias", torch.zeros(()))
            for of_sequence, targets in zip(logits, labels, strict=True):
                rows = of_sequence[targets != IGNORED]
                if not len(rows):
                    continue
                scores = torch.sigmoid(rows) if moe.gate == "sigmoid" else torch.exp(rows)
                shares = scores / scores.sum(1, keepdim=True)
                ranked = scores if moe.gate == "sigmoid" else rows
                frequencies = torch.zeros(moe.num_experts, dtype=torch.float64)
                for row in (ranked + bias).detach():
                    for expert in torch.topk(row, moe.top_k).indices:
                        frequencies[expert] += moe.num_experts / (moe.top_k * len(rows))
                balance = balance + len(rows) * (frequencies * shares.mean(0)).sum()
                squares = squares + torch.exp(rows).sum(1).log().square().sum()
        return {
            BALANCE_LOSS: moe.balance_loss / depth * balance,
            ROUTER_Z_LOSS: moe.router_z_loss / depth * squares,
        }


def twin_of(gpt: GPT) -> tuple[TwinWithLogits, dict[str, Tensor]]:
    weights = {n: p.detach().clone().requires_grad_() for n, p in gpt.named_parameters()}
    return TwinWithLogits(weights, gpt.config, completep_config()), weights


def parts(*wholes: Tensor, size: int) -> list[list[Tensor]]:
    return [list(pieces) for pieces in zip(*(w.split(size) for w in wholes), strict=True)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [1, 4])
def test_every_gradient_is_that_of_the_plain_definition_with_any_size_of_a_micro_batch(
    kind: str, size: int
) -> None:
    """Megatron-LM's #5798, where the loss of a sequence changed with the size of a micro-batch, and
    #6114: what does not count is no load.
    """
    gpt = build_model(model_of(KINDS[kind]))
    tokens, labels = batch_of(gpt.config, batch=4)
    labels[1, 2:] = IGNORED  # sequences of which few tokens count, or none
    labels[2] = IGNORED
    gpt.queue.begin_step(gpt.parameters(), 4 // size)
    reported = 0.0
    for piece, targets in parts(tokens, labels, size=size):
        loss = gpt(piece, labels=targets)
        loss.backward()
        reported += loss.item()
    gpt.queue.finish_step()
    gradients = {n: main_grad_of(p).clone() for n, p in gpt.named_parameters()}

    twin, weights = twin_of(gpt)
    language = cross_entropy_sum(twin.logits(tokens), labels)
    expected = twin.own_losses(labels)
    names = [name for name in weights if not name.endswith("router.bias")]
    trained = [weights[name] for name in names]
    objective = language + sum(expected.values())
    both = torch.autograd.grad(objective, trained, retain_graph=True)
    assert furthest(gradients, dict(zip(names, both, strict=True))) < 1e-10
    # What is reported is the loss of the tokens, and the others by their names.
    assert reported == pytest.approx(language.item(), rel=1e-12)
    values = gpt.own_losses.take()
    assert {n: v.item() for n, v in values.items()} == pytest.approx(
        {n: v.item() for n, v in expected.items()}, rel=1e-12
    )
    # The controls: without either loss the gradients are others.
    for missing in expected.values():
        without = torch.autograd.grad(objective - missing, trained, retain_graph=True)
        assert furthest(gradients, dict(zip(names, without, strict=True))) > 1e-3


def test_the_balance_is_that_of_each_sequence_and_least_where_loads_are_equal() -> None:
    shares = torch.tensor([[0.9, 0.1], [0.1, 0.9]], dtype=torch.float64)
    # Two sequences of one token each, whose loads are one-sided; together they would be equal.
    apart = balance_loss(shares, torch.tensor([[1, 0], [0, 1]]))
    assert apart.item() == pytest.approx(2 * 1.8)
    together = balance_loss(shares, torch.tensor([[1, 1]]))
    assert together.item() == pytest.approx(2 * 1.0)  # a token's is 1 if loads are equal
    counted = torch.tensor([True, False])
    assert balance_loss(shares, torch.tensor([[1, 0], [0, 0]]), counted).item() == pytest.approx(
        1.8
    )
    logits = torch.tensor([[0.0, 0.0], [5.0, 5.0]], dtype=torch.float64)
    assert router_z_loss(logits, counted).item() == pytest.approx(0.6931471805599453**2)


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_a_recomputed_pass_counts_no_loss_twice(recompute: str) -> None:
    tokens, labels = batch_of(model_of(EXPERTS))
    plain = build_model(model_of(KINDS["sigmoid, beside a bias"]))
    _, expected = gradients_of(plain, tokens, labels)
    gpt = build_model(plain.config, recompute=recompute)
    passes: list[int] = []
    with observing(gpt, lambda layer, _: passes.append(layer)):
        _, gradients = gradients_of(gpt, tokens, labels)
    # The control: the router did run again.
    assert sorted(passes) == ([0, 0, 2, 2] if recompute == "full" else [0, 2])
    assert furthest(gradients, expected) < 1e-12
    values = plain.own_losses.take()
    for name, value in gpt.own_losses.take().items():
        assert value.item() == pytest.approx(values[name].item(), rel=1e-14)


def test_a_validation_has_the_loss_of_the_tokens_alone() -> None:
    gpt = build_model(model_of(KINDS["softmax"]))
    without = build_model(
        model_of({**KINDS["softmax"], "balance": "none", **dict.fromkeys(BOTH, 0.0)})
    )
    tokens, labels = batch_of(gpt.config)
    with torch.no_grad():
        assert torch.equal(gpt(tokens, labels=labels), without(tokens, labels=labels))
    assert gpt.own_losses.take() == {}
    assert without.own_losses.names == ()  # no loss is declared where its coefficient is 0
    # Nor does it communicate. The control is a training pass, which asks for the axis.
    for router in routers(gpt):
        router.losses.axes = [NO_AXIS]
    with torch.no_grad():
        gpt(tokens, labels=labels)
    with pytest.raises(AttributeError, match="group"):
        gpt(tokens, labels=labels)
    gpt = build_model(gpt.config)
    gradients_of(gpt, tokens, labels)
    assert set(gpt.own_losses.take()) == {BALANCE_LOSS, ROUTER_Z_LOSS}  # the control


def loss_multiplier(layers: int, **completep: Any) -> float:
    moe = {**EXPERTS, **BOTH}
    table: Table = table_for(
        model_config(num_layers=layers, moe=moe), completep_config(**completep)
    )
    return table.router_loss_multiplier


def test_coefficients_fall_as_the_branches_do_with_depth_and_with_nothing_else() -> None:
    assert [loss_multiplier(layers) for layers in (2, 4, 16)] == [1.0, 0.5, 0.125]
    assert loss_multiplier(8, alpha=0.5) == 0.5
    assert loss_multiplier(8, base_hidden_size=2) == 0.25
    assert loss_multiplier(8, base_num_experts=3, base_top_k=1) == 0.25
    # The controls: rules without a power of the depth have none here either.
    assert loss_multiplier(8, parameterization="mup") == 1.0
    assert loss_multiplier(8, parameterization="sp") == 1.0


def z_over_tokens(layers: int) -> float:
    """The gradient of the routers' z-losses over that of the tokens' loss, of all routers."""
    gradients = []
    for z_loss in (0.0, 1.0):
        moe = {**EXPERTS, "router_z_loss": z_loss}
        # So large that the stream is that of the embedding in every depth.
        model = model_config(num_layers=layers, moe=moe, input_multiplier=100.0)
        gpt = build_model(model, random_vectors=False)
        found = gradients_of(gpt, *batch_of(model, batch=16))[1]
        gradients.append(torch.stack([g for n, g in found.items() if "router.weight" in n]))
    of_tokens, of_both = gradients
    return float((of_both - of_tokens).norm() / of_tokens.norm())


def test_the_gradients_of_tokens_and_routers_fall_alike_with_depth(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The control: by a coefficient that does not know the depth the ratio grows as it."""
    assert z_over_tokens(16) / z_over_tokens(2) == pytest.approx(1, abs=0.25)
    monkeypatch.setattr(Table, "router_loss_multiplier", 1.0)
    assert z_over_tokens(16) / z_over_tokens(2) > 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sigmoids_that_have_all_fallen_to_0_leave_losses_and_gradients_finite(
    dtype: torch.dtype,
) -> None:
    logits = torch.tensor([[-1e4, -2e4], [0.5, -0.5]], dtype=dtype, requires_grad=True)
    scores = logits.sigmoid()
    assert not scores[0].any()
    balance_loss(shares_of(scores), torch.tensor([[2, 0]])).backward()
    assert logits.grad is not None and logits.grad.isfinite().all() and logits.grad[1].all()
    # Of scores that have not, it is the plain quotient, to the bit.
    plain = scores / scores.sum(-1, keepdim=True)
    assert torch.equal(shares_of(scores)[1], plain[1]) and plain[0].isnan().all()
    assert Routing(scores, torch.zeros(2, 1), scores).entropy()[0] == 0

"""The examples of the documentation run, and what they say of transformers is so."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import megatron_completep
from megatron_completep import (
    ResidualNorm,
    Table,
    declare,
    initialize_,
    param_groups,
    table_between,
)
from megatron_completep.kernels import reference
from tests.anywhere.examples import PAGE, all_names, plain_names
from tests.anywhere.test_coordinates import batches_of, llama


def test_both_examples_run_and_give_finite_losses():
    names = plain_names()
    assert len(names["groups"]) == 4 and set(names["roles"].values()) >= {"embedding"}
    assert torch.isfinite(names["loss"])
    names = all_names()
    assert names["table"].residual_multiplier == 0.25
    assert names["table"].logit_multiplier == 0.25
    assert all(torch.isfinite(weight).all() for weight in names["model"].parameters())


def test_the_page_names_every_public_name():
    for name in megatron_completep.__all__:
        assert name == "__version__" or f"`{name}" in PAGE.read_text(), name


def test_the_llama_computes_what_a_granite_with_the_multipliers_computes():
    transformers = pytest.importorskip("transformers")
    with torch.device("meta"):
        base = llama(32, 2, Table())
        table = table_between(llama(64, 4, Table()), base, head_dim=16, base_head_dim=8)
    ours = llama(64, 4, table).double()
    assert len(declare(ours, base=base)) == len(list(ours.parameters()))
    initialize_(ours, table, std=0.1, seed=0)
    settings = ours.config.to_dict()
    config = transformers.GraniteConfig(
        **{name: settings[name] for name in ("hidden_size", "num_hidden_layers", "vocab_size")},
        num_attention_heads=4,
        intermediate_size=192,
        max_position_embeddings=32,
        rms_norm_eps=settings["rms_norm_eps"],
        residual_multiplier=table.residual_multiplier,
        logits_scaling=1 / table.logit_multiplier,
        attention_multiplier=table.attention_scale,
        embedding_multiplier=1.0,
        bos_token_id=None,
        eos_token_id=None,
    )
    granite = transformers.GraniteForCausalLM(config).double()
    granite.load_state_dict(ours.state_dict())
    tokens = batches_of(1, 2, 8)[0][0]
    assert (ours(tokens).logits - granite(tokens).logits).abs().max() < 1e-12
    # Both are declared alike, so that either gets the same groups.
    assert declare(granite, base=base) == declare(ours)
    plain = transformers.LlamaForCausalLM(ours.config).double()
    plain.load_state_dict(ours.state_dict())
    assert (ours(tokens).logits - plain(tokens).logits).abs().max() > 0.01


def test_a_llama_with_a_tied_unembedding_stays_tied():
    pytest.importorskip("transformers")
    make = all_names()["llama"]
    tied = make(32, 2, Table(), tie_word_embeddings=True)
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    assert "lm_head.weight" not in declare(tied)
    # The control: the class's default is not tied.
    assert "lm_head.weight" in declare(make(32, 2, Table()))


@pytest.mark.parametrize("kind", ["rmsnorm", "layernorm"])
def test_the_residual_norm_is_its_definition_with_all_gradients(kind: str):
    torch.manual_seed(0)
    module = ResidualNorm(24, scale=0.3, kind=kind, eps=1e-4, bias=True, dtype=torch.float64)
    with torch.no_grad():
        module.weight.normal_()
        module.bias.normal_()
    stream = torch.randn(3, 5, 24, dtype=torch.float64, requires_grad=True)
    branch = torch.randn(3, 5, 24, dtype=torch.float64, requires_grad=True)
    y, out = module(stream, branch)

    expected_y = stream + 0.3 * branch
    centred = expected_y if kind == "rmsnorm" else expected_y - expected_y.mean(-1, keepdim=True)
    scale = (centred.square().mean(-1, keepdim=True) + 1e-4).rsqrt()
    expected = centred * scale * module.weight + module.bias
    inputs = [stream, branch, module.weight, module.bias]
    factor = torch.randn_like(out)
    ours = torch.autograd.grad((y.square() + out * factor).sum(), inputs)
    theirs = torch.autograd.grad((expected_y.square() + expected * factor).sum(), inputs)
    assert (out - expected).abs().max() < 1e-13
    for mine, other in zip(ours, theirs, strict=True):
        assert (mine - other).abs().max() < 1e-11
    # The first norm has no branch.
    same, first = module(stream)
    assert same is stream
    settings = reference.Norm(kind, 1e-4)
    assert torch.allclose(first, reference.norm(stream, module.weight, module.bias, settings))
    with pytest.raises(ValueError, match="layernorm"):
        ResidualNorm(8, kind="batchnorm")


def test_a_model_with_fused_residual_norms_is_the_model_without():
    table = Table.for_shape(width=32, base_width=16, depth=2, base_depth=1, head_dim=16)
    model = plain_names()["Transformer"](32, 2, table).double()
    fused = Fused(model, table)
    roles = declare(fused)
    assert roles["blocks.0.norms.0.weight"] == "pre_norm" and roles["final.weight"] == "final_norm"
    tokens = batches_of(1, 2, 8)[0][0]
    assert (fused(tokens) - model(tokens)).abs().max() < 1e-13


class FusedBlock(nn.Module):
    def __init__(self, block: Any, scale: float):
        super().__init__()
        self.branches = nn.ModuleList([block.attention, block.mlp])
        norms = []
        for norm in (block.attention_norm, block.mlp_norm):
            fused = ResidualNorm(norm.weight.shape[0], scale, "layernorm", norm.eps, bias=True)
            norms.append(fused.double())
        self.norms = nn.ModuleList(norms)


class Fused(nn.Module):
    """The transformer of the documentation, whose branches end in the next norm."""

    def __init__(self, model: Any, table: Table):
        super().__init__()
        self.embedding, self.positions = model.embedding, model.positions
        scale = table.residual_multiplier
        self.blocks = nn.ModuleList(FusedBlock(block, scale) for block in model.layers)
        width = model.final_norm.weight.shape[0]
        self.final = ResidualNorm(width, scale, "layernorm", 1e-5, bias=True).double()
        self.unembedding, self.multiplier = model.unembedding, model.multiplier

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        stream = self.embedding(tokens) + self.positions.weight[: tokens.shape[1]]
        branch = None
        for block in self.blocks:
            for norm, module in zip(block.norms, block.branches, strict=True):
                stream, normed = norm(stream, branch)
                branch = module(normed)
        logits: torch.Tensor = self.multiplier * self.unembedding(self.final(stream, branch)[1])
        return logits


STEPS = 100
RATES = [2.0**exponent for exponent in (-8, -7, -6, -5)]


def final_loss(depth: int, rate: float, transfers: bool) -> float:
    """The mean loss of the last steps of a Llama, 2 layers being the proxy.

    The learning rate is constant: it is felt more than one that falls to zero.
    """
    table = Table.for_shape(width=32, base_width=32, depth=depth, base_depth=2, head_dim=16)
    if not transfers:
        table = Table(attention_scale=table.attention_scale)
    model = llama(32, depth, table)
    declare(model)
    initialize_(model, table, std=0.02, seed=0)
    optimizer = torch.optim.AdamW(param_groups(model, table, lr=rate))
    losses = []
    for tokens, labels in batches_of(STEPS, 8, 32):
        loss = F.cross_entropy(model(tokens).logits.flatten(0, 1), labels.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    last = losses[-STEPS // 10 :]
    return sum(last) / len(last)


@pytest.mark.slow
def test_the_learning_rate_of_two_layers_holds_at_eight_and_without_the_table_it_breaks():
    proxy = [final_loss(2, rate, True) for rate in RATES]
    deep = [final_loss(8, rate, True) for rate in RATES]
    control_losses = [final_loss(8, rate, False) for rate in RATES]
    # The curves lie on each other, so that whatever is best for the proxy is best at depth.
    assert max(abs(a - b) for a, b in zip(proxy, deep, strict=True)) < 0.05
    best = proxy.index(min(proxy))
    assert deep[best] - min(deep) < 0.02
    # What the proxy bears, two octaves above, breaks a deep model that does not scale its branches.
    assert proxy[-1] - min(proxy) < 0.15 and deep[-1] - min(deep) < 0.15
    assert control_losses[-1] - min(control_losses) > 0.2
    assert all(wrong > right + 0.03 for wrong, right in zip(control_losses, deep, strict=True))

"""E2 and E6 of the parameterization:
the multipliers vanish at the base shape, and sit where folding into the branch puts them.
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_completep import kernels
from megatron_completep.completep import Table
from megatron_completep.config.schema import ModelConfig
from megatron_completep.model.gpt import GPT
from megatron_completep.model.norm import StreamNorm
from tests.support.models import (
    batch_of,
    build_model,
    completep_config,
    model_config,
    optimizer_config,
    small_setup,
    table_for,
    train_step,
)

BASE = {"base_hidden_size": 32, "base_num_layers": 4, "base_head_dim": 8}
SHAPES = [
    {"bias": True, "norm": "layernorm", "activation": "squared_relu", "position": "alibi"},
    {"position": "learned", "activation": "gelu", "tied_embeddings": True},
    {"qk_norm": True, "num_query_groups": 2},
]


def plain_logits(gpt: GPT, tokens: Tensor) -> Tensor:
    """The model composed without any multiplier: x = x + branch(norm(x)), logits = norm(x) W^T."""
    model: ModelConfig = gpt.config

    def norm(x: Tensor, module) -> Tensor:
        return kernels.norm(x, module.weight, module.bias, kernels.Norm(model.norm, model.norm_eps))

    def with_bias(out: Tensor, bias: Tensor | None) -> Tensor:
        return out if bias is None else out + bias

    x = gpt._embed(tokens, None, None)
    inputs = gpt._attention_inputs(x, tokens.shape[1], None, None, None)
    for _, block in gpt.blocks():
        x = x + with_bias(*block.attention(norm(x, block.attention_norm), inputs))
        x = x + with_bias(*block.mlp(norm(x, block.mlp_norm), inputs))
    head = gpt.embedding if model.tied_embeddings else gpt.unembedding
    return F.linear(norm(x, gpt.final_norm), head.weight)[..., : model.vocab_size].transpose(0, 1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_at_the_base_shape_the_forward_is_bitwise_that_of_a_model_without_multipliers(
    shape: dict, dtype: torch.dtype
) -> None:
    model = model_config(**shape)
    tokens, _ = batch_of(model)
    gpt = build_model(model, table_for(model, completep_config(**BASE)), dtype)
    deeper = build_model(
        model, table_for(model, completep_config(**{**BASE, "base_num_layers": 2})), dtype
    )
    wider = build_model(
        model, table_for(model, completep_config(**{**BASE, "base_hidden_size": 16})), dtype
    )
    with torch.no_grad():
        assert torch.equal(gpt(tokens), plain_logits(gpt, tokens))
        assert not torch.equal(deeper(tokens), plain_logits(deeper, tokens))
        assert not torch.equal(wider(tokens), plain_logits(wider, tokens))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_at_the_base_shape_all_parameterizations_train_bitwise_alike(dtype: torch.dtype) -> None:
    finals = []
    for rules in (
        {"alpha": 1.0},
        {"alpha": 0.5},
        {"parameterization": "mup"},
        {"parameterization": "sp"},
    ):
        gpt, optimizer, _ = small_setup(completep={**BASE, **rules}, dtype=dtype)
        for step in range(3):
            train_step(gpt, optimizer, 1e-2, batch_of(gpt.config, step))
        finals.append(optimizer.shards.master.clone())
    assert all(torch.equal(final, finals[0]) for final in finals[1:])
    gpt, optimizer, _ = small_setup(completep={**BASE, "base_num_layers": 2}, dtype=dtype)
    for step in range(3):
        train_step(gpt, optimizer, 1e-2, batch_of(gpt.config, step))
    assert not torch.equal(optimizer.shards.master, finals[0])


def is_branch_output(name: str) -> bool:
    return name.rsplit(".", 1)[0].endswith(("attention.output", "mlp.down"))


@pytest.mark.parametrize(
    "base_num_layers, exact", [(2, True), (3, False)], ids=["power_of_two", "third"]
)
def test_the_multiplier_equals_branch_outputs_scaled_by_it_in_values_and_gradients(
    base_num_layers: int, exact: bool
) -> None:
    """s * (x W_o + b_o) = x (s W_o) + s b_o,
    and then the gradients of W_o and b_o differ by s and no other does.
    """
    model = model_config(bias=True, norm="layernorm", activation="gelu")
    tokens, labels = batch_of(model)
    table = table_for(model, completep_config(base_num_layers=base_num_layers))
    s = table.residual_multiplier
    assert s == base_num_layers / 4
    multiplied = build_model(model, table)
    folded = build_model(model, table_for(model, completep_config(base_num_layers=4)))
    for name, parameter in folded.named_parameters():
        if is_branch_output(name):
            parameter.data.mul_(s)
    losses = [gpt(tokens, labels=labels) for gpt in (multiplied, folded)]
    for loss in losses:
        loss.backward()
    tolerance = 0.0 if exact else 1e-12
    torch.testing.assert_close(losses[0], losses[1], rtol=tolerance, atol=0)
    others = dict(folded.named_parameters())
    for name, parameter in multiplied.named_parameters():
        expected = others[name].main_grad * (s if is_branch_output(name) else 1.0)
        torch.testing.assert_close(
            parameter.main_grad, expected, rtol=tolerance * 100, atol=tolerance
        )


@pytest.mark.parametrize("branch", ["attention.output", "mlp.down"])
def test_a_multiplier_on_one_branch_only_is_told_apart(branch: str) -> None:
    model = model_config()
    tokens, _ = batch_of(model)
    multiplied = build_model(model)
    folded = build_model(model, table_for(model, completep_config(base_num_layers=4)))
    for name, parameter in folded.named_parameters():
        if branch in name:
            parameter.data.mul_(0.5)
    with torch.no_grad():
        assert (multiplied(tokens) - folded(tokens)).abs().max() > 1e-2


def test_the_residual_stream_gradient_is_not_scaled() -> None:
    """With every branch output at zero the gradient of the
    embedding does not depend on the depth multiplier.
    """
    model = model_config(num_layers=4)
    tokens, labels = batch_of(model)
    gradients = []
    for base_num_layers in (1, 4):
        gpt = build_model(
            model, table_for(model, completep_config(base_num_layers=base_num_layers))
        )
        for name, parameter in gpt.named_parameters():
            if is_branch_output(name):
                parameter.data.zero_()
        gpt(tokens, labels=labels).backward()
        gradients.append(gpt.embedding.weight.main_grad)
    assert torch.equal(*gradients)
    assert gradients[0].any()


def test_multipliers_come_from_the_global_shape() -> None:
    model = model_config(num_layers=6)
    table = table_for(model, completep_config(alpha=0.5))
    assert table.residual_multiplier == pytest.approx(3**-0.5, rel=1e-15)
    assert table.logit_multiplier == 0.5
    assert table.attention_scale == pytest.approx(math.sqrt(4) / 8, rel=1e-15)
    gpt = build_model(model, table)
    scales = {norm.join.scale for norm in gpt.modules() if isinstance(norm, StreamNorm)}
    assert scales == {table.residual_multiplier}


def test_no_initial_weight_depends_on_the_depth() -> None:
    """Megatron's extra 1/sqrt(2L) on output projections must not be carried over."""
    optimizer = optimizer_config()
    stds = []
    for layers in (2, 32):
        model = model_config(num_layers=layers, hidden_size=64, ffn_hidden_size=256)
        table: Table = table_for(model)
        gpt = build_model(model, table, optimizer=optimizer)
        block = gpt.blocks()[0][1]
        stds.append(
            [block.attention.output.weight.std().item(), block.mlp.down.weight.std().item()]
        )
        assert stds[-1] == pytest.approx([0.2 / 4**0.5] * 2, rel=0.05)
    assert stds[0] == stds[1]

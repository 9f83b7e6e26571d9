"""Groups, initial weights and roles of models of other trainers."""

from __future__ import annotations

import copy
import io
import math
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F
from torch.testing._internal.distributed.fake_pg import FakeStore

import megatron_completep
from megatron_completep import (
    Role,
    Table,
    declare,
    initialize_,
    muon_param_groups,
    param_groups,
    propose_roles,
    table_between,
)
from megatron_completep.completep.parameterization import DecayRule
from megatron_completep.config.schema import RoleFactors
from megatron_completep.errors import ConfigError
from tests.anywhere.examples import plain_names
from tests.support.models import (
    batch_of,
    build_model,
    build_optimizer,
    model_config,
    optimizer_config,
    table_for,
    train_step,
)

TABLE = Table.for_shape(width=64, base_width=16, depth=4, base_depth=2, head_dim=16)
VALUES: dict[str, Any] = {"lr": 1e-2, "weight_decay": 0.1, "eps": 1e-8, "betas": (0.8, 0.9)}


def plain_model(width: int = 64, depth: int = 4, table: Table = TABLE, **sizes: int) -> nn.Module:
    """The transformer of the documentation, undeclared."""
    model: nn.Module = plain_names()["Transformer"](width, depth, table, **sizes)
    return model


def test_ten_steps_under_adamw_are_those_of_the_trainer_in_float64():
    shape = model_config(
        norm="layernorm",
        activation="gelu",
        position="learned",
        bias=True,
        ffn_hidden_size=128,
        vocab_size=40,
    )
    trainer_table = table_for(shape)
    settings = optimizer_config(
        base_lr=1e-2, base_weight_decay=0.1, base_eps=1e-6, betas=(0.8, 0.9), grad_clip=0.0
    )
    trained = build_model(shape, trainer_table, optimizer=settings)

    # The user's side knows sizes alone.
    table = Table.for_shape(
        width=32, base_width=16, depth=4, base_depth=2, head_dim=8, base_head_dim=4
    )
    plain = plain_model(32, 4, table, vocabulary=40, positions=12, head_dim=8).double()
    plain.load_state_dict(trained.state_dict())
    declare(plain, base=plain_model(16, 2, Table(), vocabulary=40, positions=12, head_dim=4))
    wrong = copy.deepcopy(plain)
    groups = param_groups(plain, table, lr=1e-2, weight_decay=0.1, eps=1e-6, betas=(0.8, 0.9))
    # The control has the values of the proxy, unscaled: the first loss is the same.
    control = torch.optim.AdamW(
        wrong.parameters(), lr=1e-2, weight_decay=0.1, eps=1e-6, betas=(0.8, 0.9)
    )

    optimizer = torch.optim.AdamW(groups)
    trainer_optimizer = build_optimizer(trained, trainer_table, settings)
    differences = []
    wrong_differences = []
    for step in range(10):
        tokens, labels = batch_of(shape, seed=step, ignored=0.0)
        step_result = train_step(trained, trainer_optimizer, 1e-2, (tokens, labels))
        expected = float(step_result.loss)
        differences.append(abs(_step(plain, optimizer, tokens, labels) - expected))
        wrong_differences.append(abs(_step(wrong, control, tokens, labels) - expected))
    assert max(differences) < 1e-12
    assert wrong_differences[0] < 1e-12 and wrong_differences[-1] > 1e-4
    trainer_optimizer.wait_for_parameters()
    for name, weight in trained.named_parameters():
        assert (weight - plain.get_parameter(name)).abs().max() < 1e-12, name


def _step(
    model: nn.Module, optimizer: torch.optim.Optimizer, tokens: torch.Tensor, labels: torch.Tensor
) -> float:
    loss = F.cross_entropy(model(tokens).flatten(0, 1), labels.flatten())
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return float(loss.detach())


def declared(base: bool = True) -> nn.Module:
    model = plain_model()
    declare(model, base=plain_model(16, 2) if base else None)
    return model


def test_groups_are_few_have_the_table_values_and_hold_every_parameter_once():
    model = declared()
    groups = param_groups(model, TABLE, **VALUES)
    names = [name for group in groups for name in group["param_names"]]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())
    # Embeddings and unembedding; norms and biases in blocks; matrices; the final norm.
    assert len(groups) == 4
    by_name = {name: group for group in groups for name in group["param_names"]}
    m_N, m_L = 4.0, 2.0
    expected = {
        "embedding.weight": (1e-2, 0.1, 1e-8 / m_N),
        "layers.3.mlp_norm.bias": (1e-2, 0.0, 1e-8 / m_N / m_L),
        "layers.0.mlp.down.weight": (1e-2 / m_N, 0.1 * m_N, 1e-8 / m_N / m_L),
        "layers.0.mlp.down.bias": (1e-2, 0.0, 1e-8 / m_N / m_L),
        "final_norm.weight": (1e-2, 0.0, 1e-8 / m_N),
        "unembedding.weight": (1e-2, 0.1, 1e-8 / m_N),
    }
    for name, values in expected.items():
        group = by_name[name]
        assert (group["lr"], group["weight_decay"], group["eps"]) == pytest.approx(
            values, rel=1e-15
        )
        assert group["betas"] == (0.8, 0.9) and group["lr_factor"] == group["lr"] / 1e-2
    # Another depth adds no group; half the depth factor shows in the learning rate.
    half = Table.for_shape(width=64, base_width=16, depth=4, base_depth=1, head_dim=16, alpha=0.5)
    rates = {group["lr"] for group in param_groups(model, half, **VALUES)}
    assert rates == {1e-2, 1e-2 * 4**-0.5, 1e-2 / 4 * 4**-0.5}


def test_groups_that_differ_in_eps_alone_stay_apart():
    deep = Table(width_multiplier=1.0, depth_multiplier=8.0)
    groups = param_groups(declared(base=False), deep, **VALUES)
    decayed = {group["eps"] for group in groups if group["weight_decay"] == 0.1}
    assert decayed == {1e-8, 1e-8 / 8}


@pytest.mark.parametrize(
    "make",
    [
        lambda groups: torch.optim.AdamW(groups, lr=1.0),
        lambda groups: torch.optim.NAdam(groups, decoupled_weight_decay=True),
        lambda groups: torch.optim.SGD(groups, momentum=0.5),
    ],
)
def test_torch_optimizers_take_the_groups_and_a_state_returns(make: Any):
    model = declared()
    optimizer = make(param_groups(model, TABLE, **VALUES))
    model(torch.zeros(1, 4, dtype=torch.long)).sum().backward()
    optimizer.step()
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    other = make(param_groups(declared(), TABLE, **{**VALUES, "lr": 5.0}))
    other.load_state_dict(torch.load(file, weights_only=True))
    for ours, theirs in zip(optimizer.param_groups, other.param_groups, strict=True):
        assert ours["lr"] == theirs["lr"] and ours["param_names"] == theirs["param_names"]


def test_a_scheduler_keeps_the_factors_from_warm_up_to_the_end():
    groups = param_groups(declared(), TABLE, **VALUES)
    optimizer = torch.optim.AdamW(groups)
    schedule = torch.optim.lr_scheduler
    warm_up = schedule.LinearLR(optimizer, 0.1, total_iters=4)
    decay = schedule.CosineAnnealingLR(optimizer, 8, eta_min=0.0)
    scheduler = schedule.SequentialLR(optimizer, [warm_up, decay], [4])
    for _ in range(11):
        factors = [group["lr"] / group["lr_factor"] for group in optimizer.param_groups]
        assert factors == pytest.approx([factors[0]] * len(factors), rel=1e-12)
        optimizer.step()
        scheduler.step()
    assert 0 < factors[0] < 1e-2


def test_initial_weights_have_the_table_variance_and_follow_name_and_seed_alone():
    model = declared()
    with torch.no_grad():
        model.final_norm.weight.fill_(0.5)
    initialize_(model, TABLE, std=0.1, seed=1)
    for name, factor in (("embedding", 1.0), ("layers.2.mlp.down", 0.5), ("unembedding", 1.0)):
        weight = model.get_parameter(f"{name}.weight")
        assert float(weight.detach().std()) == pytest.approx(0.1 * factor, rel=0.03)
    assert not model.get_parameter("layers.1.mlp.up.bias").any()
    assert (model.final_norm.weight == 0.5).all(), "norms stay as their modules made them"

    other = declared(base=False)  # the fan-ins of this model grow as its stream does
    initialize_(other, TABLE, std=0.1, seed=1)
    again = plain_model()
    declare(again)
    torch.manual_seed(5)
    initialize_(again, TABLE, std=0.1)
    for name, weight in model.named_parameters():
        if weight.dim() > 1:
            assert torch.equal(weight, other.get_parameter(name))
            assert not torch.equal(weight, again.get_parameter(name))


def test_the_row_of_padding_stays_zero():
    model = nn.Sequential(nn.Embedding(10, 8, padding_idx=3))
    declare(model)
    initialize_(model, Table(), std=1.0, seed=0)
    assert not model[0].weight[3].any() and model[0].weight[2].any()


def test_parameters_that_do_not_train_and_tied_ones_are_counted_once():
    model = plain_model()
    model.unembedding.weight = model.embedding.weight
    model.positions.weight.requires_grad = False
    roles = declare(model)
    assert roles["embedding.weight"] is Role.EMBEDDING
    assert not {"unembedding.weight", "positions.weight"} & set(roles)
    groups = param_groups(model, TABLE, **VALUES)
    assert sum(len(group["params"]) for group in groups) == len(roles)


def test_a_base_of_another_ffn_ratio_gives_each_matrix_its_own_ratio():
    model = plain_model()
    base = plain_model(16, 2)
    for block in base.layers:
        block.mlp.down = nn.Linear(32, 16)
        block.mlp.up = nn.Linear(16, 32)
    declare(model, base=base)
    groups = param_groups(model, TABLE, **VALUES)
    by_name = {name: group["lr"] for group in groups for name in group["param_names"]}
    assert by_name["layers.3.mlp.down.weight"] == 1e-2 * 32 / 256
    assert by_name["layers.3.mlp.up.weight"] == 1e-2 / 4


def test_widths_and_depths_are_read_off_two_models_without_memory():
    with torch.device("meta"):
        table = table_between(plain_model(), plain_model(16, 2), head_dim=16, base_head_dim=4)
    assert (table.width_multiplier, table.depth_multiplier) == (4.0, 2.0)
    assert (table.residual_multiplier, table.logit_multiplier) == (0.5, 0.25)
    assert table.attention_scale == 2 / 16
    # A scale that nobody gave is no number, so that it cannot be used unnoticed.
    assert Table.for_shape(width=4, base_width=2, depth=1, base_depth=1).attention_scale != 1.0
    muP = Table.for_shape(
        width=64, base_width=16, depth=4, base_depth=2, head_dim=16, parameterization="mup"
    )
    assert (muP.residual_multiplier, muP.logit_multiplier) == (1.0, 0.25)
    sp = Table.for_shape(
        width=64, base_width=16, depth=4, base_depth=2, head_dim=16, parameterization="sp"
    )
    assert (sp.logit_multiplier, sp.attention_scale) == (1.0, 0.25)
    assert {group["lr"] for group in param_groups(declared(), sp, **VALUES)} == {1e-2}


class Odd(nn.Module):
    """What cannot be decided: a raw matrix, two outer norms, a bias outside the blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, 8)
        self.pos_emb = nn.Parameter(torch.zeros(1, 4, 8))
        self.first = nn.LayerNorm(8, bias=False)
        self.layers = nn.ModuleList(nn.ModuleDict({"up": nn.Linear(8, 16)}) for _ in range(2))
        self.mix = nn.Parameter(torch.zeros(8, 8))
        self.ln_f = nn.LayerNorm(8, bias=False)
        self.head = nn.Linear(8, 10)


def test_what_cannot_be_decided_is_an_error_that_lists_it_until_it_is_said():
    model = Odd()
    proposal = propose_roles(model)
    assert set(proposal.undecided) == {"first.weight", "mix", "head.bias"}
    assert proposal.roles["pos_emb"] is Role.EMBEDDING
    assert proposal.roles["ln_f.weight"] is Role.FINAL_NORM
    with pytest.raises(ConfigError) as refused:
        declare(model)
    for words in ("first.weight [8]", "mix [8, 8]", "head.bias [10]", "final_norm"):
        assert words in str(refused.value)
    with pytest.raises(ConfigError, match="Call declare"):
        param_groups(model, TABLE, **VALUES)
    # A matrix of no known module may be [in, out] or [out, in].
    said = {"first.weight": "final_norm", "head.bias": Role.FINAL_NORM, "mix": "hidden_weight"}
    with pytest.raises(ConfigError, match=r"mix \[8, 8\]: .*fan-in"):
        declare(model, said)
    declare(model.mix, Role.HIDDEN_WEIGHT, 8, 2)
    del said["mix"]
    roles = declare(model, said)
    assert roles["mix"] is Role.HIDDEN_WEIGHT and roles["layers.1.up.bias"] is Role.HIDDEN_BIAS
    groups = param_groups(model, TABLE, **VALUES)
    (group,) = [group for group in groups if "mix" in group["param_names"]]
    assert group["lr"] == 1e-2 / 4


def test_all_mistakes_of_a_declaration_are_said_at_once():
    with pytest.raises(ConfigError) as refused:
        declare(Odd(), {"mixx": "embedding", "head.*": "unembeding", "first.*": Role.FINAL_NORM})
    for words in (
        "mixx: matches no",
        "Did you mean mix?",
        "Did you mean unembedding?",
        "head.bias",
    ):
        assert words in str(refused.value)
    assert "first.weight [8]" not in str(refused.value)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: param_groups(declared(), TABLE, lr=0.0, eps=-1.0), "2 problems"),
        (lambda: param_groups(declared(), TABLE, lr=1.0, betas=(0.9, 1.0)), "betas"),
        (lambda: param_groups(declared(), Table(width_multiplier=-1.0), lr=1.0), "above 0"),
        (lambda: param_groups(declared(), Table(width_multiplier=3.0), lr=1.0), "table_between"),
        (lambda: initialize_(declared(), TABLE, std=0.0), "std"),
        (lambda: Table.for_shape(width=0, base_width=1, depth=1, base_depth=1), "width = 0"),
        (lambda: declare(plain_model(), base=Odd()), "the base has no parameter"),
        (lambda: table_between(nn.Linear(2, 2), nn.Linear(1, 1)), "no nn.Embedding"),
        (lambda: table_between(nn.Embedding(2, 2), nn.Embedding(2, 1)), "one stack"),
        (lambda: table_between(shared_blocks(), plain_model()), "same block in several places"),
        (lambda: param_groups(declared(), TABLE, lr="1e-3"), "give a number"),
        (lambda: param_groups(declared(), TABLE, lr=1.0, betas=(0.9,)), "two numbers"),
        (lambda: param_groups(declared(), replace(TABLE, rule="moun"), lr=1.0), "adamw, muon"),
        (lambda: initialize_(declared(), Table(base_logit_multiplier=math.nan)), "base_logit"),
        (lambda: initialize_(declared(), Table(decay=DecayRule("taw"))), "Did you mean tau"),
        (lambda: with_factors({"embeding": RoleFactors(lr=2.0)}), "Did you mean embedding"),
        (lambda: with_factors({"embedding": 2.0}), "RoleFactors"),
        (lambda: Table.for_shape(**SIZES, head_dim=0), "head_dim = 0"),
        (lambda: Table.for_shape(**SIZES, alpha=2.0), "alpha = 2.0"),
        (lambda: declare(nn.Parameter(torch.ones(2)), "hiden_weight"), "no role"),
        (lambda: declare(nn.Parameter(torch.ones(2)), Role.HIDDEN_WEIGHT, 2, 0), "base_fan_in"),
        (lambda: declare(plain_model(), base=TABLE), "the proxy's model"),
        (lambda: declare(plain_model(), {"*.up.weight": "pre_norm"}), "a matrix"),
        (lambda: declare(plain_model(), {"*.up.bias": "embedding"}), "a vector"),
    ],
)
def test_what_cannot_be_computed_is_refused(call: Any, words: str):
    with pytest.raises(ConfigError, match=words):
        call()


SIZES: dict[str, Any] = {"width": 64, "base_width": 16, "depth": 4, "base_depth": 2}


def shared_blocks() -> nn.Module:
    """A model that passes every token through one block four times."""
    model = plain_model()
    model.layers = nn.ModuleList([model.layers[0]] * 4)
    return model


def with_factors(own_factors: Any) -> Any:
    return param_groups(declared(), replace(TABLE, own_factors=own_factors), lr=1.0)


def test_a_role_that_is_said_as_a_word_is_the_role():
    model = declared()
    declare(model.layers[0].mlp.up.bias, "hidden_bias")
    declare(model.layers[0].mlp.up.weight, "hidden_weight", 64, 16)
    initialize_(model, TABLE, seed=0)
    assert not model.layers[0].mlp.up.bias.any()
    table = replace(TABLE, rule="muon")
    groups = muon_param_groups(model, table, lr=1.0, muon_lr=1.0)
    names = [name for group in groups.muon for name in group["param_names"]]
    assert "layers.0.mlp.up.weight" in names


def test_decay_that_is_solved_from_tau_knows_the_values_of_its_groups():
    rule = DecayRule("tau", target_tau=2.0, steps=100, base_products={"": 1e-3})
    groups = param_groups(declared(), replace(TABLE, decay=rule), lr=1e-2, weight_decay=0.1)
    decayed = [group for group in groups if group["weight_decay"]]
    assert len(decayed) == 2
    for group in decayed:
        assert 1 / (group["lr"] * group["weight_decay"] * 100) == pytest.approx(2.0)
    with pytest.raises(ConfigError, match="of these groups is 0"):
        param_groups(declared(), replace(TABLE, decay=rule), lr=1e-2, weight_decay=0.2)


class Wrapper(nn.Module):
    """A module in another one; under its own name, as torch.compile puts it."""

    def __init__(self, module: nn.Module, name: str = "_orig_mod"):
        super().__init__()
        self.add_module(name, module)


@pytest.fixture
def two_ranks() -> Iterator[DeviceMesh]:
    """A mesh with this process as the second of two, which send nothing."""
    dist.init_process_group("fake", rank=1, world_size=2, store=FakeStore())
    yield init_device_mesh("cpu", (2,))
    dist.destroy_process_group()


def test_wrapped_and_sharded_models_get_the_weights_of_the_plain_one(two_ranks: DeviceMesh):
    plain = declared()
    initialize_(plain, TABLE, seed=1)

    sharded = plain_model()
    for block in sharded.layers:
        fully_shard(block, mesh=two_ranks)
    fully_shard(sharded, mesh=two_ranks)
    declare(sharded, base=plain_model(16, 2))
    initialize_(sharded, TABLE, seed=1)
    for name, weight in sharded.named_parameters():
        mine = plain.get_parameter(name).chunk(2)[1]
        assert torch.equal(weight.to_local(), mine), name
    groups = param_groups(sharded, TABLE, **VALUES)
    assert [len(group["params"]) for group in groups] == [
        len(group["params"]) for group in param_groups(plain, TABLE, **VALUES)
    ]

    wrapped = Wrapper(plain_model())
    declare(wrapped)
    initialize_(wrapped, TABLE, seed=1)
    assert torch.equal(wrapped._orig_mod.embedding.weight, plain.embedding.weight)
    # The control: a name that no wrapper makes draws other numbers.
    other = Wrapper(plain_model(), "inner")
    declare(other)
    initialize_(other, TABLE, seed=1)
    assert not torch.equal(other.inner.embedding.weight, plain.embedding.weight)
    with pytest.raises(ConfigError, match="the same seed"):
        initialize_(plain, TABLE)


def test_what_does_not_train_keeps_its_row_of_padding():
    model = nn.Sequential(nn.Embedding(4, 2, padding_idx=1))
    model[0].weight.requires_grad_(False).fill_(1.0)
    declare(model)
    initialize_(model, Table(), seed=0)
    assert model[0].weight.eq(1.0).all()


def test_the_public_names_are_there_and_the_package_alone_loads_no_torch():
    assert all(hasattr(megatron_completep, name) for name in megatron_completep.__all__)
    assert not hasattr(megatron_completep, "no_such_name")
    program = "import sys, megatron_completep; print('torch' in sys.modules)"
    root = Path(__file__).parents[2]
    run = subprocess.run(
        [sys.executable, "-c", program], cwd=root, capture_output=True, text=True, check=True
    )
    assert run.stdout == "False\n"

"""E1: role, initial standard deviation, learning rate,
weight decay and epsilon of every parameter of the model, on a grid of shapes.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from typing import Any

import pytest
import torch
from torch import nn

from megatron_completep.completep import table as page
from megatron_completep.config.schema import OverrideConfig
from megatron_completep.errors import ConfigError
from megatron_completep.model.gpt import GPT
from megatron_completep.optim.groups import Group, build_groups
from megatron_completep.parallel.parameter import Spec, declare, spec_of
from megatron_completep.roles import Role
from tests.support.configs import GPT2, PAPER
from tests.support.models import (
    batch_of,
    build_model,
    build_optimizer,
    completep_config,
    model_config,
    model_on_paper,
    optimizer_config,
    plain_table,
    small_setup,
    table_for,
    train_step,
)

SIGMA, ETA, LAMBDA, EPS = 0.02, 0.004, 0.1, 1e-12
GRID = list(itertools.product((1, 2, 4), (1, 2, 8), (0.5, 1.0)))
SMALL_GRID = [(2, 2, 0.5)]  # enough for the negative controls
MODELS: list[dict[str, Any]] = [
    {**GPT2, "qk_norm": True},
    {"num_query_groups": 2, "activation": "swiglu", "tied_embeddings": True},
    PAPER,
    {"moe": {"num_experts": 4, "top_k": 2, "shared_ffn_hidden_size": 32}},
]


def role_of(name: str) -> str:
    """By name, as a reader of the model would say it; the code under test never looks at names."""
    if name.startswith(("embedding.", "positions.")):
        return "embedding"
    if name.startswith("unembedding."):
        return "unembedding"
    if name.startswith("final_norm."):
        return "final_norm"
    if ".router." in name:
        return "balance_bias" if name.endswith("bias") else "router"
    if ".experts." in name:
        return "expert_down" if "down" in name else "expert_up"
    if ".q_norm." in name or ".k_norm." in name:
        return "qk_norm"
    if "_norm." in name:
        return "pre_norm"
    return "hidden_bias" if ".bias" in name else "hidden_weight"


def expected(
    name: str, m_N: float, m_L: float, alpha: float, ffn_ratio: float
) -> tuple[float, float, float, float]:
    """(init std, lr, weight decay, eps) as section 1 of the parameterization writes them."""
    own = ffn_ratio if "mlp.down" in name else m_N
    depth = m_L ** (alpha - 1)
    match role_of(name):
        case "embedding" | "unembedding":
            return SIGMA, ETA, LAMBDA, EPS / m_N
        case "final_norm":
            return 0.0, ETA, 0.0, EPS / m_N
        case "pre_norm" | "hidden_bias":
            return 0.0, ETA * depth, 0.0, EPS / m_N / m_L**alpha
        case "qk_norm":
            return 0.0, ETA * depth, 0.0, EPS / m_L**alpha
        case "router":
            return SIGMA / m_N, ETA / m_N * depth, LAMBDA * m_N, EPS / m_L**alpha
        case "balance_bias":
            return 0.0, ETA, 0.0, EPS
    return SIGMA / own**0.5, ETA / own * depth, LAMBDA * own, EPS / m_N / m_L**alpha


def groups_of(
    m_N: int, m_L: int, alpha: float, changes: dict[str, Any]
) -> tuple[GPT, dict[str, Group]]:
    """A model m_N times as wide and m_L times as deep as its base;
    its MLP is 3 times as wide as the base's. No memory is touched.
    """
    model = model_config(
        **{"hidden_size": 16 * m_N, "num_layers": 2 * m_L, "ffn_hidden_size": 96, **changes}
    )
    table = table_for(model, completep_config(alpha=alpha, base_ffn_hidden_size=32))
    gpt = model_on_paper(model, table)
    optimizer = optimizer_config(
        base_lr=ETA, base_init_std=SIGMA, base_weight_decay=LAMBDA, base_eps=EPS
    )
    return gpt, build_groups(gpt.named_parameters(), table, optimizer)


def differences(grid: list[tuple[int, int, float]]) -> list[str]:
    """Every value on a grid of (m_N, m_L, alpha) that is not what section 1 says, to 1e-12."""
    found = []
    for (m_N, m_L, alpha), changes in itertools.product(grid, MODELS):
        gpt, groups = groups_of(m_N, m_L, alpha, changes)
        names = [
            f"{name}.{part}" if part else name
            for name, p in gpt.named_parameters()
            for part in spec_of(p).logical_parts
        ]
        if sorted(groups) != sorted(names):
            found.append(f"groups {sorted(groups)} are not the parameters {sorted(names)}")
        for name, group in groups.items():
            values = group.init_std, ETA * group.lr_factor, group.weight_decay, group.eps
            wanted = expected(name, m_N, m_L, alpha, 3.0)
            if group.role != role_of(name) or any(
                abs(a - b) > 1e-12 * abs(b) for a, b in zip(values, wanted, strict=True)
            ):
                found.append(f"{group.role} {name} at {m_N, m_L, alpha}: {values} is not {wanted}")
    return found


def test_every_parameter_has_the_values_of_the_paper_on_the_whole_grid() -> None:
    assert differences(GRID) == []
    seen = {
        role_of(name)
        for changes in MODELS
        for name, _ in groups_of(1, 1, 1.0, changes)[0].named_parameters()
    }
    assert seen == {role.value for role in Role}


@pytest.mark.parametrize("role", list(Role))
@pytest.mark.parametrize("cell", ["lr", "eps"])
def test_a_wrong_table_is_found(role: Role, cell: str, monkeypatch: pytest.MonkeyPatch) -> None:
    original = page.RULES["adamw"]

    def wrong(m_N: float, m_L: float, *rest: float) -> dict[Role, page.Row]:
        rows = original(m_N, m_L, *rest)
        return {
            **rows,
            role: dataclasses.replace(rows[role], **{cell: getattr(rows[role], cell) * m_L**-0.25}),
        }

    monkeypatch.setitem(page.RULES, "adamw", wrong)
    found = differences(SMALL_GRID)
    assert found and all(line.startswith(f"{role} ") for line in found)


def test_a_wrongly_declared_fan_in_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fused QKV or gate-and-up matrix has the fan-in of one of its parts,
    and down_proj that of the FFN.
    """
    forgetful = lambda *values, **settings: Spec(*values, **{**settings, "fan_in": None})  # noqa: E731
    monkeypatch.setattr("megatron_completep.parallel.linear.Spec", forgetful)
    assert any("hidden_weight" in line for line in differences(SMALL_GRID))


def test_every_element_is_in_exactly_one_group_of_the_optimizer() -> None:
    gpt = build_model(
        model := model_config(bias=True, norm="layernorm"),
        table := table_for(model),
    )
    optimizer = build_optimizer(gpt, table)
    sizes: Counter[str] = Counter()
    names = list(optimizer.groups)
    for segment in optimizer.shards.part_segments:
        sizes[segment.group] += segment.size
    fused = {".qkv.": ("q", "k", "v"), ".mlp.up.": ("gate", "up")}
    wanted = {}
    for name, p in gpt.named_parameters():
        parts = next((parts for key, parts in fused.items() if key in name), None)
        if parts is None:
            wanted[name] = p.numel()
            continue
        wanted |= {f"{name}.{part}": p.numel() // len(parts) for part in parts}
    assert sizes == wanted
    for name, (lr, decay, eps) in zip(names, optimizer.rule.group_table.tolist(), strict=True):
        group = optimizer.groups[name]
        assert (lr, decay, eps) == (group.lr_factor, group.weight_decay, group.eps)


def test_groups_that_differ_in_eps_alone_stay_apart() -> None:
    """At alpha = 1 and the base width,
    hidden weights and embeddings have the same learning rate and decay.
    """
    _, groups = groups_of(1, 8, 1.0, {"ffn_hidden_size": 32})
    embedding, hidden = groups["embedding.weight"], groups["layers.3.mlp.up.weight.up"]
    assert (embedding.lr_factor, embedding.weight_decay) == (hidden.lr_factor, hidden.weight_decay)
    assert embedding.eps == pytest.approx(8 * hidden.eps, rel=1e-12)
    merged = {(group.lr_factor, group.weight_decay): group for group in groups.values()}
    # What a key of (lr, wd) would lose.
    assert len(merged) < len({(g.lr_factor, g.weight_decay, g.eps) for g in groups.values()})


def test_a_parameter_without_a_role_raises_and_is_named() -> None:
    module = nn.Module()
    module.known = declare(nn.Parameter(torch.ones(2)), Role.PRE_NORM)
    module.unknown = nn.Parameter(torch.ones(2))
    with pytest.raises(ConfigError, match="parameter unknown declares no CompleteP role"):
        build_groups(module.named_parameters(), plain_table(), optimizer_config())


# Overrides.


def groups_with(*overrides: OverrideConfig) -> dict[str, Group]:
    model = model_config(num_layers=12, num_attention_heads=2, hidden_size=8)
    gpt = model_on_paper(model)
    settings = optimizer_config(overrides=list(overrides))
    return build_groups(gpt.named_parameters(), gpt.table, settings)


def test_overrides_multiply_what_their_pattern_matches_and_nothing_else() -> None:
    plain = groups_with()
    changed = groups_with(
        OverrideConfig(pattern="layers.1.*", lr=0.5),
        OverrideConfig(
            pattern="*.mlp.down.weight", lr=4.0, weight_decay=0.0, eps=100.0, init_std=3.0
        ),
    )
    for name, group in plain.items():
        first, second = name.startswith("layers.1."), name.endswith(".mlp.down.weight")
        assert changed[name].lr_factor == group.lr_factor * (0.5 if first else 1) * (
            4.0 if second else 1
        ), name
        assert changed[name].weight_decay == group.weight_decay * (0.0 if second else 1), name
        assert changed[name].eps == group.eps * (100.0 if second else 1), name
        assert changed[name].init_std == group.init_std * (3.0 if second else 1), name
    # layers.1.* is not layers.11
    assert plain["layers.11.mlp.up.weight.up"] == changed["layers.11.mlp.up.weight.up"]


def test_an_override_reaches_one_part_and_counts_once_where_it_matches_both_names() -> None:
    plain = groups_with()
    changed = groups_with(
        OverrideConfig(pattern="layers.1.attention.qkv.weight.k", lr=0.5),
        OverrideConfig(pattern="*.mlp.up.weight*", weight_decay=3.0),
    )
    for name, group in plain.items():
        lr = 0.5 if name == "layers.1.attention.qkv.weight.k" else 1.0
        decay = 3.0 if ".mlp.up.weight" in name else 1.0
        assert changed[name].lr_factor == group.lr_factor * lr, name
        assert changed[name].weight_decay == group.weight_decay * decay, name


def test_parts_that_nothing_tells_apart_are_one_segment_and_others_are_cut() -> None:
    """So AdamW's launches, and every bit of its results, are those of whole parameters."""
    whole = {"layers.0.attention.qkv.weight": 3072, "layers.0.mlp.up.weight": 3072}
    for overrides, parts in (([], 1), ([OverrideConfig(pattern="layers.0.*.k", lr=0.5)], 3)):
        _, optimizer, _ = small_setup(optimizer={"overrides": overrides})
        (table,) = optimizer.rule.segment_tables
        names = list(optimizer.groups)
        rows = [(names[group], length) for _, length, group in table.tolist()]
        for name, size in whole.items():
            cut = parts if "qkv" in name else 1
            lengths = [length for group, length in rows if group.startswith(name)]
            assert len(lengths) == cut and sum(lengths) == size


def test_an_override_of_one_part_changes_the_updates_of_that_part_alone() -> None:
    moved = []
    for overrides in ([], [OverrideConfig(pattern="layers.0.attention.qkv.weight.k", lr=0.5)]):
        gpt, optimizer, _ = small_setup(optimizer={"overrides": overrides})
        before = gpt.layers["0"].attention.qkv.weight.detach().clone()
        train_step(gpt, optimizer, 1e-2, batch_of(gpt.config))
        change = gpt.layers["0"].attention.qkv.weight.detach() - before
        moved.append(change.split([32, 32, 32]))
    for part, factor in enumerate((1.0, 0.5, 1.0)):
        torch.testing.assert_close(moved[1][part], moved[0][part] * factor, rtol=1e-12, atol=1e-16)


def test_the_initial_weights_of_one_part_can_be_larger() -> None:
    plain = build_model(model_config())
    name = "layers.0.attention.qkv.weight.v"
    settings = optimizer_config(overrides=[OverrideConfig(pattern=name, init_std=2.0)])
    changed = build_model(model_config(), optimizer=settings)
    for part, factor in enumerate((1.0, 1.0, 2.0)):
        pair = [
            m.layers["0"].attention.qkv.weight.split([32, 32, 32])[part] for m in (plain, changed)
        ]
        assert torch.equal(pair[1], pair[0] * factor)

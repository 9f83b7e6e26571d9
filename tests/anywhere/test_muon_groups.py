"""Groups for torch's Muon beside AdamW."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from megatron_completep import Table, declare, initialize_, muon_param_groups, param_groups
from megatron_completep.errors import ConfigError
from tests.anywhere.test_groups import plain_model

SIZES: dict[str, Any] = {"width": 64, "base_width": 16, "depth": 4, "base_depth": 2}
TABLE = Table.for_shape(**SIZES, head_dim=16, rule="muon")
VALUES: dict[str, Any] = {"lr": 1e-2, "muon_lr": 0.1, "muon_weight_decay": 0.5}


def declared() -> nn.Module:
    model = plain_model()
    declare(model)
    initialize_(model, TABLE, std=0.1, seed=0)
    return model


@pytest.mark.parametrize("alpha", [1.0, 0.5])
def test_a_step_of_torchs_muon_moves_each_matrix_by_the_table(alpha: float):
    table = Table.for_shape(**SIZES, head_dim=16, rule="muon", alpha=alpha)
    model = declared()
    groups = muon_param_groups(model, table, **{**VALUES, "muon_weight_decay": 0.0})
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    for weight in model.parameters():
        weight.grad = torch.randn_like(weight)
    torch.optim.Muon(groups.muon).step()
    for name, weight in model.named_parameters():
        moved = before[name] - weight.detach()
        if "layers" not in name or weight.dim() < 2:
            assert not moved.any(), name
            continue
        # torch's Newton-Schulz leaves singular values near 1: of the mean's, which has no scale.
        d_out, d_in = weight.shape
        size = float(moved.square().sum().sqrt()) / math.sqrt(min(d_out, d_in))
        expected = 0.1 * math.sqrt(d_out / d_in) * 2.0 ** (alpha - 1)
        assert 0.75 * expected < size < 1.25 * expected, name


def test_all_matrices_decay_alike_and_all_else_is_adamws():
    model = declared()
    groups = muon_param_groups(model, TABLE, **VALUES)
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    for weight in model.parameters():
        weight.grad = torch.zeros_like(weight)
    torch.optim.Muon(groups.muon).step()
    for name, weight in model.named_parameters():
        is_matrix = "layers" in name and weight.dim() == 2
        factor = 1 - 0.1 * 0.5 if is_matrix else 1.0
        assert torch.allclose(weight, factor * before[name], rtol=1e-5, atol=0), name
    ours = {name: group for group in groups.adamw for name in group["param_names"]}
    adamw = Table.for_shape(**SIZES, head_dim=16)
    theirs = param_groups(model, adamw, lr=1e-2)
    names = [name for group in theirs for name in group["param_names"]]
    assert set(names) - set(ours) == {
        name for group in groups.muon for name in group["param_names"]
    }
    for group in theirs:
        for name in set(group["param_names"]) & set(ours):
            assert ours[name]["lr"] == group["lr"] and ours[name]["eps"] == group["eps"]


def test_one_optimizer_for_both_kinds_and_a_table_of_the_other_rule_are_refused():
    model = declared()
    with pytest.raises(TypeError):
        torch.optim.AdamW(muon_param_groups(model, TABLE, **VALUES))
    with pytest.raises(ConfigError, match="muon_param_groups"):
        param_groups(model, TABLE, lr=1e-2)
    with pytest.raises(ConfigError, match="not Muon's"):
        muon_param_groups(model, Table(width_multiplier=4.0), **VALUES)
    with pytest.raises(ConfigError, match="2 problems"):
        muon_param_groups(model, TABLE, lr=1e-2, muon_lr=-1.0, muon_momentum=1.0)

"""The table against section 1 of the parameterization, row by row,
written here a second time with exponents instead of code.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import subprocess
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_completep.completep import Factors, Table, table_of
from megatron_completep.completep import table as page
from megatron_completep.config.bare import bare_config
from megatron_completep.config.schema import (
    CompletePConfig,
    ModelConfig,
    OptimizerConfig,
    RoleFactors,
)
from megatron_completep.errors import ConfigError
from megatron_completep.parallel.parameter import declare, spec_of
from megatron_completep.roles import Role
from tests.support.models import plain_table, table_for

# Exponents of (m_N global, the matrix's own ratio, m_L), in m_L as constant + slope * alpha; None:
# no decay, or a constant start. From Table 1 of arXiv 2505.01618 with the epsilon rows of its later
# print; QK-norm from arXiv 2512.22382.
EXPONENTS = {
    #                 init std        lr              weight decay     eps
    "embedding":     [(0, 0, 0, 0), (0, 0, 0, 0),   (0, 0, 0, 0), (-1, 0, 0, 0)],
    "pre_norm":      [None,           (0, 0, -1, 1),  None,           (-1, 0, 0, -1)],
    "hidden_weight": [(0, -0.5, 0, 0), (0, -1, -1, 1), (0, 1, 0, 0),  (-1, 0, 0, -1)],
    "hidden_bias":   [None,           (0, 0, -1, 1),  None,           (-1, 0, 0, -1)],
    "final_norm":    [None,           (0, 0, 0, 0),   None,           (-1, 0, 0, 0)],
    "unembedding":   [(0, 0, 0, 0), (0, 0, 0, 0),   (0, 0, 0, 0), (-1, 0, 0, 0)],
    "qk_norm":       [None,           (0, 0, -1, 1),  None,           (0, 0, 0, -1)],
    # Of as many experts as the proxy has, of its inner width.
    "router":        [(0, -1, 0, 0), (0, -1, -1, 1), (0, 1, 0, 0),  (0, 0, 0, -1)],
    "expert_up":     [(0, -0.5, 0, 0), (0, -1, -1, 1), (0, 1, 0, 0),  (0, 0, 0, -1)],
    "expert_down":   [(0.5, -1, 0, 0), (0, -1, -1, 1), (0, 1, 0, 0),  (-1, 0, 0, -1)],
    "balance_bias":  [None,           (0, 0, 0, 0),   None,           (0, 0, 0, 0)],
}  # fmt: skip
GRID = list(itertools.product((1.0, 2.0, 4.0), (1.0, 2.0, 8.0), (0.5, 0.75, 1.0), (1.0, 3.0)))


def expected(role: str, m_N: float, m_L: float, alpha: float, ratio: float) -> Factors:
    def power(exponents: tuple[float, float, float, float] | None) -> float:
        if exponents is None:
            return 0.0
        n, own, constant, slope = exponents
        return math.exp(
            n * math.log(m_N) + own * math.log(ratio) + (constant + slope * alpha) * math.log(m_L)
        )

    return Factors(*map(power, EXPONENTS[role]))


def differences() -> Iterator[str]:
    """Every cell of the grid in which the table differs from EXPONENTS by more than 1e-12."""
    for (m_N, m_L, alpha, ratio), role in itertools.product(GRID, Role):
        table = plain_table(width_multiplier=m_N, depth_multiplier=m_L, alpha=alpha)
        found, wanted = table.factors(role, ratio), expected(role, m_N, m_L, alpha, ratio)
        for cell in dataclasses.fields(Factors):
            a, b = getattr(found, cell.name), getattr(wanted, cell.name)
            if abs(a - b) > 1e-12 * max(1.0, abs(b)):
                yield f"{role} {cell.name} at {m_N, m_L, alpha, ratio}: {a} is not {b}"


def test_every_cell_of_the_table_equals_the_paper() -> None:
    assert set(EXPONENTS) == {role.value for role in Role}
    assert list(differences()) == []


@pytest.mark.parametrize("role", list(Role))
@pytest.mark.parametrize(
    "cell, column",
    [("init_std", "variance"), ("lr", "lr"), ("weight_decay", "weight_decay"), ("eps", "eps")],
)
def test_a_wrong_entry_in_any_cell_is_found(
    role: Role, cell: str, column: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = page.RULES["adamw"]

    def wrong(*arguments: float) -> dict[Role, page.Row]:
        rows = original(*arguments)
        m_L = arguments[1]
        return {
            **rows,
            role: dataclasses.replace(
                rows[role], **{column: getattr(rows[role], column) * m_L**0.1 + (m_L - 1) * 1e-9}
            ),
        }

    monkeypatch.setitem(page.RULES, "adamw", wrong)
    assert any(f"{role} {cell}" in difference for difference in differences())


def model(**changes: Any) -> ModelConfig:
    sizes = {
        "hidden_size": 512,
        "num_layers": 16,
        "num_attention_heads": 8,
        "ffn_hidden_size": 2048,
        "vocab_size": 100,
        "seq_length": 32,
    }
    return ModelConfig.model_validate({**sizes, **changes})


BASE = {"base_hidden_size": 128, "base_num_layers": 2, "base_head_dim": 32}


def all_factors(table: Table, ratio: float = 4.0) -> list[Factors]:
    return [table.factors(role, ratio) for role in Role]


def test_mup_is_the_table_without_depth() -> None:
    mup = table_for(model(), CompletePConfig(parameterization="mup", **BASE))
    same_depth = table_for(model(num_layers=2), CompletePConfig(**BASE))
    assert (mup.residual_multiplier, mup.logit_multiplier) == (1.0, 0.25)
    assert all_factors(mup) == all_factors(same_depth)
    assert mup.factors(Role.HIDDEN_WEIGHT, 4.0) == Factors(0.5, 0.25, 4.0, 0.25)
    assert all_factors(mup) != all_factors(table_for(model(), CompletePConfig(**BASE)))


def test_sp_scales_nothing() -> None:
    sp = table_for(model(), CompletePConfig(parameterization="sp", **BASE))
    assert (sp.residual_multiplier, sp.logit_multiplier) == (1.0, 1.0)
    for role, factors in zip(Role, all_factors(sp), strict=True):
        vector = EXPONENTS[role][0] is None
        assert factors == Factors(0.0 if vector else 1.0, 1.0, 0.0 if vector else 1.0, 1.0)


def test_at_the_base_shape_every_factor_is_exactly_one() -> None:
    base = table_for(
        model(hidden_size=128, num_layers=2, num_attention_heads=4, ffn_hidden_size=512),
        CompletePConfig(**BASE),
    )
    assert (base.residual_multiplier, base.logit_multiplier) == (1.0, 1.0)
    assert all_factors(base, 1.0) == all_factors(
        table_for(model(), CompletePConfig(parameterization="sp", **BASE))
    )


def test_multipliers_of_completep() -> None:
    table = table_for(model(), CompletePConfig(**BASE))
    assert (table.width_multiplier, table.depth_multiplier) == (4.0, 8.0)
    assert (table.residual_multiplier, table.logit_multiplier) == (1 / 8, 1 / 4)
    assert table_for(
        model(), CompletePConfig(alpha=0.5, **BASE)
    ).residual_multiplier == pytest.approx(8**-0.5, rel=1e-15)
    assert table_for(model(logit_multiplier=3.0), CompletePConfig(**BASE)).logit_multiplier == 0.75


@pytest.mark.parametrize(
    "parameterization, rule, scale",
    [
        ("completep", "base_head_dim", math.sqrt(32) / 64),
        ("mup", "base_head_dim", math.sqrt(32) / 64),
        ("completep", "1/head_dim", 1 / 64),
        ("mup", "1/head_dim", 1 / 64),
        ("completep", "1/sqrt(head_dim)", 1 / 8),
        ("sp", "base_head_dim", 1 / 8),
        ("sp", "1/head_dim", 1 / 8),
        ("sp", "1/sqrt(head_dim)", 1 / 8),
    ],
)
def test_attention_scale(parameterization: str, rule: str, scale: float) -> None:
    completep_config = CompletePConfig.model_validate(
        {"parameterization": parameterization, **BASE}
    )
    shape = ModelConfig.model_validate({**model().model_dump(), "attention_scale": rule})
    assert table_for(shape, completep_config).attention_scale == pytest.approx(scale, rel=1e-15)


@given(st.integers(1, 512))
def test_attention_scale_at_the_base_head_size_is_that_of_sp_to_the_last_bit(head_dim: int) -> None:
    scales = {
        table_for(
            model(head_dim=head_dim),
            CompletePConfig.model_validate(
                {"parameterization": p, **BASE, "base_head_dim": head_dim}
            ),
        ).attention_scale
        for p in ("completep", "mup", "sp")
    }
    assert scales == {1 / math.sqrt(head_dim)}


@given(st.floats(0.5, 64), st.floats(0.5, 64), st.floats(0.5, 64))
def test_decay_times_learning_rate_is_constant_at_alpha_one(
    m_N: float, m_L: float, ratio: float
) -> None:
    """Coupled decay: what a step takes off every decayed tensor does not depend on the shape."""
    table = plain_table(width_multiplier=m_N, depth_multiplier=m_L, alpha=1.0)
    for role in (Role.EMBEDDING, Role.HIDDEN_WEIGHT, Role.UNEMBEDDING):
        factors = table.factors(role, ratio)
        assert factors.lr * factors.weight_decay == pytest.approx(1.0, rel=1e-12)
    below = plain_table(width_multiplier=m_N, depth_multiplier=m_L, alpha=0.5).factors(
        Role.HIDDEN_WEIGHT, ratio
    )
    # Table 1 does not correct it
    assert below.lr * below.weight_decay == pytest.approx(m_L**-0.5, rel=1e-12)


def test_a_matrix_uses_its_own_ratio_and_eps_the_global_one() -> None:
    table = table_for(
        model(ffn_hidden_size=3072), CompletePConfig(base_ffn_hidden_size=512, **BASE)
    )
    assert table.base_ffn_hidden_size == 512
    factors = table.factors(Role.HIDDEN_WEIGHT, 3072 / 512)
    assert (factors.lr, factors.weight_decay, factors.init_std) == (
        pytest.approx(1 / 6),
        6.0,
        pytest.approx(6**-0.5),
    )
    assert factors.eps == pytest.approx(1 / 4 / 8)


def test_a_missing_base_ffn_size_follows_this_model_s_ratio() -> None:
    table = table_for(model(ffn_hidden_size=1536), CompletePConfig(**BASE))
    assert table.base_ffn_hidden_size == 384


# Batch and duration: Complete(d)P.


def table_at(completep: CompletePConfig, batch_tokens: int, total_tokens: int) -> Table:
    """The table of a run of so many tokens, in samples of 32."""
    training = {
        "global_batch_size": batch_tokens // 32,
        "train_steps": total_tokens // batch_tokens,
    }
    return table_of(bare_config(model(), completep=completep, training=training))


def test_batch_and_duration_factors() -> None:
    """m_B = 4, m_D = 16: S = sqrt(1/4) = 1/2."""
    base = CompletePConfig(base_batch_tokens=1000, base_total_tokens=10_000, **BASE)
    plain = table_for(model(), CompletePConfig(**BASE))
    scaled = table_at(base, batch_tokens=4000, total_tokens=160_000)
    for role in Role:
        a, b = plain.factors(role, 4.0), scaled.factors(role, 4.0)
        assert b == Factors(a.init_std, a.lr * 0.5, a.weight_decay * 0.5, a.eps * 2)
    assert scaled.batch.betas((0.9, 0.95)) == pytest.approx((1 - 0.1 / 4, 1 - 0.05 / 4), rel=1e-12)
    assert (scaled.residual_multiplier, scaled.logit_multiplier) == (
        plain.residual_multiplier,
        plain.logit_multiplier,
    )


def test_scaling_batch_and_tokens_together_changes_nothing() -> None:
    base = CompletePConfig(base_batch_tokens=1000, base_total_tokens=10_000, **BASE)
    scaled = table_at(base, batch_tokens=8000, total_tokens=80_000)
    assert all_factors(scaled) == all_factors(table_for(model(), CompletePConfig(**BASE)))
    assert scaled.batch.betas((0.9, 0.95)) == (0.9, 0.95)


def test_batch_scaling_is_off_without_base_values_and_its_exponent_is_a_setting() -> None:
    assert table_at(CompletePConfig(**BASE), 4000, 160_000).batch.scale == 1.0
    base = CompletePConfig(base_total_tokens=1600, batch_exponent=0.3, **BASE)
    assert table_at(base, 4000, 16_000).batch.scale == pytest.approx(10**-0.3, rel=1e-12)


def test_betas_below_zero_are_refused() -> None:
    base = CompletePConfig(base_batch_tokens=40, **BASE)
    with pytest.raises(ConfigError, match=r"optimizer\.betas.*m_B / m_D = 100"):
        table_at(base, 4000, 4000).batch.betas((0.9, 0.95))


# Experts: 4 times the width, 8 times the depth, twice the experts and the chosen, and an inner
# width that grows with the width, then 2.5 times as much.

EXPERT_ROWS = {
    #                   init std          lr         weight decay  eps
    "router":          (1 / 4,            1 / 4,     4.0,          1 / 8 / 2),
    "expert_up":       (4**-0.5,          1 / 4,     4.0,          1 / 8 / 2 / 4),
    "expert_down":     (4**-0.5,          1 / 4,     4.0,          1 / 8 / 2 / 4),
    "hidden_weight":   (4**-0.5,          1 / 4,     4.0,          1 / 8 / 4),
}  # fmt: skip
OTHER_GRANULARITY = {
    "expert_up":       (4**-0.5,          1 / 4,     4.0,          1 / 8 / 2 / 10),
    "expert_down":     (4**0.5 / 10,      1 / 10,    10.0,         1 / 8 / 2 / 4),
}  # fmt: skip


@pytest.mark.parametrize("width, rows", [(4.0, EXPERT_ROWS), (10.0, OTHER_GRANULARITY)])
def test_the_rows_of_experts_are_those_of_the_design(
    width: float, rows: dict[str, tuple[float, ...]]
) -> None:
    table = plain_table(
        width_multiplier=4.0, depth_multiplier=8.0, experts=page.ExpertRatios(2.0, width)
    )
    for role, wanted in rows.items():
        ratio = width if role == "expert_down" else 4.0
        found = dataclasses.astuple(table.factors(Role(role), ratio))
        assert found == pytest.approx(wanted, rel=1e-12), role


def test_the_table_counts_experts_and_their_width_against_the_proxy_and_not_under_sp() -> None:
    moe = {"num_experts": 32, "top_k": 8, "ffn_hidden_size": 512}
    base = {"base_num_experts": 8, "base_top_k": 2, "base_expert_ffn_hidden_size": 128, **BASE}
    table = table_for(model(moe=moe), CompletePConfig(**base))
    assert table.experts == (4.0, 4.0) and table.base_expert_ffn_hidden_size == 128
    # Without these three the proxy has as many experts, of the same ratio to the width.
    assert table_for(model(moe=moe), CompletePConfig(**BASE)).experts == (1.0, 4.0)
    sp = table_for(model(moe=moe), CompletePConfig(parameterization="sp", **base))
    assert {sp.factors(role, 4.0).eps for role in Role} == {1.0}


# Own factors, declarations.


def test_own_factors_multiply_the_table_and_reach_one_role_only() -> None:
    own = {"hidden_weight": RoleFactors(lr=2.0, init_std=3.0, weight_decay=5.0, eps=7.0)}
    plain = table_for(model(), CompletePConfig(**BASE))
    changed = table_for(model(), CompletePConfig(factors=own, **BASE))
    for role in Role:
        a, b = plain.factors(role, 4.0), changed.factors(role, 4.0)
        if role is Role.HIDDEN_WEIGHT:
            assert b == Factors(a.init_std * 3, a.lr * 2, a.weight_decay * 5, a.eps * 7)
        else:
            assert b == a


def test_final_values_are_base_values_times_factors() -> None:
    optimizer = OptimizerConfig(
        base_lr=0.01, base_init_std=0.02, base_weight_decay=0.1, base_eps=1e-12
    )
    values = table_for(model(), CompletePConfig(**BASE)).values(Role.HIDDEN_WEIGHT, 4.0, optimizer)
    assert dataclasses.astuple(values) == pytest.approx((0.01, 0.0025, 0.4, 1e-12 / 32), rel=1e-12)


def test_a_declaration_is_kept_on_the_parameter_with_its_ratio() -> None:
    parameter = SimpleNamespace(shape=(5, 96))
    assert declare(parameter, Role.HIDDEN_WEIGHT, 96, 32) is parameter
    spec = spec_of(parameter, "w")
    assert (spec.role, spec.width_ratio, spec.shape) == (Role.HIDDEN_WEIGHT, 3.0, (5, 96))
    gain = spec_of(declare(SimpleNamespace(shape=(5,)), Role.PRE_NORM), "g")
    assert (gain.role, gain.width_ratio, gain.constant) == (Role.PRE_NORM, 1.0, 1.0)


@pytest.mark.parametrize("attribute", [None, "hidden_weight"])
def test_a_parameter_without_a_declaration_is_an_error_that_names_it(attribute: str | None) -> None:
    parameter = SimpleNamespace() if attribute is None else SimpleNamespace(spec=attribute)
    with pytest.raises(
        ConfigError, match=r"layers\.3\.new\.weight.*embedding, pre_norm, hidden_weight"
    ):
        spec_of(parameter, "layers.3.new.weight")


def test_the_role_strings_and_their_order_are_those_of_the_paper() -> None:
    assert (
        " ".join(Role)
        == "embedding pre_norm hidden_weight hidden_bias final_norm unembedding qk_norm "
        "router expert_up expert_down balance_bias"
    )


def test_the_table_is_usable_without_the_trainer_and_without_torch() -> None:
    code = (
        "import sys\n"
        "from megatron_completep.completep import Table\n"
        "from megatron_completep.roles import Role\n"
        "table = Table(base_hidden_size=64, base_ffn_hidden_size=256, "
        "width_multiplier=4.0, depth_multiplier=8.0)\n"
        "factors = table.factors(Role.HIDDEN_WEIGHT, 4.0)\n"
        "print(factors, table.residual_multiplier, 'torch' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == f"{Factors(0.5, 0.25, 4.0, 0.03125)} 0.125 False"


def test_the_table_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        plain_table().alpha = 0.5  # type: ignore[misc]

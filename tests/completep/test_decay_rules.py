"""Muon's rows, the exponents of batch and duration, and the timescale of weight decay."""

from __future__ import annotations

import math
from typing import Any

import pytest

from megatron_completep.completep import Table, table_of
from megatron_completep.completep.tau import tau_warnings, timescales
from megatron_completep.config import Config
from megatron_completep.optim.check import check_parameters
from megatron_completep.roles import Role
from tests.support.configs import small_config

MUON: dict[str, Any] = {"type": "muon", "muon": {"base_lr": 0.02, "base_weight_decay": 0.3}}
DECAYED = (Role.EMBEDDING, Role.HIDDEN_WEIGHT, Role.UNEMBEDDING)


def run_of(
    optimizer: dict[str, Any] | None = None, steps: int = 10, **completep: Any
) -> tuple[Config, Table]:
    """m_N = 2, m_L = 2, 8 x 12 tokens a step."""
    config = small_config(
        optimizer=optimizer or {}, training={"train_steps": steps}, completep=completep
    )
    return config, table_of(config)


def decay_of_a_step(config: Config, table: Table, role: Role) -> float:
    matrix = (32, 32) if role is Role.HIDDEN_WEIGHT else None
    values = table.values(role, 2.0 if matrix else 1.0, config.optimizer, matrix)
    return values.lr * values.weight_decay


# Muon's rows.


@pytest.mark.parametrize("matrix", [(32, 32), (8, 32), (128, 32), (32, 128)])
@pytest.mark.parametrize(("m_L", "alpha"), [(2, 1.0), (8, 1.0), (8, 0.5)])
def test_a_matrix_has_the_spectral_rate_and_a_decay_without_it(
    matrix: tuple[int, int], m_L: int, alpha: float
) -> None:
    config = small_config(optimizer=MUON, model={"num_layers": 2 * m_L}, completep={"alpha": alpha})
    table = table_of(config)
    values = table.values(Role.HIDDEN_WEIGHT, 2.0, config.optimizer, matrix)
    depth = m_L ** (alpha - 1)
    assert values.lr == pytest.approx(0.02 * math.sqrt(matrix[0] / matrix[1]) * depth)
    assert values.lr * values.weight_decay == pytest.approx(0.02 * 0.3 * depth)
    assert values.init_std == pytest.approx(0.02 / math.sqrt(2))


def test_all_other_rows_are_adamw_s() -> None:
    config, table = run_of(MUON)
    _, plain = run_of()
    for role in Role:
        ours = table.values(role, 1.0, config.optimizer)
        assert ours == plain.values(role, 1.0, config.optimizer), role
    matrix = table.values(Role.HIDDEN_WEIGHT, 1.0, config.optimizer, (32, 32))
    assert matrix != plain.values(Role.HIDDEN_WEIGHT, 1.0, config.optimizer)  # the control


def test_under_sp_a_matrix_has_the_factor_of_moonlight() -> None:
    config, table = run_of(MUON, parameterization="sp")
    values = table.values(Role.HIDDEN_WEIGHT, 2.0, config.optimizer, (32, 128))
    assert values.lr == pytest.approx(0.02 * 0.2 * math.sqrt(128))
    assert values.lr * values.weight_decay == pytest.approx(0.02 * 0.3)


# Exponents.


def test_equal_exponents_give_todays_numbers_to_the_bit_and_others_their_own_powers() -> None:
    base = {"base_batch_tokens": 32, "base_total_tokens": 96}
    config, plain = run_of(**base)
    assert plain.batch.scale == (3.0 / 10.0) ** 0.5
    _, equal = run_of(**base, duration_exponent=0.5)
    assert equal == plain or equal.batch.scale == plain.batch.scale
    _, apart = run_of(**base, duration_exponent=0.32)
    assert apart.batch.scale == pytest.approx(3.0**0.5 / 10.0**0.32, rel=1e-14)
    assert apart.batch.betas(config.optimizer.betas) == plain.batch.betas(config.optimizer.betas)


# Decay.


def test_tau_is_the_target_at_every_length_and_falls_under_the_table() -> None:
    """Durations of 1, 4 and 16 times: 1, 1/4 and 1/16 of the proxy's tau without base tokens."""
    for optimizer in ({}, MUON):
        solved = {"weight_decay_rule": "tau", "target_tau": 0.7, **optimizer}
        taus: dict[str, list[float]] = {"tau": [], "table": [], "scaled": []}
        base = {"base_batch_tokens": 96, "base_total_tokens": 960}
        for m_D in (1, 4, 16):
            steps = 10 * m_D
            for name, settings, completep in (
                ("tau", solved, {}),
                ("table", optimizer, {}),
                ("scaled", optimizer, base),
            ):
                config, table = run_of(settings, steps, **completep)
                for role in DECAYED:
                    taus[name].append(1 / (decay_of_a_step(config, table, role) * steps))
        assert taus["tau"] == pytest.approx([0.7] * 9, rel=1e-12)
        for first, tau in zip(taus["table"][:3] * 3, taus["scaled"], strict=True):
            assert tau == pytest.approx(first, rel=1e-12)
        for number, tau in enumerate(taus["table"]):
            assert tau == pytest.approx(taus["table"][number % 3] / 4 ** (number // 3), rel=1e-12)


def test_inverse_width_divides_the_decay_of_hidden_weights_alone() -> None:
    for optimizer in ({}, MUON):
        config, table = run_of(optimizer)
        _, inverse = run_of({"weight_decay_rule": "inverse_width", **optimizer})
        for role in DECAYED:
            factor = 0.5 if role is Role.HIDDEN_WEIGHT else 1.0
            assert decay_of_a_step(config, inverse, role) == pytest.approx(
                factor * decay_of_a_step(config, table, role)
            )


def test_own_factors_act_on_top_of_a_solved_decay() -> None:
    solved = {"weight_decay_rule": "tau", "target_tau": 0.5}
    config, table = run_of(solved, factors={"embedding": {"weight_decay": 4.0}})
    assert {scale.role: round(scale.run, 9) for scale in timescales(config, table)} == {
        Role.EMBEDDING: 0.125,
        Role.HIDDEN_WEIGHT: 0.5,
        Role.UNEMBEDDING: 0.5,
    }


@pytest.mark.parametrize(
    ("exponent", "warns"), [(0.5, False), (0.3, False), (0.0, True), (1.2, True)]
)
def test_a_tau_far_from_the_proxys_is_a_warning_at_the_start(exponent: float, warns: bool) -> None:
    """m_D = 16: lr x decay x steps is 16^(1 - 2 e) times the proxy's."""
    base = {"base_batch_tokens": 96, "base_total_tokens": 960}
    config, table = run_of({}, 160, **base, duration_exponent=exponent)
    (embedding, *_) = timescales(config, table)
    assert embedding.proxy == pytest.approx(1 / (1e-2 * 0.1 * 10))
    ratio = 16 ** (2 * exponent - 1)
    assert embedding.run / embedding.proxy == pytest.approx(ratio)
    expected = not 0.5 <= ratio <= 2
    lines = tau_warnings(config, table)
    assert len(lines) == (3 if expected else 0)
    assert set(lines) <= set(check_parameters(config, table))
    assert warns <= expected

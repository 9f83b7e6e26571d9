"""The table with one mistake in it: controls of the coordinate check.

Everything else of the table stays right, so that what they show is of the mistake alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields, replace
from functools import partial

from megatron_completep.completep import Table, table_of
from megatron_completep.completep import table as table_1
from megatron_completep.config.schema import Config
from megatron_completep.errors import ConfigError
from megatron_completep.roles import Role

EXPERTS = (Role.EXPERT_UP, Role.EXPERT_DOWN, Role.ROUTER)


@dataclass(frozen=True)
class Case:
    """A row of the right table, and what it is of."""

    table: Table
    role: Role
    row: table_1.Row
    matrix: table_1.Matrix | None

    def at_rate(self, factor: float) -> table_1.Row:
        """The row with another learning rate alone: what a step decays stays."""
        row = self.row
        return replace(row, lr=row.lr * factor, weight_decay=row.weight_decay / factor)


def adam_width(case: Case) -> table_1.Row:
    """AdamW's 1 / m_N on top of Muon's own factor."""
    if case.row.section != "muon":
        return case.row
    return case.at_rate(1 / case.table.width_multiplier)


def adam_rms(case: Case) -> table_1.Row:
    """.2 sqrt(max(d_out, d_in)) in place of sqrt(d_out / d_in): the RMS of AdamW's updates."""
    if case.row.section != "muon":
        return case.row
    assert case.matrix is not None
    d_out, d_in = case.matrix
    return case.at_rate(0.2 * math.sqrt(max(case.matrix)) / math.sqrt(d_out / d_in))


def experts_summed(case: Case) -> table_1.Row:
    """What the k experts of a token give is summed up, without 1 / k.

    Adam takes the larger gradients of all other weights out, so that it is the last matrix that
    shows it.
    """
    if case.role is not Role.EXPERT_DOWN:
        return case.row
    e = case.table.experts.number
    return replace(case.at_rate(e), variance=case.row.variance * e**2)


def experts_eps(case: Case) -> table_1.Row:
    """An epsilon without the 1 / e of experts and routers."""
    if case.role not in EXPERTS:
        return case.row
    return replace(case.row, eps=case.row.eps * case.table.experts.number)


def router_lr(case: Case) -> table_1.Row:
    """A router whose learning rate does not fall with the width."""
    if case.role is not Role.ROUTER:
        return case.row
    return case.at_rate(case.table.width_multiplier)


def router_init(case: Case) -> table_1.Row:
    """A router that starts as a hidden weight does: at 1 / sqrt(m_N), and not at 1 / m_N."""
    if case.role is not Role.ROUTER:
        return case.row
    return replace(case.row, variance=case.row.variance * case.table.width_multiplier)


MUON: Mapping[str, Callable[[Case], table_1.Row]] = {
    "muon_adam_width": adam_width,
    "muon_adam_rms": adam_rms,
}
OF_EXPERTS: Mapping[str, Callable[[Case], table_1.Row]] = {
    "experts_summed": experts_summed,
    "experts_eps": experts_eps,
    "router_lr": router_lr,
    "router_init": router_init,
}
MISTAKES = {**MUON, **OF_EXPERTS}


@dataclass(frozen=True, kw_only=True)
class MistakenTable(Table):
    """The table with one of MISTAKES."""

    mistake: str

    def _row(self, role: Role, width_ratio: float, matrix: table_1.Matrix | None) -> table_1.Row:
        row = super()._row(role, width_ratio, matrix)
        return MISTAKES[self.mistake](Case(self, role, row, matrix))


def table_with(mistake: str) -> Callable[[Config], Table]:
    """`table_of` with one of MISTAKES; can be sent to another process."""
    return partial(_mistaken_table, mistake)


def check_mistakes(rules: Iterable[str], config: Config) -> None:
    """Raises ConfigError for those of MISTAKES that a run without Muon or experts cannot make."""
    rules = list(rules)
    with_muon = [rule for rule in rules if rule in MUON]
    if with_muon and config.optimizer.type != "muon":
        raise ConfigError(
            f"--beside {','.join(with_muon)}: mistakes with Muon, but optimizer.type = "
            f"{config.optimizer.type}. Leave them out, or set optimizer.type to muon."
        )
    with_experts = [rule for rule in rules if rule in OF_EXPERTS]
    if with_experts and config.model.moe is None:
        raise ConfigError(
            f"--beside {','.join(with_experts)}: mistakes with experts, but model.moe is null. "
            "Leave them out, or give model.moe."
        )


def _mistaken_table(mistake: str, config: Config) -> Table:
    right = table_of(config)
    settings = {field.name: getattr(right, field.name) for field in fields(right)}
    return MistakenTable(**settings, mistake=mistake)

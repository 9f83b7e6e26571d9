"""Muon with a factor that other programs put on it: controls of the coordinate check.

Everything else of the table stays right, so that what they show is of the factor alone.
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

Mistake = Callable[[Table, table_1.Matrix], float]  # factor on the right learning rate of a matrix


def adam_width(table: Table, _: table_1.Matrix) -> float:
    """AdamW's 1 / m_N on top of Muon's own factor."""
    return 1 / table.width_multiplier


def adam_rms(_: Table, matrix: table_1.Matrix) -> float:
    """.2 sqrt(max(d_out, d_in)) in place of sqrt(d_out / d_in): the RMS of AdamW's updates."""
    d_out, d_in = matrix
    return 0.2 * math.sqrt(max(matrix)) / math.sqrt(d_out / d_in)


MISTAKES: Mapping[str, Mistake] = {"muon_adam_width": adam_width, "muon_adam_rms": adam_rms}


@dataclass(frozen=True, kw_only=True)
class MistakenTable(Table):
    """The table with a mistake in the rows of the matrices that Muon updates."""

    mistake: str

    def _row(self, role: Role, width_ratio: float, matrix: table_1.Matrix | None) -> table_1.Row:
        row = super()._row(role, width_ratio, matrix)
        if row.section != "muon":
            return row
        assert matrix is not None
        factor = MISTAKES[self.mistake](self, matrix)
        # What a step decays stays, so that the learning rate alone is wrong.
        return replace(row, lr=row.lr * factor, weight_decay=row.weight_decay / factor)


def table_with(mistake: str) -> Callable[[Config], Table]:
    """`table_of` with one of MISTAKES; can be sent to another process."""
    return partial(_mistaken_table, mistake)


def check_mistakes(rules: Iterable[str], config: Config) -> None:
    """Raises ConfigError for those of MISTAKES that a run without Muon cannot make."""
    mistakes = [rule for rule in rules if rule in MISTAKES]
    if mistakes and config.optimizer.type != "muon":
        raise ConfigError(
            f"--beside {','.join(mistakes)}: mistakes with Muon, but optimizer.type = "
            f"{config.optimizer.type}. Leave them out, or set optimizer.type to muon."
        )


def _mistaken_table(mistake: str, config: Config) -> Table:
    right = table_of(config)
    settings = {field.name: getattr(right, field.name) for field in fields(right)}
    return MistakenTable(**settings, mistake=mistake)

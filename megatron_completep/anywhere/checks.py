"""What no table and no optimizer can be made of, said before anything is computed with it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from numbers import Real
from typing import Any

from megatron_completep.command_line import did_you_mean
from megatron_completep.completep import Table
from megatron_completep.completep.table import RULES
from megatron_completep.config.schema import RoleFactors
from megatron_completep.errors import ConfigError
from megatron_completep.roles import Role

DECAY_RULES = ("table", "inverse_width", "tau")


def check_table(table: Table) -> None:
    """Raises ConfigError for a table that gives no factors, with all its problems at once."""
    if not isinstance(table, Table):
        raise ConfigError(f"table = {table!r}: give a Table, such as Table.for_shape(...).")
    problems = []
    for name in ("width_multiplier", "depth_multiplier"):
        multiplier = getattr(table, name)
        if not _is_positive(multiplier):
            problems.append(f"table.{name} = {multiplier}: the ratio of two sizes is above 0.")
    if not (_is_number(table.alpha) and 0.5 <= table.alpha <= 1):
        problems.append(f"table.alpha = {table.alpha}: use 1 (CompleteP), or from 0.5 to 1.")
    for name in ("base_residual_multiplier", "base_logit_multiplier", "attention_scale"):
        value = getattr(table, name)
        # An attention scale that nobody gave is no number; no group asks for it.
        is_open = name == "attention_scale" and value != value
        if not (_is_positive(value) or is_open):
            problems.append(f"table.{name} = {value}: give a finite number above 0.")
    problems += _wrong_words(table)
    raise_all(problems)


def _wrong_words(table: Table) -> Iterator[str]:
    """Names in a table that mean nothing: they would leave a factor at 1 without a word."""
    if table.rule not in RULES:
        yield f"table.rule = {table.rule}: not known. Use one of: {', '.join(RULES)}."
    if table.decay.name not in DECAY_RULES:
        near = did_you_mean(str(table.decay.name), DECAY_RULES)
        yield f"table.decay = {table.decay.name}: not known.{near} Use {', '.join(DECAY_RULES)}."
    for role, factors in table.own_factors.items():
        if role not in list(Role):
            near = did_you_mean(str(role), list(Role))
            yield f"table.own_factors: {role} is no role.{near} Use one of: {', '.join(Role)}."
        if not isinstance(factors, RoleFactors):
            yield f"table.own_factors: {role} = {factors}: give RoleFactors(lr=...)."


def check_tau(table: Table, products: Mapping[str, float]) -> None:
    """Raises ConfigError if the table solves decay from tau for other values than the groups'.

    products: section of the optimizer (`table.Row.section`) -> base learning rate x weight decay.
    """
    decay = table.decay
    if decay.name != "tau":
        return
    problems = []
    if not _is_positive(decay.target_tau):
        problems.append(f"table.decay.target_tau = {decay.target_tau}: give a number above 0.")
    for section, product in products.items():
        stated_product = decay.base_products.get(section)
        if product == 0:
            problems.append("weight_decay = 0: tau is solved by a factor on it. Give any above 0.")
        elif stated_product is None or not math.isclose(stated_product, product, rel_tol=1e-6):
            problems.append(
                f"table.decay.base_products[{section!r}] = {stated_product}: lr x weight_decay of "
                f"these groups is {product:g}. Give the table that."
            )
    raise_all(problems)


def check_values(**values: Any) -> None:
    """Raises ConfigError for base values that no optimizer takes, all of them at once."""
    raise_all(list(_wrong_values(values)))


def _wrong_values(values: dict[str, Any]) -> Iterator[str]:
    for name, value in values.items():
        if name == "betas":
            if not _are_betas(value):
                yield f"betas = {value}: give two numbers, each from 0 to below 1."
        elif not _is_number(value):
            yield f"{name} = {value!r}: give a number."
        elif name.endswith("momentum"):
            if not 0 <= value < 1:
                yield f"{name} = {value}: from 0 to below 1."
        elif name.endswith("weight_decay") and not 0 <= value < math.inf:
            yield f"{name} = {value}: give a finite number of at least 0."
        elif not name.endswith("weight_decay") and not 0 < value < math.inf:
            yield f"{name} = {value}: give a finite number above 0."


def _are_betas(value: Any) -> bool:
    if not isinstance(value, tuple | list) or len(value) != 2:
        return False
    return all(_is_number(beta) and 0 <= beta < 1 for beta in value)


def _is_number(value: Any) -> bool:
    # A word from a YAML file, such as '1e-3' without a point, is none.
    return isinstance(value, Real) and not isinstance(value, bool)


def _is_positive(value: Any) -> bool:
    return _is_number(value) and 0 < value < math.inf


def raise_all(problems: list[str]) -> None:
    """Raises ConfigError with every problem, if there is one."""
    if len(problems) == 1:
        raise ConfigError(problems[0])
    if problems:
        lines = [f"{len(problems)} problems", *(f"  {problem}" for problem in problems)]
        raise ConfigError("\n".join(lines))

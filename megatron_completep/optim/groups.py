"""Named parameters and a Table -> optimizer groups, one a parameter, identified by name.

Never by hyperparameter values: at alpha = 1 hidden weights and embeddings can differ in eps alone, and would be merged.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch.nn import Parameter

from megatron_completep.completep import Table
from megatron_completep.config.derived import own_factors
from megatron_completep.config.schema import OptimizerConfig
from megatron_completep.errors import ConfigError
from megatron_completep.parallel.parameter import Spec, spec_of
from megatron_completep.roles import Role


@dataclass(frozen=True)
class Group:
    """What AdamW needs to know of one parameter. The learning rate is schedule(step) * base_lr * lr_factor."""

    name: str
    role: Role
    init_std: float
    lr_factor: float
    weight_decay: float
    eps: float


def build_groups(
    named_parameters: Iterable[tuple[str, Parameter]], table: Table, optimizer: OptimizerConfig, all_names: Iterable[str] | None = None
) -> dict[str, Group]:
    """One group for every parameter. An override that matches no name of the whole model (`all_names`) is a ConfigError."""
    groups = {name: _group(name, spec_of(parameter, name), table, optimizer) for name, parameter in named_parameters}
    names = list(groups if all_names is None else all_names)
    unused = [o.pattern for o in optimizer.overrides if not any(fnmatchcase(name, o.pattern) for name in names)]
    if unused:
        known = "\n  ".join(names[:20])
        raise ConfigError(f"optimizer.overrides: {', '.join(map(repr, unused))} matches no parameter. Names look like:\n  {known}")
    return groups


def _group(name: str, spec: Spec, table: Table, optimizer: OptimizerConfig) -> Group:
    factors = table.factors(spec.role, spec.width_ratio)
    values = table.values(spec.role, spec.width_ratio, optimizer)
    own = own_factors(optimizer, name)
    return Group(
        name,
        spec.role,
        init_std=values.init_std * own.init_std,
        lr_factor=factors.lr * own.lr,
        weight_decay=values.weight_decay * own.weight_decay,
        eps=values.eps * own.eps,
    )

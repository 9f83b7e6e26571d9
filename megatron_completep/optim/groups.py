"""Named parameters and a Table -> optimizer groups, one a parameter, identified by name.

Never by hyperparameter values: at alpha = 1 hidden weights and embeddings can differ in eps alone, and would be merged.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch.nn import Parameter

from megatron_completep.completep import Table
from megatron_completep.config.derived import own_factors
from megatron_completep.config.schema import OptimizerConfig
from megatron_completep.parallel.parameter import Spec, spec_of
from megatron_completep.roles import Role


@dataclass(frozen=True)
class Group:
    """What AdamW needs to know of one parameter. The learning rate is schedule(step) * base_lr * lr_factor."""

    name: str  # as the whole model calls it: both ends of a tied embedding are embedding.weight
    role: Role
    init_std: float
    lr_factor: float
    weight_decay: float
    eps: float


def build_groups(
    named_parameters: Iterable[tuple[str, Parameter]], table: Table, optimizer: OptimizerConfig
) -> dict[str, Group]:
    """One group for every parameter, whether of the whole model or of a part of it.

    Whether every override names something is a question to the whole model: see `check.check_parameters`.
    """
    return {
        name: _group(name, spec_of(parameter, name), table, optimizer)
        for name, parameter in named_parameters
    }


def _group(name: str, spec: Spec, table: Table, optimizer: OptimizerConfig) -> Group:
    factors = table.factors(spec.role, spec.width_ratio)
    values = table.values(spec.role, spec.width_ratio, optimizer)
    logical = spec.stored_name(name)
    own = own_factors(optimizer, logical)
    return Group(
        logical,
        spec.role,
        init_std=values.init_std * own.init_std,
        lr_factor=factors.lr * own.lr,
        weight_decay=values.weight_decay * own.weight_decay,
        eps=values.eps * own.eps,
    )

"""From named parameters and a Table to the optimizer's groups, one for each parameter.

Groups are identified by the parameter's name and never by their hyperparameter values: at alpha = 1
hidden weights and embeddings can differ in eps alone, and would be merged.
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
    """What an update rule can know of one parameter; it reads the fields that it has a use for.

    The learning rate of the parameter at a step is schedule(step) * base_lr * lr_factor.
    """

    name: str  # in the whole model: both ends of a tied embedding are embedding.weight
    role: Role
    init_std: float
    lr_factor: float
    weight_decay: float
    eps: float


def build_groups(
    named_parameters: Iterable[tuple[str, Parameter]], table: Table, optimizer: OptimizerConfig
) -> dict[str, Group]:
    """One group for every parameter, whether of the whole model or of one rank's chunks of it.

    Overrides that match no parameter are no error here, as the chunk at hand may lack what they
    name; `check.check_parameters` asks the whole model.
    """
    groups = {}
    for name, parameter in named_parameters:
        groups[name] = _group(name, spec_of(parameter, name), table, optimizer)
    return groups


def _group(name: str, spec: Spec, table: Table, optimizer: OptimizerConfig) -> Group:
    factors = table.factors(spec.role, spec.width_ratio)
    base_values = table.values(spec.role, spec.width_ratio, optimizer)
    logical_name = spec.stored_name(name)
    # What the user's overrides multiply, on top of the table, which knows roles and no names.
    override = own_factors(optimizer, logical_name)
    return Group(
        logical_name,
        spec.role,
        init_std=base_values.init_std * override.init_std,
        lr_factor=factors.lr * override.lr,
        weight_decay=base_values.weight_decay * override.weight_decay,
        eps=base_values.eps * override.eps,
    )

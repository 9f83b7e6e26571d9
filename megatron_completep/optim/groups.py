"""From named parameters and a Table to the optimizer's groups, one for each logical part.

A fused matrix, such as query, key and value, is several logical matrices with a group each, named
after parameter and part: `layers.0.attention.qkv.weight.k`. Any other parameter is one part.

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
from megatron_completep.parallel.parameter import Spec, part_name, spec_of
from megatron_completep.roles import Role


@dataclass(frozen=True)
class Group:
    """What an update rule can know of one logical part; it reads the fields that it has a use for.

    The learning rate of the part at a step is schedule(step) * base_lr * lr_factor, with
    `optimizer.base_lr` for every rule.
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
    """One group for every logical part, whether of the whole model or of one rank's chunks of it.

    They come in the order of the parameters, by the name that parameter and part have on this rank.
    Overrides that match nothing are no error here, as the chunk at hand may lack what they name;
    `check.check_parameters` asks the whole model.
    """
    groups = {}
    for name, parameter in named_parameters:
        spec = spec_of(parameter, name)
        for part in spec.logical_parts:
            groups[part_name(name, part)] = _group(name, part, spec, table, optimizer)
    return groups


def _group(name: str, part: str, spec: Spec, table: Table, optimizer: OptimizerConfig) -> Group:
    matrix = spec.matrix_of(part, orthogonal_per_head(optimizer))
    factors = table.factors(spec.role, spec.width_ratio, matrix)
    base_values = table.values(spec.role, spec.width_ratio, optimizer, matrix)
    logical_name = spec.stored_name(name)
    # What the user's overrides multiply, on top of the table, which knows roles and no names.
    override = own_factors(optimizer, logical_name, part_name(logical_name, part))
    # The rates of all groups follow one schedule of optimizer.base_lr.
    own_base = table.base_values(spec.role, matrix, optimizer).lr / optimizer.base_lr
    return Group(
        part_name(logical_name, part),
        spec.role,
        init_std=base_values.init_std * override.init_std,
        lr_factor=factors.lr * override.lr * own_base,
        weight_decay=base_values.weight_decay * override.weight_decay,
        eps=base_values.eps * override.eps,
    )


def orthogonal_per_head(optimizer: OptimizerConfig) -> bool:
    """Whether the matrices that an update rule makes orthogonal are single heads."""
    return optimizer.muon is not None and optimizer.muon.parts == "per_head"

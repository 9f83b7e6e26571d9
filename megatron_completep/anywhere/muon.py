"""Two optimizers for one model: `torch.optim.Muon` for hidden matrices, AdamW for all else."""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import nn

from megatron_completep.anywhere.checks import check_table, check_tau, check_values, raise_all
from megatron_completep.anywhere.groups import (
    AdamWValues,
    Declared,
    Group,
    declared_parameters,
    factors_of,
    merged,
)
from megatron_completep.completep import Table
from megatron_completep.errors import ConfigError
from megatron_completep.parallel.parameter import Spec
from megatron_completep.roles import Role


class MuonGroups(NamedTuple):
    """The groups of the two optimizers; one that is handed both refuses them."""

    adamw: list[Group]
    muon: list[Group]


def muon_param_groups(
    model: nn.Module,
    table: Table,
    *,
    lr: float,
    muon_lr: float,
    weight_decay: float = 0.0,
    muon_weight_decay: float = 0.0,
    muon_momentum: float = 0.95,
    eps: float = 1e-12,
    betas: tuple[float, float] = (0.9, 0.95),
) -> MuonGroups:
    """The groups for `torch.optim.AdamW` and `torch.optim.Muon`, both with torch's own settings.

    The table's learning rate of a matrix is sqrt(d_out / d_in) m_L^(alpha - 1) times muon_lr.
    torch's Muon multiplies its own by sqrt(max(1, rows / columns)), which is taken out: leave its
    `adjust_lr_fn` alone. It makes each parameter orthogonal as one matrix, so that queries, keys
    and values should be parameters of their own.

    Args:
        table: with rule="muon".
        lr, weight_decay, eps, betas: the proxy's, of AdamW.
        muon_lr, muon_weight_decay, muon_momentum: the proxy's, of the matrices.

    Raises ConfigError as `param_groups` does, and for hidden weights that are no matrices.
    """
    check_table(table)
    if table.rule != "muon":
        raise ConfigError(
            f"the table's rule is {table.rule}: its rows are not Muon's. Make it with rule='muon'."
        )
    check_values(
        muon_momentum=muon_momentum,
        lr=lr,
        muon_lr=muon_lr,
        weight_decay=weight_decay,
        muon_weight_decay=muon_weight_decay,
        eps=eps,
        betas=betas,
    )
    check_tau(table, {"": lr * weight_decay, "muon": muon_lr * muon_weight_decay})
    declared = declared_parameters(model, table)
    matrices: list[Declared] = []
    others: list[Declared] = []
    for name, parameter, spec in declared:
        side = matrices if spec.role is Role.HIDDEN_WEIGHT else others
        side.append((name, parameter, spec))
    _check_matrices(matrices)

    def muon_values(spec: Spec) -> Group:
        assert spec.fan_in is not None
        d_in = spec.fan_in
        rows, columns = spec.shape
        # A weight that is kept as [in, out] has its columns as outputs.
        d_out = rows * columns // d_in
        factors = factors_of(spec, table, (d_out, d_in))
        torch_own = math.sqrt(max(1.0, rows / columns))
        # Its decay goes with the learning rate that the group names, without its own factor.
        return {
            "lr": muon_lr * factors.lr / torch_own,
            "weight_decay": muon_weight_decay * factors.weight_decay * torch_own,
            "momentum": table.batch.momentum(muon_momentum),
            "lr_factor": factors.lr / torch_own,
        }

    base = AdamWValues(lr, weight_decay, eps, betas)
    adamw = merged(others, lambda spec: base.group(spec, table))
    return MuonGroups(adamw, merged(matrices, muon_values))


def _check_matrices(matrices: list[Declared]) -> None:
    problems = []
    for name, _, spec in matrices:
        if len(spec.shape) != 2 or spec.fan_in is None:
            problems.append(
                f"{name} {list(spec.shape)}: Muon takes matrices whose fan-in is declared."
            )
    raise_all(problems)

"""From a declared model and a table to the parameter groups of a torch optimizer."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import distributed, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from megatron_completep.anywhere.checks import check_table, check_tau, check_values
from megatron_completep.anywhere.declared import spec_or_none
from megatron_completep.anywhere.proposal import propose_roles
from megatron_completep.completep import Factors, Table
from megatron_completep.completep.table import Matrix
from megatron_completep.errors import ConfigError
from megatron_completep.model.initialize import draw
from megatron_completep.parallel.parameter import Spec
from megatron_completep.roles import CONSTANT_ROLES, LAYER_MATRICES, Role

Group = dict[str, Any]
Declared = tuple[str, nn.Parameter, Spec]
# What torch.compile and activation checkpointing put into names.
WRAPPERS = re.compile(r"\b(_orig_mod|_checkpoint_wrapped_module)\.")


def param_groups(
    model: nn.Module,
    table: Table,
    *,
    lr: float,
    weight_decay: float = 0.0,
    eps: float = 1e-12,
    betas: tuple[float, float] = (0.9, 0.95),
) -> list[Group]:
    """The groups of a declared model, as `torch.optim.AdamW` and its relatives take them.

    Parameters with equal values share a group: a handful of groups, whatever the depth. A group has
    `params`, `param_names`, `lr`, `weight_decay`, `eps`, `betas`, and `lr_factor`, its learning
    rate over `lr`. Weight decay is decoupled and times the learning rate, as in AdamW. Parameters
    that do not train are left out.

    Args:
        lr, weight_decay, eps, betas: the values tuned on the proxy.

    Raises ConfigError for parameters that declare no role, for a table with sizes that are no
    multiples, for values that no optimizer takes, and for a table of another update rule.
    """
    check_table(table)
    if table.rule != "adamw":
        raise ConfigError(
            f"the table's rule is {table.rule}, and these are groups of AdamW. "
            "Take both kinds from muon_param_groups(model, table, ...)."
        )
    check_values(lr=lr, weight_decay=weight_decay, eps=eps, betas=betas)
    check_tau(table, {"": lr * weight_decay})

    base = AdamWValues(lr, weight_decay, eps, betas)
    return merged(declared_parameters(model, table), lambda spec: base.group(spec, table))


@dataclass(frozen=True)
class AdamWValues:
    """The values that were tuned on the proxy."""

    lr: float
    weight_decay: float
    eps: float
    betas: tuple[float, float]

    def group(self, spec: Spec, table: Table) -> Group:
        """What a parameter gets of them."""
        factors = factors_of(spec, table)
        return {
            "lr": self.lr * factors.lr,
            "weight_decay": self.weight_decay * factors.weight_decay,
            "eps": self.eps * factors.eps,
            "betas": table.batch.betas(self.betas),
            "lr_factor": factors.lr,
        }


@torch.no_grad()
def initialize_(model: nn.Module, table: Table, std: float = 0.02, seed: int | None = None) -> None:
    """Draw the initial weights of a declared model in place.

    Matrices and embeddings get N(0, std^2) times the table's variance. Biases of hidden matrices
    become 0, and so does the row of an embedding's `padding_idx`; norms stay as their modules made
    them. Every parameter is drawn from its name, so that neither the order of modules nor the
    device matters, nor whether the model is compiled, replicated or sharded (DTensor). Nothing is
    communicated: each rank draws the whole of a parameter and keeps its part.

    Args:
        std: tuned on the proxy.
        seed: None: drawn from torch's own generator, which `torch.manual_seed` sets. Several
            processes must be given one.

    Raises ConfigError as `param_groups` does.
    """
    check_table(table)
    check_values(std=std)
    if seed is None:
        if _several_processes():
            raise ConfigError(
                "seed = None: each process would draw weights of its own. Give all the same seed."
            )
        seed = int(torch.randint(2**62, ()))
    padding = _padding_rows(model)
    for name, parameter, spec in declared_parameters(model, table):
        if spec.role is Role.HIDDEN_BIAS:
            parameter.zero_()
        elif spec.role not in CONSTANT_ROLES:
            factor = factors_of(spec, table).init_std
            # The trainer's own numbers: float32, from the name and the seed.
            shape = tuple(parameter.shape)
            numbers = torch.from_numpy(draw(Spec(spec.role, shape), seed, _inner_name(model, name)))
            numbers = numbers.to(torch.float64) * (std * factor)
            if id(parameter) in padding:
                numbers[padding[id(parameter)]] = 0.0
            _fill(parameter, numbers)


def _several_processes() -> bool:
    is_parallel = distributed.is_available() and distributed.is_initialized()
    return is_parallel and distributed.get_world_size() > 1


def _padding_rows(model: nn.Module) -> dict[int, int]:
    """The row of padding of each embedding that has one, by the identity of its weight."""
    rows = {}
    for module in model.modules():
        if isinstance(module, nn.Embedding) and module.padding_idx is not None:
            rows[id(module.weight)] = module.padding_idx
    return rows


def _inner_name(model: nn.Module, name: str) -> str:
    """The name that a parameter has without what torch wraps around modules.

    A compiled or replicated model gets the weights that it has when nothing is wrapped.
    """
    if isinstance(model, DistributedDataParallel):
        name = name.removeprefix("module.")
    return WRAPPERS.sub("", name)


def _fill(parameter: nn.Parameter, numbers: torch.Tensor) -> None:
    """Give a parameter its weights; of a sharded one, each rank keeps its part of them."""
    if isinstance(parameter, DTensor):
        # Every rank has drawn the same numbers, so that nothing travels.
        numbers = distribute_tensor(
            numbers.to(parameter.device),
            parameter.device_mesh,
            parameter.placements,
            src_data_rank=None,
        )
    parameter.copy_(numbers)


def factors_of(spec: Spec, table: Table, matrix: Matrix | None = None) -> Factors:
    """The table's factors of one parameter.

    Without a fan-in at the proxy, that of a matrix has grown as the stream has.

    matrix: (d_out, d_in) of what Muon updates; None: AdamW does, or the rule does not matter.
    """
    ratio = 1.0
    if spec.role in LAYER_MATRICES:
        ratio = spec.width_ratio if spec.base_fan_in else table.width_multiplier
    return table.factors(spec.role, ratio, matrix)


def declared_parameters(model: nn.Module, table: Table) -> list[Declared]:
    """Name, parameter and spec of every parameter that trains, each once.

    Raises ConfigError for those that declare nothing, and where the base of all matrices has
    another width than the table.
    """
    declared: list[Declared] = []
    missing: list[str] = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        spec = spec_or_none(parameter)
        if spec is None:
            missing.append(name)
        else:
            declared.append((name, parameter, spec))
    if missing:
        raise ConfigError(_missing_roles(model, missing))
    _check_base(declared, table)
    return declared


def _missing_roles(model: nn.Module, missing: list[str]) -> str:
    """Which parameters declare no role, with what would be proposed for them."""
    proposal = propose_roles(model)
    lines = [f"{len(missing)} parameters declare no role"]
    for name in missing[:20]:
        proposed = proposal.roles.get(name)
        answer = proposal.undecided.get(name, "") if proposed is None else f"{proposed}?"
        lines.append(f"  {name}: {answer}")
    if len(missing) > 20:
        lines.append(f"  ... and {len(missing) - 20} more")
    lines.append("Call declare(model) first: it takes what is proposed, and asks for the rest.")
    return "\n".join(lines)


def _check_base(declared: list[Declared], table: Table) -> None:
    ratios = {spec.width_ratio for _, _, spec in declared if spec.base_fan_in}
    # Some matrix reads the stream, whose growth is the table's.
    if ratios and table.scale_width and not any(_close(r, table.width_multiplier) for r in ratios):
        growths = ", ".join(f"{ratio:g}" for ratio in sorted(ratios))
        raise ConfigError(
            f"the matrices are {growths} times as wide as the base's, and the table's width "
            f"multiplier is {table.width_multiplier:g}. Make the table of the same two models: "
            "table_between(model, base)."
        )


def _close(a: float, b: float) -> bool:
    return math.isclose(a, b, rel_tol=1e-6)


def merged(declared: list[Declared], values: Callable[[Spec], Group]) -> list[Group]:
    """One group for all parameters of equal values, in the order of their first parameters."""
    groups: dict[tuple[Any, ...], Group] = {}
    for name, parameter, spec in declared:
        own = values(spec)
        # All values are the key, eps too: at alpha = 1 some groups differ in nothing else.
        group = groups.setdefault(tuple(own.items()), {"params": [], "param_names": [], **own})
        group["params"].append(parameter)
        group["param_names"].append(name)
    return list(groups.values())

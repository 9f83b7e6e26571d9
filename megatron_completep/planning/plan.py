"""What a configuration means for every parameter.

That is its shape, role, initial standard deviation, learning rate, weight decay and epsilon. The
model is built without memory (on the meta device) and no data is opened, so that a plan of any size
takes about a second.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from math import prod
from typing import Any

from megatron_completep.completep import Table, table_of
from megatron_completep.completep.tau import timescales
from megatron_completep.config.schema import Config
from megatron_completep.model.stages import whole_model
from megatron_completep.optim.check import check_parameters
from megatron_completep.optim.groups import Group, build_groups
from megatron_completep.parallel.parameter import Spec, part_name, spec_of
from megatron_completep.roles import Role


@dataclass(frozen=True)
class ParameterPlan:
    """One parameter: its logical shape (before any split or padding) and its final values.

    Logical parts of a fused matrix stand for themselves where their values differ.

    lr: the peak learning rate; of a balance bias what it moves by in a step. init_std is 0 where
    the start is a constant: gains begin at 1, biases at 0.
    """

    name: str
    shape: tuple[int, ...]
    role: Role
    init_std: float
    lr: float
    weight_decay: float
    eps: float

    @property
    def values(self) -> tuple[float, float, float, float]:
        """(init_std, lr, weight_decay, eps)."""
        return self.init_std, self.lr, self.weight_decay, self.eps


@dataclass(frozen=True)
class Plan:
    """All parameters of a run, and what multiplies activations in the forward pass."""

    parameterization: str
    table: Table
    parameters: tuple[ParameterPlan, ...]
    warnings: tuple[str, ...] = ()  # factors that reach no parameter

    @property
    def multipliers(self) -> dict[str, float]:
        """What is multiplied in the forward pass.

        residual: the output of each branch; logits: that of the unembedding; attention: the
        attention logits.
        """
        table = self.table
        return {
            "residual": table.residual_multiplier,
            "logits": table.logit_multiplier,
            "attention": table.attention_scale,
        }

    def to_json(self) -> dict[str, Any]:
        """{"multipliers": {...}, "parameters": [{the fields of `ParameterPlan`}]}."""
        return {
            "multipliers": self.multipliers,
            "parameters": [asdict(parameter) for parameter in self.parameters],
        }


def make_plan(config: Config, parameterization: str | None = None) -> Plan:
    """The plan of a run, or of the same run under another parameterization (for comparison).

    Raises ConfigError for what a run with this configuration is refused for (an override that
    matches no parameter, a value that its type cannot hold); of another parameterization only for
    betas that leave their range.
    """
    configured = config.completep.parameterization
    this_run = parameterization in {None, configured}
    if not this_run:
        # The user's alpha is that of CompleteP; the others are compared as they are defined.
        changes = {"parameterization": parameterization, "alpha": 1.0}
        completep = config.completep.model_copy(update=changes)
        config = config.model_copy(update={"completep": completep})
    table = table_of(config)
    table.batch.betas(config.optimizer.betas)  # raises where they leave their range
    # What the user wrote may be out of range for another parameterization, and that is no mistake.
    warnings = check_parameters(config, table) if this_run else []

    named = dict(whole_model(config.model, table).named_parameters())
    groups = build_groups(named.items(), table, config.optimizer)
    parameters: list[ParameterPlan] = []
    for name, parameter in named.items():
        parameters += _planned(name, spec_of(parameter, name), groups, config.optimizer.base_lr)
    return Plan(config.completep.parameterization, table, tuple(parameters), tuple(warnings))


def _planned(
    name: str, spec: Spec, groups: Mapping[str, Group], base_lr: float
) -> Iterator[ParameterPlan]:
    """One parameter, or each of its parts where they differ."""
    planned = []
    for part in spec.logical_parts:
        group = groups[part_name(name, part)]
        shape = list(spec.shape)
        if part:
            shape[spec.part_dim] = spec.parts[part]
        lr = base_lr * group.lr_factor
        values = (group.init_std, lr, group.weight_decay, group.eps)
        # The loads move it; no rule, and nothing of the table.
        if spec.balance is not None:
            values = (0.0, spec.balance.rate, 0.0, 0.0)
        planned.append(ParameterPlan(group.name, tuple(shape), group.role, *values))
    # Parts of a fused matrix differ by an override, or by their shapes under Muon; otherwise a row
    # for each would say one thing three times.
    if len({plan.values for plan in planned}) == 1:
        yield replace(planned[0], name=spec.stored_name(name), shape=spec.shape)
    else:
        yield from planned


def describe(config: Config) -> str:
    """The plan for a reader.

    Parameters with equal values stand together, and this run's values beside those of muP and SP.
    """
    this_run = make_plan(config)
    plans = [this_run]
    for parameterization in ("mup", "sp"):
        if parameterization != this_run.parameterization:
            plans.append(make_plan(config, parameterization))

    lines = [
        *_heading(config, this_run),
        "",
        f"{'forward multipliers':<24}" + _cells(this_run.multipliers),
    ]
    for plan in plans:
        lines.append(_row(plan, plan is this_run, tuple(plan.multipliers.values())))
    # A table for parameters that no plan tells apart: their names, then a row a plan.
    for members in _alike(plans):
        lines += ["", *_members(this_run, members)]
        moe = config.model.moe
        if moe is not None and this_run.parameters[members[0]].role is Role.BALANCE_BIAS:
            lines.append(f"  moves by model.moe.bias_rate = {moe.bias_rate:g} a step")
            continue
        lines.append(f"{'':<24}" + _cells(("init std", "peak lr", "weight decay", "eps")))
        for plan in plans:
            lines.append(_row(plan, plan is this_run, plan.parameters[members[0]].values))
    return "\n".join([*lines, "", "init std 0: gains start at 1, biases at 0"])


def _heading(config: Config, plan: Plan) -> list[str]:
    """Sizes, multipliers of width, depth, batch and duration, and warnings."""
    table = plan.table
    elements = sum(prod(parameter.shape) for parameter in plan.parameters)
    active = active_elements(config, plan)
    experts = "" if active == elements else f" ({active:,} of them active for a token)"
    return [
        f"{len(plan.parameters)} parameters, {elements:,} elements{experts}; "
        f"m_N = {table.width_multiplier:g}, m_L = {table.depth_multiplier:g}, "
        f"alpha = {table.alpha:g}",
        *_scaled_batch(config, table),
        *_timescales(config, table),
        *_router_losses(config, table),
        *(f"warning: {warning}" for warning in plan.warnings),
    ]


def active_elements(config: Config, plan: Plan) -> int:
    """Elements of the parameters that one token meets: of experts those of the chosen ones."""
    moe = config.model.moe
    share = 1.0 if moe is None else moe.top_k / moe.num_experts
    total = 0.0
    for parameter in plan.parameters:
        is_expert = parameter.role in (Role.EXPERT_UP, Role.EXPERT_DOWN)
        total += prod(parameter.shape) * (share if is_expert else 1.0)
    return round(total)


def _members(plan: Plan, members: Sequence[int]) -> list[str]:
    """The role and the names of parameters with equal values, one name a line."""
    role = plan.parameters[members[0]].role
    names = _names([plan.parameters[index] for index in members])
    indent = " " * (len(role) + 2)
    return [f"{role}: {names[0]}", *(indent + name for name in names[1:])]


def _cells(names: Iterable[str]) -> str:
    return "".join(f"{name:>14}" for name in names)


def _row(plan: Plan, this_run: bool, values: tuple[float, ...]) -> str:
    label = f"  {plan.parameterization}{' (this run)' if this_run else ''}"
    return f"{label:<24}" + "".join(f"{number:>14.5g}" for number in values)


def _scaled_batch(config: Config, table: Table) -> list[str]:
    """One line on the scaling by batch and duration, where there is any."""
    batch = table.batch
    if batch.batch_ratio == batch.duration_ratio == 1.0:
        return []
    beta1, beta2 = batch.betas(config.optimizer.betas)
    return [
        f"m_B = {batch.batch_ratio:g}, m_D = {batch.duration_ratio:g}: S = {batch.scale:.5g}, "
        f"betas {beta1:.5g} and {beta2:.5g}"
    ]


def _timescales(config: Config, table: Table) -> list[str]:
    """One line on the timescale of weight decay, where anything decays."""
    scales = list(timescales(config, table))
    if not scales:
        return []
    hint = ""
    if all(scale.proxy is None for scale in scales):
        hint = " (the proxy's is known from completep.base_batch_tokens and base_total_tokens)"
    return [f"tau = 1 / (peak lr x decay x steps): {', '.join(map(str, scales))}{hint}"]


def _router_losses(config: Config, table: Table) -> list[str]:
    """One line on the coefficients of the routers' own losses, where there are any."""
    moe = config.model.moe
    if moe is None:
        return []
    by_name = {"balance loss": moe.balance_loss, "router z-loss": moe.router_z_loss}
    factor = table.router_loss_multiplier
    terms = [f"{name} {base * factor:.5g}" for name, base in by_name.items() if base]
    return [f"coefficients in each layer with experts: {', '.join(terms)}"] if terms else []


def _alike(plans: Sequence[Plan]) -> list[list[int]]:
    """Indices of parameters with the same role, and the same values in every plan.

    In the order in which they first appear.
    """
    members: dict[tuple[Any, ...], list[int]] = {}
    for index, parameter in enumerate(plans[0].parameters):
        # All plans list the same parameters in the same order.
        key = parameter.role, *(plan.parameters[index].values for plan in plans)
        members.setdefault(key, []).append(index)
    return list(members.values())


def _names(parameters: Sequence[ParameterPlan]) -> list[str]:
    """One entry for a parameter of several layers: 'layers.0-7.mlp.up.weight (1024, 256) x 8'."""
    layers: dict[tuple[str, tuple[int, ...]], list[int]] = {}
    for parameter in parameters:
        # Without its layer's number a parameter has one name in all layers.
        match = re.fullmatch(r"layers\.(\d+)\.(.*)", parameter.name)
        name = match[2] if match else parameter.name
        numbers = layers.setdefault((name, parameter.shape), [])
        if match:
            numbers.append(int(match[1]))
    names = []
    for (name, shape), numbers in layers.items():
        if numbers:
            names.append(f"layers.{_runs(numbers)}.{name} {shape} x {len(numbers)}")
        else:
            names.append(f"{name} {shape}")
    return names


def _runs(numbers: Sequence[int]) -> str:
    """[0, 1, 2, 5] -> '0-2,5'."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(str(start) if start == stop else f"{start}-{stop}" for start, stop in runs)

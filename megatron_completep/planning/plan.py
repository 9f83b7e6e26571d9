"""What a configuration means for every parameter: shape, role, initial standard deviation, learning rate, weight decay, epsilon.

The model is built without memory (on the meta device) and no data is opened, so a plan of any size takes about a second.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from megatron_completep.completep import Table, table_of
from megatron_completep.config.schema import Config
from megatron_completep.model.stages import whole_model
from megatron_completep.optim.check import check_parameters
from megatron_completep.optim.groups import build_groups
from megatron_completep.parallel.parameter import spec_of
from megatron_completep.roles import Role


@dataclass(frozen=True)
class ParameterPlan:
    """One parameter: its logical shape (before any split or padding) and its final values at the peak learning rate.

    init_std is 0 where the start is a constant: gains begin at 1, biases at 0.
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
        """residual: of each branch's output; logits: of the unembedding's output; attention: of the attention logits."""
        table = self.table
        return {
            "residual": table.residual_multiplier,
            "logits": table.logit_multiplier,
            "attention": table.attention_scale,
        }

    def to_json(self) -> dict[str, Any]:
        """{"multipliers": {...}, "parameters": [{"name", "shape", "role", "init_std", "lr", "weight_decay", "eps"}]}."""
        return {
            "multipliers": self.multipliers,
            "parameters": [asdict(parameter) for parameter in self.parameters],
        }


def make_plan(config: Config, parameterization: str | None = None) -> Plan:
    """The plan of a run; of the same run under another parameterization where one is named (for comparison).

    Raises:
        ConfigError: what a run with this configuration is refused for (an override that matches no parameter, a value that its type
            cannot hold); of another parameterization only betas that leave their range.
    """
    this_run = parameterization is None or parameterization == config.completep.parameterization
    if not this_run:
        other = {"parameterization": parameterization, "alpha": 1.0}
        config = config.model_copy(update={"completep": config.completep.model_copy(update=other)})
    table = table_of(config)
    table.batch.betas(config.optimizer.betas)
    warnings = check_parameters(config, table) if this_run else []
    named = dict(whole_model(config.model, table).named_parameters())
    parameters = tuple(
        ParameterPlan(
            name=group.name,
            shape=spec_of(named[group.name], group.name).shape,
            role=group.role,
            init_std=group.init_std,
            lr=config.optimizer.base_lr * group.lr_factor,
            weight_decay=group.weight_decay,
            eps=group.eps,
        )
        for group in build_groups(named.items(), table, config.optimizer).values()
    )
    return Plan(config.completep.parameterization, table, parameters, tuple(warnings))


def describe(config: Config) -> str:
    """The plan for a reader: parameters with equal values together, this run's values beside those of muP and SP."""
    plans = [make_plan(config)]
    plans += [
        make_plan(config, other) for other in ("mup", "sp") if other != plans[0].parameterization
    ]
    table = plans[0].table
    elements = sum(_elements(parameter.shape) for parameter in plans[0].parameters)
    lines = [
        f"{len(plans[0].parameters)} parameters, {elements:,} elements; m_N = {table.width_multiplier:g}, "
        f"m_L = {table.depth_multiplier:g}, alpha = {table.alpha:g}",
        *_scaled_batch(config, table),
        *(f"warning: {warning}" for warning in plans[0].warnings),
        "",
        f"{'forward multipliers':<24}" + "".join(f"{name:>14}" for name in plans[0].multipliers),
        *(
            _row(plan, index == 0, tuple(plan.multipliers.values()))
            for index, plan in enumerate(plans)
        ),
    ]
    for members in _alike(plans):
        first = plans[0].parameters[members[0]]
        names = _names([plans[0].parameters[index] for index in members])
        lines += [
            "",
            f"{first.role}: {names[0]}",
            *(f"{'':{len(first.role) + 2}}{name}" for name in names[1:]),
        ]
        lines.append(
            f"{'':<24}"
            + "".join(f"{name:>14}" for name in ("init std", "peak lr", "weight decay", "eps"))
        )
        lines += [
            _row(plan, index == 0, plan.parameters[members[0]].values)
            for index, plan in enumerate(plans)
        ]
    return "\n".join([*lines, "", "init std 0: gains start at 1, biases at 0"])


def _row(plan: Plan, this_run: bool, values: tuple[float, ...]) -> str:
    label = f"  {plan.parameterization}{' (this run)' if this_run else ''}"
    return f"{label:<24}" + "".join(f"{value:>14.5g}" for value in values)


def _scaled_batch(config: Config, table: Table) -> list[str]:
    batch = table.batch
    if batch.batch_ratio == batch.duration_ratio == 1.0:
        return []
    beta1, beta2 = batch.betas(config.optimizer.betas)
    return [
        f"m_B = {batch.batch_ratio:g}, m_D = {batch.duration_ratio:g}: S = {batch.scale:.5g}, betas {beta1:.5g} and {beta2:.5g}"
    ]


def _alike(plans: Sequence[Plan]) -> list[list[int]]:
    """Indices of parameters whose role and values are the same in every plan, in order of first appearance."""
    found: dict[tuple[Any, ...], list[int]] = {}
    for index, parameter in enumerate(plans[0].parameters):
        key = parameter.role, *(plan.parameters[index].values for plan in plans)
        found.setdefault(key, []).append(index)
    return list(found.values())


def _names(parameters: Sequence[ParameterPlan]) -> list[str]:
    """One entry for the same parameter of several layers: 'layers.0-7.mlp.up.weight (1024, 256) x 8'."""
    layers: dict[tuple[str, tuple[int, ...]], list[int]] = {}
    for parameter in parameters:
        match = re.fullmatch(r"layers\.(\d+)\.(.*)", parameter.name)
        key = (match[2] if match else parameter.name), parameter.shape
        layers.setdefault(key, []).extend([int(match[1])] if match else [])
    return [
        f"layers.{_runs(numbers)}.{name} {shape} x {len(numbers)}" if numbers else f"{name} {shape}"
        for (name, shape), numbers in layers.items()
    ]


def _runs(numbers: Sequence[int]) -> str:
    """[0, 1, 2, 5] -> '0-2,5'."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def _elements(shape: tuple[int, ...]) -> int:
    return shape[0] * (shape[1] if len(shape) > 1 else 1)

"""What a run's own factors name, and whether every value survives in the type it is used in. Asked once, before anything is built.

All of it follows from the configuration, and the parameters are those of the whole model, whatever part of it a rank will hold: every
rank of every layout comes to the same answer, and to that of one process.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from decimal import ROUND_CEILING, ROUND_FLOOR, Context
from fnmatch import fnmatchcase

import torch
from torch.nn import Parameter

from megatron_completep.completep import Factors, Table
from megatron_completep.config.derived import own_factors, tokens_per_step
from megatron_completep.config.schema import Config, OptimizerConfig, OverrideConfig, RoleFactors
from megatron_completep.errors import ConfigError
from megatron_completep.model.stages import whole_model
from megatron_completep.parallel.parameter import Spec, spec_of
from megatron_completep.roles import CONSTANT_ROLES, Role

DRAWN_SIGMAS = 8.0  # initial weights are drawn within this many standard deviations
NEEDED = {
    Role.QK_NORM: "model.qk_norm = true",
    Role.HIDDEN_BIAS: "model.bias = true",
}  # what makes parameters of a role


def check_parameters(
    config: Config, table: Table, named: Iterable[tuple[str, Parameter]] | None = None
) -> list[str]:
    """Check `completep.factors`, `optimizer.overrides`, and what base values and factors come to, for every parameter.

    Args:
        named: the parameters of a whole model that is not built from `config.model`; None: those of one that is.

    Returns:
        One line for each factor that reaches no parameter of this model. A proxy and its target may share a file, so that is no error.

    Raises:
        ConfigError: with all problems, one a line: an override that matches no parameter, a factor that can never act, a value that the
            type it is used in cannot hold.
    """
    declared = {
        name: spec_of(parameter, name)
        for name, parameter in (
            whole_model(config.model, table).named_parameters() if named is None else named
        )
    }
    table.batch.betas(config.optimizer.betas)
    problems = [
        *_unmatched(config.optimizer, declared),
        *_without_effect(config, declared),
        *_parameter_values(config, table, declared),
        *_single_values(config, table),
    ]
    if problems:
        count = "1 setting" if len(problems) == 1 else f"{len(problems)} settings"
        raise ConfigError("\n  ".join([f"{count} cannot have the effect asked for", *problems]))
    return _warnings(config, declared)


# --- what the user's own factors name -----------------------------------------------------------------------------------------


def _unmatched(optimizer: OptimizerConfig, declared: Mapping[str, Spec]) -> Iterator[str]:
    unused = [
        o.pattern
        for o in optimizer.overrides
        if not any(fnmatchcase(name, o.pattern) for name in declared)
    ]
    if unused:
        known = "\n    ".join(list(declared)[:20])
        yield f"optimizer.overrides: {', '.join(map(repr, unused))} matches no parameter. Names look like:\n    {known}"


def _without_effect(config: Config, declared: Mapping[str, Spec]) -> Iterator[str]:
    """Factors on what gains and biases do not have: a drawn start, a decay."""
    for name, factors in config.completep.factors.items():
        if Role(name) in CONSTANT_ROLES:
            yield from _idle(f"completep.factors.{name}", factors)
    for index, override in enumerate(config.optimizer.overrides):
        roles = {
            spec.role for name, spec in declared.items() if fnmatchcase(name, override.pattern)
        }
        if roles and roles <= set(CONSTANT_ROLES):
            yield from _idle(f"optimizer.overrides.{index} ({override.pattern!r})", override)


def _idle(where: str, factors: RoleFactors | OverrideConfig) -> Iterator[str]:
    if factors.init_std != 1:
        yield f"{where}: init_std = {factors.init_std:g} can never act: gains start at 1 and biases at 0. Remove it."
    if factors.weight_decay not in (0, 1):  # 0 asks for what is so already
        yield f"{where}: weight_decay = {factors.weight_decay:g} can never act: gains and biases are not decayed. Remove it."


def _warnings(config: Config, declared: Mapping[str, Spec]) -> list[str]:
    present = {spec.role for spec in declared.values()}
    return [
        f"completep.factors.{name} reaches no parameter of this model"
        + (f"; it acts where {NEEDED[Role(name)]}." if Role(name) in NEEDED else ".")
        for name, factors in config.completep.factors.items()
        if Role(name) not in present and factors != RoleFactors()
    ]


# --- whether values survive ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bounds:
    """What a type holds: from its smallest normal number (what is below loses digits, and is zero on some devices) to its largest."""

    dtype: torch.dtype
    largest_share: float = (
        1.0  # of the largest number, where what is computed from the value grows beyond it
    )

    @property
    def smallest(self) -> float:
        return torch.finfo(self.dtype).tiny

    @property
    def largest(self) -> float:
        return torch.finfo(self.dtype).max * self.largest_share

    def hold(self, value: float) -> bool:
        return self.smallest <= abs(value) <= self.largest

    def __str__(self) -> str:
        return str(self.dtype).removeprefix("torch.")


@dataclass(frozen=True)
class Value:
    """`base` (a setting) times `factor` (all that follows from other settings), where it is used."""

    owner: str  # the role, or nothing where the value is the model's
    example: str
    base: float
    factor: float
    without_own: float = 0.0  # `factor` without what completep.factors and optimizer.overrides say

    @property
    def product(self) -> float:
        return self.base * self.factor


def optimizer_dtype(config: Config) -> torch.dtype:
    """In which masters and moments are kept, whatever the device: it follows from training.precision alone."""
    return torch.float64 if config.training.precision == "float64" else torch.float32


def _parameter_values(config: Config, table: Table, declared: Mapping[str, Spec]) -> Iterator[str]:
    optimizer, wide = config.optimizer, optimizer_dtype(config)
    factors = {name: _all_factors(name, spec, table, optimizer) for name, spec in declared.items()}
    without_own = replace(table, own_factors={})
    plain = {
        name: without_own.factors(spec.role, spec.width_ratio) for name, spec in declared.items()
    }

    def values(
        base: float, factor: Callable[[Factors], float], names: Iterable[str] = declared
    ) -> list[Value]:
        return [
            Value(str(declared[name].role), name, base, factor(factors[name]), factor(plain[name]))
            for name in names
        ]

    drawn = [name for name, spec in declared.items() if spec.role not in CONSTANT_ROLES]
    in_float32 = Bounds(
        torch.float32, 1 / DRAWN_SIGMAS
    )  # weights are drawn in float32 whatever the precision
    std = values(optimizer.base_init_std, lambda f: f.init_std, drawn)
    yield from _problems("optimizer.base_init_std", "initial standard deviation", std, in_float32)

    rate, decay = optimizer.base_lr, optimizer.base_weight_decay
    decayed = [name for name in drawn if decay and _is_decayed(config, name, declared[name].role)]
    first_correction = max(
        1 - table.batch.betas(optimizer.betas)[0], torch.finfo(wide).eps
    )  # the first step's rate is divided by it
    rates = Bounds(wide, first_correction)
    decays = values(rate, lambda f: f.lr * f.weight_decay * decay, decayed)
    yield from _problems(
        "optimizer.base_lr", "peak learning rate", values(rate, lambda f: f.lr), rates, decays
    )
    moved = [
        name for name in decayed if rates.hold(factors[name].lr * rate)
    ]  # what is wrong with the others is said already
    decays = values(decay, lambda f: f.weight_decay * f.lr * rate, moved)
    yield from _problems(
        "optimizer.base_weight_decay",
        "weight decay times the peak learning rate",
        decays,
        Bounds(wide),
    )

    eps = values(optimizer.base_eps, lambda f: f.eps)
    yield from _problems("optimizer.base_eps", "AdamW epsilon", eps, Bounds(wide))


def _all_factors(name: str, spec: Spec, table: Table, optimizer: OptimizerConfig) -> Factors:
    """What multiplies the base values for one parameter: the table's, the role's and the name's factors."""
    row, own = table.factors(spec.role, spec.width_ratio), own_factors(optimizer, name)
    return Factors(
        init_std=row.init_std * own.init_std,
        lr=row.lr * own.lr,
        weight_decay=row.weight_decay * own.weight_decay,
        eps=row.eps * own.eps,
    )


def _is_decayed(config: Config, name: str, role: Role) -> bool:
    """Whether no factor of the user's switches the decay of a parameter off."""
    by_role = (
        factors.weight_decay
        for named, factors in config.completep.factors.items()
        if named == role.value
    )
    by_name = (
        override.weight_decay
        for override in config.optimizer.overrides
        if fnmatchcase(name, override.pattern)
    )
    return all(by_role) and all(by_name)


def _single_values(config: Config, table: Table) -> Iterator[str]:
    """What multiplies activations, logits and losses of the whole model, and the moments' decay rates."""
    model, training, optimizer, wide = (
        config.model,
        config.training,
        config.optimizer,
        optimizer_dtype(config),
    )
    attention = table.attention_scale / model.attention_multiplier
    single = [
        ("model.norm_eps", "epsilon of the norms", model.norm_eps, 1.0),
        ("model.input_multiplier", "factor on the embedding output", model.input_multiplier, 1.0),
        (
            "model.residual_multiplier",
            "factor on a branch's output",
            model.residual_multiplier,
            table.depth_multiplier**-table.alpha,
        ),
        (
            "model.attention_multiplier",
            "scale of the attention logits",
            model.attention_multiplier,
            attention,
        ),
        (
            "model.logit_multiplier",
            "factor on the logits",
            model.logit_multiplier,
            1 / table.width_multiplier,
        ),
        ("training.z_loss", "coefficient of the z-loss", training.z_loss, 1.0),
        (
            "training.label_smoothing",
            "smoothed probability of a token",
            training.label_smoothing,
            1 / model.vocab_size,
        ),
        (
            "optimizer.grad_clip",
            "clipping bound a token",
            optimizer.grad_clip,
            1 / tokens_per_step(config),
        ),
    ]
    for setting, meaning, base, factor in single:
        if base:  # 0 switches off what may be switched off
            yield from _problems(setting, meaning, [Value("", "", base, factor)], Bounds(wide))
    resolution = torch.finfo(wide).eps
    for index, beta in enumerate(table.batch.betas(optimizer.betas)):
        if optimizer.betas[index] < 1 and 1 - beta < resolution:
            yield (
                f"optimizer.betas.{index} = {optimizer.betas[index]}: the moment takes in {1 - beta:.3g} of each gradient, less than "
                f"{Bounds(wide)} resolves beside 1 ({resolution:.3g}), so it would not move. Use a smaller beta"
                + (
                    ", or check completep.base_batch_tokens and base_total_tokens."
                    if beta != optimizer.betas[index]
                    else "."
                )
            )


def _problems(
    setting: str, meaning: str, values: Sequence[Value], bounds: Bounds, also: Sequence[Value] = ()
) -> Iterator[str]:
    """What of the values the type cannot hold, by role, and a base value with which it can hold all of them, where there is one.

    also: what else grows with the setting, so that the remedy of one problem is not the next one.
    """
    failing = [value for value in values if not bounds.hold(value.product)]
    if not failing:
        return
    by_owner: dict[tuple[str, float], list[Value]] = {}
    for value in failing:
        by_owner.setdefault((value.owner, value.product), []).append(value)
    parts = [f"{product:.3g}{_members(members)}" for (_, product), members in by_owner.items()]
    base = failing[0].base
    factor = (
        ""
        if all(value.factor == 1 for value in failing)
        else "with the factors that follow from other settings "
    )
    yield (
        f"{setting} = {base:g}: {factor}the {meaning} is {', '.join(parts)}, but {bounds} holds {bounds.smallest:.3g} to "
        f"{bounds.largest:.3g} here. {_remedy(setting, base, [*values, *also], failing, bounds)}"
    )


def _members(values: Sequence[Value]) -> str:
    more = f" and {len(values) - 1} more" if len(values) > 1 else ""
    return f" for {values[0].owner} ({values[0].example}{more})" if values[0].owner else ""


def _remedy(
    setting: str, base: float, values: Sequence[Value], failing: Sequence[Value], bounds: Bounds
) -> str:
    lowest = max(bounds.smallest / value.factor if value.factor else math.inf for value in values)
    highest = min(bounds.largest / value.factor if value.factor else math.inf for value in values)
    if lowest > highest or lowest == math.inf:
        return "No base value serves all of them: bring completep.factors, optimizer.overrides and multipliers nearer to 1."
    if all(bounds.hold(base * value.without_own) for value in failing):
        return "It would hold the table's own values: bring the factors in completep.factors and optimizer.overrides nearer to 1."
    if base < lowest:
        return f"Use {setting} of at least {_three_digits(lowest, ROUND_CEILING)}."
    return f"Use {setting} of at most {_three_digits(highest, ROUND_FLOOR)}."


def _three_digits(value: float, rounding: str) -> str:
    return f"{float(Context(prec=3, rounding=rounding).create_decimal_from_float(value)):.3g}"

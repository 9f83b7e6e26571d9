"""Whether a run's own factors reach a parameter, and whether every value fits its type.

This is asked once, before anything is built. All of it follows from the configuration, and the
parameters are those of the whole model, whatever a rank will hold of it: every rank of every layout
comes to the same answer as a single process.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from decimal import ROUND_CEILING, ROUND_FLOOR, Context
from math import prod
from operator import attrgetter
from typing import NamedTuple

import torch
from torch.nn import Parameter

from megatron_completep.completep import Factors, Table
from megatron_completep.completep.tau import tau_warnings
from megatron_completep.config.derived import matches_any, own_factors, tokens_per_step
from megatron_completep.config.moe_rules import moe_warnings
from megatron_completep.config.schema import Config, OptimizerConfig, OverrideConfig, RoleFactors
from megatron_completep.errors import ConfigError
from megatron_completep.model.stages import whole_model
from megatron_completep.optim.groups import orthogonal_per_head
from megatron_completep.optim.layout import ALIGNMENT
from megatron_completep.optim.rules import RULES
from megatron_completep.parallel.parameter import Spec, part_name, spec_of
from megatron_completep.roles import CONSTANT_ROLES, Role

DRAWN_SIGMAS = 8.0  # initial weights are drawn within this many standard deviations
# The setting that a model needs, to have parameters of a role.
NEEDED = {
    Role.QK_NORM: "model.qk_norm = true",
    Role.HIDDEN_BIAS: "model.bias = true or model.qkv_bias = true",
}
SHOWN_NAMES = 20  # in a message, of a model that may have hundreds of parameters


def check_parameters(
    config: Config, table: Table, named: Iterable[tuple[str, Parameter]] | None = None
) -> list[str]:
    """Check the user's own factors, and what base values times factors come to for each parameter.

    The user's own factors are `completep.factors` and `optimizer.overrides`.

    Args:
        named: the parameters of a whole model that is not built from `config.model`; None: those of
            one that is.

    Returns:
        One line for each factor that reaches no parameter of this model (a proxy and its target may
        share a file, so that is no error), for each role whose decay acts over another part of the
        run than the proxy's, and for what experts are not known to transfer over.

    Raises:
        ConfigError: with all problems, one a line: an override that matches no parameter, a factor
            that can never act, a value that the type it is used in cannot hold.
    """
    if named is None:
        named = whole_model(config.model, table).named_parameters()
    declared = {name: spec_of(parameter, name) for name, parameter in named}
    table.batch.betas(config.optimizer.betas)  # raises where the batch scaling leaves no beta

    problems = [
        *_unmatched(config.optimizer, declared),
        *_without_effect(config, declared),
        *_without_epsilon(config, table, declared),
        *_unaligned(config, declared),
        *_parameter_problems(config, table, declared),
        *_single_problems(config, table),
        *_beta_problems(config, table),
    ]
    # All at once, so that a user does not mend one and meet the next.
    if problems:
        count = "1 setting" if len(problems) == 1 else f"{len(problems)} settings"
        raise ConfigError("\n  ".join([f"{count} cannot have the effect asked for", *problems]))
    return [*_warnings(config, declared), *tau_warnings(config, table), *moe_warnings(config)]


# --- what the user's own factors name -----------------------------------------------------------


def _names(name: str, spec: Spec) -> set[str]:
    """The names that an override may match: the parameter's, and those of its parts."""
    return {name, *(part_name(name, part) for part in spec.logical_parts)}


def _unmatched(optimizer: OptimizerConfig, declared: Mapping[str, Spec]) -> Iterator[str]:
    """The overrides whose pattern matches no parameter and no part of one."""
    unused = []
    for override in optimizer.overrides:
        if not any(matches_any(override, _names(*item)) for item in declared.items()):
            unused.append(repr(override.pattern))
    if unused:
        examples = "\n    ".join(list(declared)[:SHOWN_NAMES])
        parts = []
        for name, spec in declared.items():
            parts += [part_name(name, part) for part in spec.logical_parts if part]
        hint = ""
        if parts:
            hint = f"\n    Parts of fused matrices have names as well, such as {parts[0]}."
        yield (
            f"optimizer.overrides: {', '.join(unused)} matches no parameter. "
            f"Names look like:\n    {examples}{hint}"
        )


def _without_effect(config: Config, declared: Mapping[str, Spec]) -> Iterator[str]:
    """Factors on what gains and biases do not have: a drawn start, a decay."""
    for role, factors in config.completep.factors.items():
        if role in CONSTANT_ROLES:
            yield from _idle(f"completep.factors.{role}", factors)
        if role is Role.BALANCE_BIAS:
            yield from _idle_balance(f"completep.factors.{role}", factors)
    for index, override in enumerate(config.optimizer.overrides):
        roles = set()
        for name, spec in declared.items():
            if matches_any(override, _names(name, spec)):
                roles.add(spec.role)
        if roles and roles <= set(CONSTANT_ROLES):
            yield from _idle(f"optimizer.overrides.{index} ({override.pattern!r})", override)
        if roles == {Role.BALANCE_BIAS}:
            where = f"optimizer.overrides.{index} ({override.pattern!r})"
            yield from _idle_balance(where, override)


def _without_epsilon(config: Config, table: Table, declared: Mapping[str, Spec]) -> Iterator[str]:
    """Factors on the epsilon of matrices whose update has none, which are Muon's."""
    places: list[tuple[str, float, dict[str, Spec]]] = []
    for role, factors in config.completep.factors.items():
        named = {name: spec for name, spec in declared.items() if spec.role is role}
        places.append((f"completep.factors.{role}", factors.eps, named))
    for index, override in enumerate(config.optimizer.overrides):
        named = {}
        for name, spec in declared.items():
            if matches_any(override, _names(name, spec)):
                named[name] = spec
        where = f"optimizer.overrides.{index} ({override.pattern!r})"
        places.append((where, override.eps, named))

    for where, eps, named in places:
        specs = named.values()
        sections = {table.section(spec.role, spec.matrix_of("")) for spec in specs}
        if eps != 1 and sections == {"muon"}:
            yield (
                f"{where}: eps = {eps:g} can never act: an orthogonal update has no epsilon. "
                "Remove it."
            )


def _idle_balance(where: str, factors: RoleFactors | OverrideConfig) -> Iterator[str]:
    """Factors on the rates of balance biases, which no gradient moves."""
    for name in ("lr", "eps"):
        if getattr(factors, name) != 1:
            yield (
                f"{where}: {name} = {getattr(factors, name):g} can never act: balance biases move "
                "by model.moe.bias_rate. Set that, and remove this."
            )


def _idle(where: str, factors: RoleFactors | OverrideConfig) -> Iterator[str]:
    """The factors at one place of the configuration that cannot act on gains and biases."""
    if factors.init_std != 1:
        yield (
            f"{where}: init_std = {factors.init_std:g} can never act: "
            "gains start at 1 and biases at 0. Remove it."
        )
    if factors.weight_decay not in (0, 1):  # 0 asks for what is so already
        yield (
            f"{where}: weight_decay = {factors.weight_decay:g} can never act: "
            "gains and biases are not decayed. Remove it."
        )


def _unaligned(config: Config, declared: Mapping[str, Spec]) -> Iterator[str]:
    """Overrides that tell parts apart whose boundary no kernel can start at.

    Parts that no override tells apart are updated as one.
    """
    optimizer = config.optimizer
    ranks = config.parallel.tensor_parallel_size
    for name, spec in declared.items():
        factors = {}
        for part in spec.logical_parts:
            own = own_factors(optimizer, name, part_name(name, part))
            factors[part] = (own.lr, own.weight_decay, own.eps)
        if len(set(factors.values())) == 1:
            continue
        # Elements between two boundaries, on every rank.
        row = prod(spec.shape[spec.part_dim + 1 :])
        sizes = [size // ranks * row for size in spec.parts.values()]
        if any(size % ALIGNMENT for size in sizes):
            yield (
                f"optimizer.overrides tells the parts {', '.join(factors)} of {name} apart, which "
                f"have {', '.join(map(str, sizes))} elements on a rank: an update starts at "
                f"multiples of {ALIGNMENT}. Name the whole parameter, or use a model.hidden_size "
                f"that is a multiple of {ALIGNMENT}."
            )


def _warnings(config: Config, declared: Mapping[str, Spec]) -> list[str]:
    """One line for each factor on a role that no parameter of this model has."""
    present_roles = {spec.role for spec in declared.values()}
    warnings = []
    for role, factors in config.completep.factors.items():
        if role in present_roles or factors == RoleFactors():
            continue
        remedy = f"; it acts where {NEEDED[role]}." if role in NEEDED else "."
        warnings.append(f"completep.factors.{role} reaches no parameter of this model{remedy}")
    return warnings


# --- whether values fit their types -------------------------------------------------------------


@dataclass(frozen=True)
class Bounds:
    """The range of a type, from its smallest normal number to its largest.

    Numbers below the smallest normal one lose digits, and are zero on some devices.

    largest_share: of the largest number, where what is computed from the value grows beyond it.
    """

    dtype: torch.dtype
    largest_share: float = 1.0

    @property
    def smallest(self) -> float:
        return torch.finfo(self.dtype).tiny

    @property
    def largest(self) -> float:
        return torch.finfo(self.dtype).max * self.largest_share

    def hold(self, number: float) -> bool:
        """Whether the number lies within the range."""
        return self.smallest <= abs(number) <= self.largest

    def __str__(self) -> str:
        return str(self.dtype).removeprefix("torch.")


@dataclass(frozen=True)
class ScaledValue:
    """A setting times all that follows from other settings, where it is used.

    base: the setting. factor: all that multiplies it.
    """

    owner: str  # the role, or empty where the number is the model's
    example: str  # name of a parameter
    base: float
    factor: float
    without_own: float = 0.0  # `factor` without the user's own factors

    @property
    def product(self) -> float:
        return self.base * self.factor


class ParameterFactors(NamedTuple):
    """What multiplies the base values of a logical part, with and without the user's own factors.

    section: the section of the optimizer that holds the base values (`completep.table.Row`).
    """

    name: str  # of the part
    parameter: str
    role: Role
    factors: Factors
    without_own: Factors
    section: str

    @property
    def names(self) -> tuple[str, str]:
        """Those that an override may match."""
        return self.parameter, self.name


def optimizer_dtype(config: Config) -> torch.dtype:
    """The type of masters and moments on every device; it follows from training.precision alone."""
    return torch.float64 if config.training.precision == "float64" else torch.float32


def _parameter_problems(
    config: Config, table: Table, declared: Mapping[str, Spec]
) -> Iterator[str]:
    """What is out of range of initial standard deviation, learning rate, decay and epsilon."""
    optimizer = config.optimizer
    state_dtype = optimizer_dtype(config)
    state_bounds = Bounds(state_dtype)
    parameters = _parameter_factors(table, optimizer, declared)
    drawn = [p for p in parameters if p.role not in CONSTANT_ROLES]

    # Weights are drawn in float32 whatever the precision, and a draw may be DRAWN_SIGMAS large.
    draw_bounds = Bounds(torch.float32, 1 / DRAWN_SIGMAS)
    deviations = _scale(optimizer.base_init_std, lambda f: f.init_std, drawn)
    yield from _out_of_range(
        "optimizer.base_init_std", "initial standard deviation", deviations, draw_bounds
    )

    # AdamW divides the rate of the first step by 1 - beta1, so the rate must stay that much below
    # the largest number.
    beta1, _ = table.batch.betas(optimizer.betas)
    first_correction = max(1 - beta1, torch.finfo(state_dtype).eps)
    for section in dict.fromkeys(parameter.section for parameter in parameters):
        members = [parameter for parameter in parameters if parameter.section == section]
        share = 1.0 if section else first_correction
        yield from _rate_problems(config, section, members, Bounds(state_dtype, share))

    if not RULES[table.rule].reads("eps"):
        return
    # What a rule with a section of its own updates has no epsilon.
    divided = [parameter for parameter in parameters if not parameter.section]
    epsilons = _scale(optimizer.base_eps, lambda f: f.eps, divided)
    yield from _out_of_range("optimizer.base_eps", "AdamW epsilon", epsilons, state_bounds)


def _rate_problems(
    config: Config, section: str, parameters: Sequence[ParameterFactors], rate_bounds: Bounds
) -> Iterator[str]:
    """What is out of range of the learning rates and decays that one section's values lead to."""
    optimizer = config.optimizer
    base = getattr(optimizer, section) if section else optimizer
    where = f"optimizer.{section}." if section else "optimizer."
    rate = base.base_lr
    decay = base.base_weight_decay
    state_bounds = Bounds(rate_bounds.dtype)
    rates = _scale(rate, lambda f: f.lr, parameters)
    drawn = [p for p in parameters if p.role not in CONSTANT_ROLES]
    decayed = [p for p in drawn if decay and _is_decayed(config, p)]
    # The product of rate and decay grows with either setting.
    decays = _scale(rate, lambda f: f.lr * f.weight_decay * decay, decayed)
    yield from _out_of_range(
        f"{where}base_lr", "peak learning rate", rates, rate_bounds, also=decays
    )

    # Where the rate itself is out of range, that is said above, and the product follows from it.
    moved = [p for p in decayed if rate_bounds.hold(p.factors.lr * rate)]
    decays = _scale(decay, lambda f: f.weight_decay * f.lr * rate, moved)
    yield from _out_of_range(
        f"{where}base_weight_decay",
        "weight decay times the peak learning rate",
        decays,
        state_bounds,
    )


def _parameter_factors(
    table: Table, optimizer: OptimizerConfig, declared: Mapping[str, Spec]
) -> list[ParameterFactors]:
    table_alone = replace(table, own_factors={})
    parameters: list[ParameterFactors] = []
    for name, spec in declared.items():
        parts = []
        for part in spec.logical_parts:
            matrix = spec.matrix_of(part, orthogonal_per_head(optimizer))
            parts.append(
                ParameterFactors(
                    part_name(name, part),
                    name,
                    spec.role,
                    _all_factors(name, part, spec, table, optimizer),
                    table_alone.factors(spec.role, spec.width_ratio, matrix),
                    table.section(spec.role, matrix),
                )
            )
        # Parts that nothing tells apart are one parameter to the user.
        if len({part.factors for part in parts}) == 1:
            parts = [parts[0]._replace(name=name)]
        parameters += parts
    return parameters


def _all_factors(
    name: str, part: str, spec: Spec, table: Table, optimizer: OptimizerConfig
) -> Factors:
    """What multiplies one part's base values: factors of the table, the role and the names."""
    matrix = spec.matrix_of(part, orthogonal_per_head(optimizer))
    by_role = table.factors(spec.role, spec.width_ratio, matrix)
    by_name = own_factors(optimizer, name, part_name(name, part))
    return Factors(
        init_std=by_role.init_std * by_name.init_std,
        lr=by_role.lr * by_name.lr,
        weight_decay=by_role.weight_decay * by_name.weight_decay,
        eps=by_role.eps * by_name.eps,
    )


def _scale(
    base: float, factor: Callable[[Factors], float], parameters: Iterable[ParameterFactors]
) -> list[ScaledValue]:
    """A base value times one factor of each parameter."""
    scaled = []
    for parameter in parameters:
        value = factor(parameter.factors)
        without_own = factor(parameter.without_own)
        scaled.append(ScaledValue(parameter.role, parameter.name, base, value, without_own))
    return scaled


def _is_decayed(config: Config, parameter: ParameterFactors) -> bool:
    """Whether no factor of the user's switches the decay of a part off."""
    role_factors = config.completep.factors.get(parameter.role)
    if role_factors is not None and not role_factors.weight_decay:
        return False
    for override in config.optimizer.overrides:
        if matches_any(override, parameter.names) and not override.weight_decay:
            return False
    return True


def _single_problems(config: Config, table: Table) -> Iterator[str]:
    """What is out of range of the numbers that act on activations, logits and losses."""
    model = config.model
    bounds = Bounds(optimizer_dtype(config))
    by_depth = table.depth_multiplier**-table.alpha
    attention = table.attention_scale / model.attention_multiplier
    # A setting, what it is, and the factor on it that follows from other settings.
    single = [
        ("model.norm_eps", "epsilon of the norms", 1.0),
        ("model.input_multiplier", "factor on the embedding output", 1.0),
        ("model.residual_multiplier", "factor on a branch's output", by_depth),
        ("model.attention_multiplier", "scale of the attention logits", attention),
        ("model.logit_multiplier", "factor on the logits", 1 / table.width_multiplier),
        ("training.z_loss", "coefficient of the z-loss", 1.0),
        ("training.label_smoothing", "smoothed probability of a token", 1 / model.vocab_size),
        ("optimizer.grad_clip", "clipping bound a token", 1 / tokens_per_step(config)),
    ]
    if model.moe is not None:
        by_loss = table.router_loss_multiplier
        single += [
            ("model.moe.balance_loss", "coefficient of a layer's balance loss", by_loss),
            ("model.moe.router_z_loss", "coefficient of a router's z-loss", by_loss),
        ]
    for setting, meaning, factor in single:
        base = attrgetter(setting)(config)
        if base:  # 0 switches off what may be switched off
            yield from _out_of_range(setting, meaning, [ScaledValue("", "", base, factor)], bounds)


def _beta_problems(config: Config, table: Table) -> Iterator[str]:
    """The decay rates of moments that would never move."""
    configured = config.optimizer.betas
    bounds = Bounds(optimizer_dtype(config))
    resolution = torch.finfo(bounds.dtype).eps
    for index, beta in enumerate(table.batch.betas(configured)):
        # A configured beta of 1 asks for a moment that stands still.
        if configured[index] >= 1 or 1 - beta >= resolution:
            continue
        remedy = "Use a smaller beta"
        if beta != configured[index]:
            remedy += ", or check completep.base_batch_tokens and base_total_tokens"
        yield (
            f"optimizer.betas.{index} = {configured[index]}: the moment takes in {1 - beta:.3g} of "
            f"each gradient, less than {bounds} resolves beside 1 ({resolution:.3g}), so it would "
            f"not move. {remedy}."
        )


def _out_of_range(
    setting: str,
    meaning: str,
    scaled: Sequence[ScaledValue],
    bounds: Bounds,
    also: Sequence[ScaledValue] = (),
) -> Iterator[str]:
    """One line for all products that the type cannot hold, by role, with a remedy.

    also: what else grows with the setting, so that the remedy of one problem is not the next one.
    """
    failing = [number for number in scaled if not bounds.hold(number.product)]
    if not failing:
        return
    # All parameters of a role have the same factors, unless an override names one of them.
    by_owner: dict[tuple[str, float], list[ScaledValue]] = {}
    for number in failing:
        by_owner.setdefault((number.owner, number.product), []).append(number)
    products = []
    for (_, product), members in by_owner.items():
        products.append(f"{product:.3g}{_members(members)}")

    base = failing[0].base
    factors = "with the factors that follow from other settings "
    if all(number.factor == 1 for number in failing):
        factors = ""
    remedy = _remedy(setting, base, [*scaled, *also], failing, bounds)
    yield (
        f"{setting} = {base:g}: {factors}the {meaning} is {', '.join(products)}, "
        f"but {bounds} holds {bounds.smallest:.3g} to {bounds.largest:.3g} here. {remedy}"
    )


def _members(scaled: Sequence[ScaledValue]) -> str:
    """Whose numbers these are: a role, one of its parameters, and how many more there are."""
    first_member = scaled[0]
    if not first_member.owner:
        return ""
    more = f" and {len(scaled) - 1} more" if len(scaled) > 1 else ""
    return f" for {first_member.owner} ({first_member.example}{more})"


def _remedy(
    setting: str,
    base: float,
    scaled: Sequence[ScaledValue],
    failing: Sequence[ScaledValue],
    bounds: Bounds,
) -> str:
    """A base value with which the type can hold everything, where there is one."""
    # A factor that fell to 0 can be brought into the range by no base value.
    lowest_bases = [bounds.smallest / n.factor if n.factor else math.inf for n in scaled]
    highest_bases = [bounds.largest / n.factor if n.factor else math.inf for n in scaled]
    lowest = max(lowest_bases)
    highest = min(highest_bases)
    if lowest > highest or lowest == math.inf:
        return (
            "No base value serves all of them: bring completep.factors, optimizer.overrides and "
            "multipliers nearer to 1."
        )
    # The base value is sound where the user's own factors alone are to blame.
    if all(bounds.hold(base * number.without_own) for number in failing):
        return (
            "It would hold the table's own values: bring the factors in completep.factors and "
            "optimizer.overrides nearer to 1."
        )
    if base < lowest:
        return f"Use {setting} of at least {_three_digits(lowest, ROUND_CEILING)}."
    return f"Use {setting} of at most {_three_digits(highest, ROUND_FLOOR)}."


def _three_digits(number: float, rounding: str) -> str:
    """The number with three digits, rounded up or down, so that the advice lies in the range."""
    rounded = Context(prec=3, rounding=rounding).create_decimal_from_float(number)
    return f"{float(rounded):.3g}"

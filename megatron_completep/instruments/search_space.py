"""What is searched for at the proxy: names, ranges, and the configuration that values make."""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_completep.command_line import did_you_mean
from megatron_completep.completep import table_of
from megatron_completep.config.derived import warmup_steps
from megatron_completep.config.schema import Config, RoleFactors
from megatron_completep.errors import ConfigError
from megatron_completep.instruments.trial import change, following
from megatron_completep.optim.check import check_parameters
from megatron_completep.roles import CONSTANT_ROLES, Role

# Settings of the optimizer's section that are ratios, searched in octaves.
RATIOS = ("base_lr", "base_init_std", "base_weight_decay", "base_eps")
BETAS = ("beta1", "beta2")
# Of the section of Muon; without them its values follow the optimizer's in their ratio.
MUON = ("muon.base_lr", "muon.base_weight_decay")
COLUMNS = ("lr", "init_std", "weight_decay", "eps")  # of a role's own factors
SEARCHED = tuple(role for role in Role if role is not Role.BALANCE_BIAS)  # that one has no factors
FACTORS = tuple(f"{role}.{column}" for role in SEARCHED for column in COLUMNS)
KNOWN = (*RATIOS, "warmup_fraction", *BETAS, *MUON, *FACTORS)


@dataclass(frozen=True)
class Dimension:
    """One setting with the range it is searched in, both ends included."""

    name: str  # of KNOWN
    low: float
    high: float

    @property
    def coordinates(self) -> tuple[float, float]:
        """The range in the coordinate that is sampled evenly: octaves, or the fraction itself."""
        ends = (to_coordinate(self.name, self.low), to_coordinate(self.name, self.high))
        return min(ends), max(ends)


def to_coordinate(name: str, value: float) -> float:
    """log2 of a ratio, and of 1 - beta: what a beta averages over is 1 / (1 - beta) steps."""
    if name == "warmup_fraction":
        return value
    return math.log2(1 - value if name in BETAS else value)


def from_coordinate(name: str, coordinate: float) -> float:
    """The value at a coordinate."""
    if name == "warmup_fraction":
        return coordinate
    return 1 - 2**coordinate if name in BETAS else 2**coordinate


def dimension(text: str) -> Dimension:
    """'base_lr=1e-3:3e-2' as an argument's type; refuses what no search could use."""
    name, equals, limits = text.partition("=")
    low_word, colon, high_word = limits.partition(":")
    if not (equals and colon):
        raise argparse.ArgumentTypeError("give NAME=LOW:HIGH, such as base_lr=1e-3:3e-2.")
    if name not in KNOWN:
        raise argparse.ArgumentTypeError(
            f"{name} cannot be searched.{did_you_mean(name, KNOWN)} "
            f"Use {', '.join((*RATIOS, 'warmup_fraction', *BETAS, *MUON))}, or ROLE.COLUMN with a "
            f"role of {', '.join(Role)} and a column of {', '.join(COLUMNS)}."
        )
    try:
        low = float(low_word)
        high = float(high_word)
    except ValueError:
        raise argparse.ArgumentTypeError("LOW and HIGH are numbers.") from None
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise argparse.ArgumentTypeError("LOW is below HIGH, and both are finite.")
    _check_limits(name, low, high)
    return Dimension(name, low, high)


def _check_limits(name: str, low: float, high: float) -> None:
    if name == "warmup_fraction" or name in BETAS:
        if not 0 <= low < high < 1:
            raise argparse.ArgumentTypeError("the range is from 0 to below 1.")
    elif low <= 0:
        raise argparse.ArgumentTypeError("LOW is above 0, for the range is searched in octaves.")
    role, _, column = name.partition(".")
    # Gains start at 1 and biases at 0, and neither is decayed.
    if role in CONSTANT_ROLES and column in ("init_std", "weight_decay"):
        raise argparse.ArgumentTypeError(f"{column} never acts on the role {role}. Leave it out.")


def check_space(space: Sequence[Dimension], config: Config) -> None:
    """Raises ConfigError for a space that the proxy cannot be searched in, before anything runs.

    The ends of every range are made, and the two corners where all settings have their lowest or
    highest values, so that what the rules between settings refuse is found here, and values that no
    type holds: those are products, which grow with each of their settings.
    """
    problems: list[str] = []
    names = [one.name for one in space]
    for name in dict.fromkeys(names):
        if names.count(name) > 1:
            problems.append(f"{name}: given {names.count(name)} times. Give one range.")
        problem = _without_effect(name, config)
        if problem:
            problems.append(f"{name}: {problem}")
    for one in space:
        for value in (one.low, one.high):
            problem = _refusal(config, {one.name: value})
            if problem:
                problems.append(f"{one.name} = {value:g}: {problem}")
    if not problems:
        for place, end in (("lowest", "low"), ("highest", "high")):
            problem = _refusal(config, {one.name: getattr(one, end) for one in space})
            if problem:
                problems.append(f"all settings at their {place}: {problem}")
    if problems:
        lines = [f"{len(problems)} problems in the search space", *(f"  {p}" for p in problems)]
        raise ConfigError("\n".join(lines))


def _refusal(config: Config, settings: Mapping[str, float]) -> str | None:
    """Why a run with these settings would be refused; None if it would not."""
    try:
        changed = with_settings(config, settings)
        check_parameters(changed, table_of(changed))
    except ConfigError as error:
        return str(error)
    return None


def _without_effect(name: str, config: Config) -> str | None:
    """Why a setting would change nothing at this proxy; None where it does."""
    if name in MUON and config.optimizer.muon is None:
        return "the optimizer is not Muon. Leave it out."
    if name == "base_weight_decay" and config.optimizer.weight_decay_rule == "tau":
        return "optimizer.weight_decay_rule = tau decides the decay. Leave it out."
    if name.startswith(f"{Role.QK_NORM}."):
        return None if config.model.qk_norm else "the model has no QK-norm. Leave it out."
    if name.startswith(f"{Role.UNEMBEDDING}.") and config.model.tied_embeddings:
        return "the unembedding is the embedding (model.tied_embeddings). Search that."
    if name.startswith(f"{Role.HIDDEN_BIAS}.") and not (config.model.bias or config.model.qkv_bias):
        return "the model has no biases. Leave it out."
    decays = config.optimizer.base_weight_decay > 0
    if name.endswith(".weight_decay") and not decays:
        return "optimizer.base_weight_decay is 0, which no factor changes. Set it first."
    return None


def with_settings(config: Config, settings: Mapping[str, float]) -> Config:
    """The configuration with these values. Raises ConfigError for what its rules refuse."""
    optimizer: dict[str, Any] = {}
    muon: dict[str, float] = {}
    betas = list(config.optimizer.betas)
    factors = dict(config.completep.factors)
    for name, value in settings.items():
        role_name, dot, column = name.partition(".")
        if name in MUON:
            muon[column] = value
        elif dot:
            role = Role(role_name)
            own = factors.get(role, RoleFactors())
            factors[role] = own.model_copy(update={column: value})
        elif name in BETAS:
            betas[BETAS.index(name)] = value
            optimizer["betas"] = tuple(betas)
        else:
            optimizer[name] = value
    if "warmup_fraction" in optimizer:
        optimizer["warmup_steps"] = None  # the two exclude each other
    optimizer = following(config.optimizer, optimizer)
    section = optimizer.get("muon", config.optimizer.muon)
    if muon and section is not None:
        optimizer["muon"] = section.model_copy(update=muon)
    return change(config, optimizer=optimizer, completep={"factors": factors})


def settings_of(config: Config, space: Sequence[Dimension]) -> dict[str, float]:
    """The configuration's own values of what is searched."""
    values = {}
    for one in space:
        role_name, dot, column = one.name.partition(".")
        if one.name in MUON:
            values[one.name] = float(getattr(config.optimizer.muon, column))
        elif dot:
            own = config.completep.factors.get(Role(role_name))
            values[one.name] = float(getattr(own, column)) if own is not None else 1.0
        elif one.name in BETAS:
            values[one.name] = config.optimizer.betas[BETAS.index(one.name)]
        elif one.name == "warmup_fraction":
            steps = config.training.train_steps
            values[one.name] = warmup_steps(config.optimizer, steps) / steps
        else:
            values[one.name] = float(getattr(config.optimizer, one.name))
    return values


def contains(space: Sequence[Dimension], settings: Mapping[str, float]) -> bool:
    """Whether values lie within the ranges."""
    return all(one.low <= settings[one.name] <= one.high for one in space)

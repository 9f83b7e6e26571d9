"""What is known of the parameters of a model: their roles, and their fan-ins at the proxy.

It is attached to the parameters as the trainer's `Spec`, so that all that reads one (groups,
initial weights, the coordinate check) serves models of any trainer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any, overload

from torch import nn

from megatron_completep.anywhere.proposal import Proposal, fan_in_of, propose_roles
from megatron_completep.anywhere.stacks import Stack, stacks_of, stream_width
from megatron_completep.command_line import did_you_mean
from megatron_completep.completep import Table
from megatron_completep.errors import ConfigError
from megatron_completep.parallel.parameter import Spec, attach
from megatron_completep.parallel.parameter import declare as declare_parameter
from megatron_completep.roles import CONSTANT_ROLES, EXPERT_ROLES, Role

Roles = Mapping[str, Role | str]
# Experts of another trainer: their layout is not known here.
KNOWN_ROLES = [role for role in Role if role not in EXPERT_ROLES]
DRAWN_OUTSIDE = (Role.EMBEDDING, Role.UNEMBEDDING)  # matrices outside the blocks


@overload
def declare(
    what: nn.Module, roles: Roles | None = None, *, base: nn.Module | None = None
) -> dict[str, Role]: ...


@overload
def declare(
    what: nn.Parameter, role: Role, fan_in: int | None = None, base_fan_in: int | None = None
) -> nn.Parameter: ...


def declare(what: Any, *arguments: Any, **settings: Any) -> Any:
    """Declare what the parameters of a model are; or what one parameter is.

    `declare(model, roles, base=proxy)` proposes a role for every parameter that trains, and returns
    the roles by name. A parameter that was declared before keeps what was said of it.

    `declare(parameter, role, fan_in, base_fan_in)` says it of one parameter, where a module creates
    it, and returns the parameter.

    Args:
        what: the model, or the parameter.
        roles: pattern of names -> role, for what cannot be decided or was decided wrongly, such as
            {"pos": "embedding", "layers.*.gate": "hidden_weight"}.
        base: the same model at the proxy's width and depth; it may be on the meta device. Each
            matrix takes its base fan-in from the proxy's. Without a base, the fan-in of every
            matrix of hidden weights has grown with the width of the stream.

    Raises ConfigError with all parameters that could not be decided, patterns that match nothing,
    and parameters that the base does not have.
    """
    # A caller may hand the proxy's table in the place of the proxy.
    base = settings.get("base")
    if base is not None and not isinstance(base, nn.Module):
        raise ConfigError(f"base = {type(base).__name__}: give the proxy's model.")
    if isinstance(what, nn.Module):
        return _declare_model(what, *arguments, **settings)
    if not isinstance(what, nn.Parameter):
        raise ConfigError(f"{type(what).__name__}: declare a model or an nn.Parameter.")
    return declare_parameter(what, *arguments, **settings)


def table_between(
    model: nn.Module,
    base: nn.Module,
    *,
    head_dim: int | None = None,
    base_head_dim: int | None = None,
    **settings: Any,
) -> Table:
    """The table of a model whose proxy is `base`: widths and depths are read off the two.

    Either may be on the meta device. For head_dim, base_head_dim and settings see
    `Table.for_shape`. Raises ConfigError if width or depth cannot be read off.
    """
    sizes = [(_width(side, name), _depth(side, name)) for side, name in _named(model, base)]
    (width, depth), (base_width, base_depth) = sizes
    return Table.for_shape(
        width=width,
        base_width=base_width,
        depth=depth,
        base_depth=base_depth,
        head_dim=head_dim,
        base_head_dim=base_head_dim,
        **settings,
    )


def _named(model: nn.Module, base: nn.Module) -> list[tuple[nn.Module, str]]:
    return [(model, "the model"), (base, "its base")]


def _width(model: nn.Module, name: str) -> int:
    width = stream_width(model, stacks_of(model))
    if width is None:
        raise ConfigError(
            f"{name} has no nn.Embedding, which would tell its width. "
            "Use Table.for_shape(width=..., base_width=..., ...)."
        )
    return width


def _depth(model: nn.Module, name: str) -> int:
    stacks = stacks_of(model)
    if len(stacks) != 1:
        places = ", ".join(stack.name for stack in stacks) or "none"
        raise ConfigError(
            f"{name} must have one stack of blocks, which would tell its depth; found: {places}. "
            "Use Table.for_shape(depth=..., base_depth=..., ...)."
        )
    (stack,) = stacks
    container = model.get_submodule(stack.name)
    # The same block in several places is one module; named_children() tells it once.
    if len(set(map(id, container._modules.values()))) < len(container._modules):
        raise ConfigError(
            f"{name} has the same block in several places of {stack.name}: the table has no rows "
            "for weights that several layers share. Use Table.for_shape(depth=..., base_depth=...) "
            "with the number of layers that a token passes; nothing was derived for it."
        )
    return len(stack.entries)


def _declare_model(
    model: nn.Module, roles: Roles | None = None, *, base: nn.Module | None = None
) -> dict[str, Role]:
    if roles is not None and not isinstance(roles, Mapping):
        raise ConfigError(f"roles = {roles!r}: give a mapping, {{name or pattern: role}}.")
    proposal = propose_roles(model)
    parameters = dict(model.named_parameters())
    trained = [*proposal.roles, *proposal.undecided]
    earlier = {name: spec_or_none(parameters[name]) for name in trained}
    problems: list[str] = []
    said = _said(roles or {}, trained, problems)

    specs: dict[str, Spec] = {}
    for name in trained:
        role = said.get(name)
        spec = earlier[name]
        if spec is not None and role in (None, spec.role):
            specs[name] = spec
            continue
        role = role or proposal.roles.get(name)
        shape = tuple(parameters[name].shape)
        if role is None:
            problems.append(f"{name} {list(shape)}: {proposal.undecided[name]}.")
            continue
        specs[name] = _spec(name, role, shape, proposal, problems)
    if base is not None:
        _add_base_fan_ins(specs, earlier, model, base, problems)
    if problems:
        raise ConfigError(_refusal(problems))
    for name, spec in specs.items():
        attach(parameters[name], spec)
    return {name: spec.role for name, spec in specs.items()}


def spec_or_none(parameter: Any) -> Spec | None:
    """The spec of a parameter, if it has one."""
    spec = getattr(parameter, "spec", None)
    return spec if isinstance(spec, Spec) else None


def _said(roles: Roles, names: list[str], problems: list[str]) -> dict[str, Role]:
    """By name of a parameter: the role that the user gives it."""
    said: dict[str, Role] = {}
    for pattern, word in roles.items():
        if word not in KNOWN_ROLES:
            near = did_you_mean(str(word), KNOWN_ROLES)
            remedy = f"Use one of: {', '.join(KNOWN_ROLES)}."
            problems.append(f"{pattern}: {word} is no role of a dense model.{near} {remedy}")
            continue
        matching = [name for name in names if fnmatchcase(name, pattern)]
        if not matching:
            near = did_you_mean(pattern, names)
            problems.append(f"{pattern}: matches no parameter that trains.{near}")
        for name in matching:
            if said.get(name, word) != word:
                problems.append(f"{name}: two patterns give it the roles {said[name]} and {word}.")
            said[name] = Role(word)
    return said


def _spec(
    name: str, role: Role, shape: tuple[int, ...], proposal: Proposal, problems: list[str]
) -> Spec:
    """The spec of a parameter, so far without a fan-in at the proxy."""
    fan_in = proposal.fan_ins.get(name) if role is Role.HIDDEN_WEIGHT else None
    if role is Role.HIDDEN_WEIGHT and fan_in is None:
        # A raw matrix may be [in, out] or [out, in].
        problems.append(
            f"{name} {list(shape)}: a hidden weight of a module whose kind does not tell its "
            "fan-in. Say it: declare(parameter, Role.HIDDEN_WEIGHT, fan_in, base_fan_in)."
        )
    problem = _misfit(name, role, shape, proposal.roles.get(name))
    if problem:
        problems.append(f"{name} {list(shape)}: {problem}")
    is_zero = role is Role.HIDDEN_BIAS or name.endswith("bias")
    is_constant = role not in (Role.EMBEDDING, Role.HIDDEN_WEIGHT, Role.UNEMBEDDING)
    constant = (0.0 if is_zero else 1.0) if is_constant else None
    return Spec(role, shape, fan_in, constant=constant)


def _misfit(name: str, role: Role, shape: tuple[int, ...], proposed: Role | None) -> str | None:
    """Why what the user says cannot be true of a parameter whose module is known; else None."""
    if role in CONSTANT_ROLES and proposed in (Role.HIDDEN_WEIGHT, *DRAWN_OUTSIDE):
        return f"a matrix, which has no row of gains and biases ({role}). Leave it {proposed}."
    if role in DRAWN_OUTSIDE and proposed in CONSTANT_ROLES:
        return f"a vector that is not drawn at random as {role} is. Leave it {proposed}."
    return None


def _add_base_fan_ins(
    specs: dict[str, Spec],
    earlier: Mapping[str, Spec | None],
    model: nn.Module,
    base: nn.Module,
    problems: list[str],
) -> None:
    """Give the specs of matrices of hidden weights the fan-ins of the same matrices of the base."""
    stacks = stacks_of(model)
    base_stacks = {stack.name: stack for stack in stacks_of(base)}
    base_modules = dict(base.named_modules())
    base_parameters = dict(base.named_parameters())
    for name, spec in specs.items():
        if spec.role is not Role.HIDDEN_WEIGHT or spec is earlier[name]:
            continue
        base_name = _name_in_base(name, stacks, base_stacks)
        parameter = base_parameters.get(base_name)
        if parameter is None:
            problems.append(f"{name}: the base has no parameter {base_name}.")
            continue
        path, _, attribute = base_name.rpartition(".")
        base_fan_in = fan_in_of(base_modules[path], attribute, parameter)
        if base_fan_in is None:
            problems.append(f"{name}: the base's {base_name} is of another kind.")
        specs[name] = replace(spec, base_fan_in=base_fan_in)


def _name_in_base(name: str, stacks: list[Stack], base_stacks: Mapping[str, Stack]) -> str:
    """The same parameter of the base: in the block at the same part of the depth."""
    for stack in stacks:
        block = stack.block_of(name)
        base_stack = base_stacks.get(stack.name)
        if block is not None and base_stack is not None:
            base_block = block * len(base_stack.entries) // len(stack.entries)
            return base_stack.renamed(name, base_block)
    return name


def _refusal(problems: list[str]) -> str:
    headline = f"{len(problems)} problems in what the parameters are"
    remedy = (
        'Say what they are: declare(model, {"name or pattern": Role.X, ...}) with one of: '
        f"{', '.join(KNOWN_ROLES)}."
    )
    return "\n".join([headline, *(f"  {problem}" for problem in problems), remedy])

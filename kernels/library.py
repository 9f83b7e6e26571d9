"""How an operation is made known to torch.

It has one schema, and one function for each of CPU, CUDA and shape-only tensors.
`torch.library.custom_op` would be shorter, but its Python wrappers cost three times the host time
of a plain definition. The operators registered here carry no autograd formula: each public function
is a `torch.autograd.Function` over a forward and a backward operator, so torch.compile traces
through both.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, ParamSpec, TypeVar

import torch
from torch.autograd.function import once_differentiable

from .reference import Join, Norm

_P = ParamSpec("_P")
_R = TypeVar("_R")

_NAMESPACE = "completep"
_torch_library: Any = torch.library  # its classes have no types
_library = _torch_library.Library(_NAMESPACE, "DEF")
# What each operator runs on CUDA tensors, by the operator's name.
LAUNCHERS: dict[str, Callable[..., Any]] = {}


class _Value(NamedTuple):
    """A parameter that torch's operators, which take numbers and tensors, get as its fields."""

    fields: str  # as torch's schema names them
    make: Callable[..., Any]  # the value, from its fields
    fields_of: Callable[[Any], tuple[Any, ...]]


# A Norm is made once for each of its fields' values. A Join may hold a tensor, which a cache would
# keep alive.
_VALUES = {
    "Join join": _Value(
        "float scale, float dropout_p, Tensor? seed",
        Join,
        lambda join: (join.scale, join.dropout_p, join.dropout_seed),
    ),
    "Norm norm": _Value(
        "str kind, float eps",
        functools.cache(Norm),
        lambda norm: (norm.kind, norm.eps),
    ),
}


def register(
    schema: str,
    *,
    cpu: Callable[_P, _R],
    cuda: Callable[..., _R],
    fake: Callable[..., Any],
) -> Callable[_P, _R]:
    """Define `completep::<schema>` and return it as a callable.

    `cpu` and `cuda` receive every argument of the schema by position; `fake` makes the outputs of
    tensors without data. A schema may have the parameters `Join join` and `Norm norm`: the three
    functions and the callable that is returned take these values, while torch's operator, and the
    launcher in `LAUNCHERS`, take the values' fields in their places.
    """
    name, _, signature = schema.partition("(")
    parameters = signature[: signature.index(") ->")].split(", ")
    for declaration, entry in _VALUES.items():
        schema = schema.replace(declaration, entry.fields)

    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    LAUNCHERS[name] = _of_fields(cuda, parameters)
    _library.impl(name, _of_fields(cpu, parameters), "CPU")
    _library.impl(name, LAUNCHERS[name], "CUDA")
    torch.library.register_fake(f"{_NAMESPACE}::{name}", _of_fields(fake, parameters), lib=_library)
    return _of_values(getattr(getattr(torch.ops, _NAMESPACE), name).default, parameters)


def first_derivative(backward: Callable[..., Any]) -> Callable[..., Any]:
    """A backward that refuses to be differentiated, as torch's `once_differentiable` makes one.

    That costs host time in every call; here only where a second derivative can be asked for.
    """
    checked = once_differentiable(backward)

    @functools.wraps(backward)
    def call(ctx: Any, *gradients: Any) -> Any:
        return checked(ctx, *gradients) if torch.is_grad_enabled() else backward(ctx, *gradients)

    return call


def _of_values(operator: Callable[..., Any], parameters: Sequence[str]) -> Callable[..., Any]:
    """`operator`, which takes the fields of values, as a function of the values."""
    places = []
    for place, declaration in enumerate(parameters):
        if declaration in _VALUES:
            places.append((place, _VALUES[declaration].fields_of))
    if not places:
        return operator
    places.reverse()  # from the end, so that the places before keep their numbers

    def call(*arguments: Any) -> Any:
        flat = list(arguments)
        for place, fields_of in places:
            flat[place : place + 1] = fields_of(flat[place])
        return operator(*flat)

    return call


def _of_fields(function: Callable[..., Any], parameters: Sequence[str]) -> Callable[..., Any]:
    """`function`, which takes values, as a function of their fields: the other way round."""
    spans = []
    start = 0
    for declaration in parameters:
        entry = _VALUES.get(declaration)
        if entry is None:
            start += 1
            continue
        stop = start + entry.fields.count(",") + 1
        spans.append((slice(start, stop), entry.make))
        start = stop
    if not spans:
        return function
    spans.reverse()  # from the end, as above

    def call(*flat: Any) -> Any:
        arguments = list(flat)
        for span, make in spans:
            arguments[span] = (make(*arguments[span]),)
        return function(*arguments)

    return call

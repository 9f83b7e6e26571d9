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
from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable

from .reference import Join, Norm

_NAMESPACE = "completep"
_library = torch.library.Library(_NAMESPACE, "DEF")
# What each operator runs on CUDA tensors, by the operator's name.
LAUNCHERS: dict[str, Callable[..., Any]] = {}


class _Value(NamedTuple):
    """A parameter of a schema that torch's operators, which take numbers and tensors, get in pieces."""

    fields: str  # its pieces, as torch's schema names them
    make: Callable[..., Any]  # of its pieces
    take_apart: Callable[[Any], tuple[Any, ...]]


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
    cpu: Callable[..., Any],
    cuda: Callable[..., Any],
    fake: Callable[..., Any],
) -> Any:
    """Define `completep::<schema>` and return it as a callable.

    `cpu` and `cuda` receive every argument of the schema by position; `fake` makes the outputs of
    tensors without data. A schema may have the parameters `Join join` and `Norm norm`: the three
    functions and the callable that is returned take these values, while torch's operator, and the
    launcher in `LAUNCHERS`, take the values' fields in their places.
    """
    name, _, rest = schema.partition("(")
    parameters = rest[: rest.index(") ->")].split(", ")
    for value, (fields, _, _) in _VALUES.items():
        schema = schema.replace(value, fields)
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    LAUNCHERS[name] = _of_pieces(cuda, parameters)
    _library.impl(name, _of_pieces(cpu, parameters), "CPU")
    _library.impl(name, LAUNCHERS[name], "CUDA")
    torch.library.register_fake(f"{_NAMESPACE}::{name}", _of_pieces(fake, parameters), lib=_library)
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
    """`operator`, which takes the pieces of values, as a function of the values."""
    places = [(k, _VALUES[name]) for k, name in enumerate(parameters) if name in _VALUES]
    if not places:
        return operator
    places.reverse()  # from the end, so that the places before keep their numbers

    def call(*arguments: Any) -> Any:
        flat = list(arguments)
        for place, value in places:
            flat[place : place + 1] = value.take_apart(flat[place])
        return operator(*flat)

    return call


def _of_pieces(function: Callable[..., Any], parameters: Sequence[str]) -> Callable[..., Any]:
    """`function`, which takes values, as a function of their pieces: the other way round."""
    spans = []
    start = 0
    for name in parameters:
        value = _VALUES.get(name)
        stop = start + (1 if value is None else value.fields.count(",") + 1)
        if value is not None:
            spans.append((start, stop, value))
        start = stop
    if not spans:
        return function
    spans.reverse()

    def call(*flat: Any) -> Any:
        arguments = list(flat)
        for first, end, value in spans:
            arguments[first:end] = [value.make(*arguments[first:end])]
        return function(*arguments)

    return call

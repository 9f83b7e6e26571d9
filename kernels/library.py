"""How an operation is made known to torch: one schema, and one function for each of CPU, CUDA and shape-only tensors.

`torch.library.custom_op` would be shorter, but its Python wrappers cost three times the host time of a plain definition.
The operators registered here carry no autograd formula: each public function is a `torch.autograd.Function` over a forward
and a backward operator, so torch.compile traces through both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from .reference import Join, Norm

_NAMESPACE = "completep"
_library = torch.library.Library(_NAMESPACE, "DEF")
LAUNCHERS: dict[str, Callable[..., Any]] = {}  # what each operator runs on CUDA tensors, by the operator's name

# Torch's operators take tensors, numbers and strings. A value that a schema of ours names reaches them as its fields.
_FIELDS = {
    "Join join": "float scale, float dropout_p, Tensor? seed",
    "Norm norm": "str kind, float eps",
}


def register(
    schema: str,
    *,
    cpu: Callable[..., Any],
    cuda: Callable[..., Any],
    fake: Callable[..., Any],
) -> Any:
    """Define `completep::<schema>` and return it as a callable.

    `cpu` and `cuda` receive every argument of the schema by position; `fake` makes the outputs of tensors without data.
    A schema may have the parameters `Join join` and `Norm norm`: the functions take these values, and so does the callable
    that is returned, while torch's operator, and the launcher in `LAUNCHERS`, take the values' fields in their places.
    """
    name, _, rest = schema.partition("(")
    parameters = rest[: rest.index(") ->")].split(", ")
    flat_schema = schema
    for value, fields in _FIELDS.items():
        flat_schema = flat_schema.replace(value, fields)
    _library.define(flat_schema, tags=(torch.Tag.pt2_compliant_tag,))
    LAUNCHERS[name] = _of_fields(cuda, parameters)
    _library.impl(name, _of_fields(cpu, parameters), "CPU")
    _library.impl(name, LAUNCHERS[name], "CUDA")
    torch.library.register_fake(f"{_NAMESPACE}::{name}", _of_fields(fake, parameters), lib=_library)
    operator = getattr(getattr(torch.ops, _NAMESPACE), name).default
    return _of_values(operator) if flat_schema != schema else operator


def _of_values(operator: Callable[..., Any]) -> Callable[..., Any]:
    """`operator`, which takes the fields of values, as a function of the values."""

    def call(*arguments: Any) -> Any:
        flat: list[Any] = []
        for argument in arguments:
            if isinstance(argument, Join):
                flat += (argument.scale, argument.dropout_p, argument.dropout_seed)
            elif isinstance(argument, Norm):
                flat += (argument.kind, argument.eps)
            else:
                flat.append(argument)
        return operator(*flat)

    return call


def _of_fields(function: Callable[..., Any], parameters: list[str]) -> Callable[..., Any]:
    """`function`, which takes values, as a function of the values' fields: the other way round."""
    if not set(parameters) & set(_FIELDS):
        return function
    makers = [_MAKERS.get(parameter, next) for parameter in parameters]

    def call(*flat: Any) -> Any:
        rest = iter(flat)
        return function(*[make(rest) for make in makers])

    return call


def _join(rest: Iterator[Any]) -> Join:
    return Join(next(rest), next(rest), next(rest))


def _norm(rest: Iterator[Any]) -> Norm:
    return Norm(next(rest), next(rest))


_MAKERS: dict[str, Callable[[Iterator[Any]], Any]] = {"Join join": _join, "Norm norm": _norm}

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


class _StructArgument(NamedTuple):
    """How an argument of type Join or Norm is passed to a torch operator.

    Operators accept numbers, strings and tensors, but no objects of ours. Such an argument is
    therefore unpacked into its fields.
    """

    fields: str  # their declarations in the operator's schema
    make: Callable[..., Any]  # the object, from its fields
    fields_of: Callable[[Any], tuple[Any, ...]]


# The key is how a schema declares the argument. Norm objects are cached by their field values. Join
# objects are not: a cached one would keep its seed tensor alive.
_STRUCT_ARGUMENTS = {
    "Join join": _StructArgument(
        "float scale, float dropout_p, Tensor? seed",
        Join,
        lambda join: (join.scale, join.dropout_p, join.dropout_seed),
    ),
    "Norm norm": _StructArgument(
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

    `cpu`, `cuda` and `fake` receive every argument of the schema by position. `fake` only makes
    outputs of the right shape and dtype, for tensors without data (meta, tracing). A schema may
    declare the arguments `Join join` and `Norm norm`: the three functions and the returned callable
    take these objects. The operator in torch.ops, and the entry in `LAUNCHERS`, take their fields
    one by one instead.
    """
    name, _, signature = schema.partition("(")
    parameters = signature[: signature.index(") ->")].split(", ")
    for declaration, entry in _STRUCT_ARGUMENTS.items():
        schema = schema.replace(declaration, entry.fields)

    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    LAUNCHERS[name] = _packing(cuda, parameters)
    _library.impl(name, _packing(cpu, parameters), "CPU")
    _library.impl(name, LAUNCHERS[name], "CUDA")
    torch.library.register_fake(f"{_NAMESPACE}::{name}", _packing(fake, parameters), lib=_library)
    return _unpacking(getattr(getattr(torch.ops, _NAMESPACE), name).default, parameters)


def first_derivative(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate a backward so that it refuses to be differentiated itself.

    torch's `once_differentiable` does so at a cost of host time in every call. Here it is applied
    only when grad mode is on, the only case in which a second derivative can be requested.
    """
    checked = once_differentiable(backward)

    @functools.wraps(backward)
    def call(ctx: Any, *gradients: Any) -> Any:
        return checked(ctx, *gradients) if torch.is_grad_enabled() else backward(ctx, *gradients)

    return call


def _unpacking(operator: Callable[..., Any], parameters: Sequence[str]) -> Callable[..., Any]:
    """Wrap `operator` so that it accepts Join and Norm objects and unpacks them into fields."""
    places = []
    for place, declaration in enumerate(parameters):
        if declaration in _STRUCT_ARGUMENTS:
            places.append((place, _STRUCT_ARGUMENTS[declaration].fields_of))
    if not places:
        return operator
    places.reverse()  # from the end, so that the places before keep their numbers

    def call(*arguments: Any) -> Any:
        flat = list(arguments)
        for place, fields_of in places:
            flat[place : place + 1] = fields_of(flat[place])
        return operator(*flat)

    return call


def _packing(function: Callable[..., Any], parameters: Sequence[str]) -> Callable[..., Any]:
    """Wrap `function` so that it accepts fields and packs them into Join and Norm objects."""
    spans = []
    start = 0
    for declaration in parameters:
        entry = _STRUCT_ARGUMENTS.get(declaration)
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

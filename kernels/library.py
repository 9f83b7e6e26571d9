"""How an operation is made known to torch: one schema, and one function for each of CPU, CUDA and shape-only tensors.

`torch.library.custom_op` would be shorter, but its Python wrappers cost three times the host time of a plain definition.
The operators registered here carry no autograd formula: each public function is a `torch.autograd.Function` over a forward
and a backward operator, so torch.compile traces through both. No module of this folder may be named like a public function of
the package: importing it would put it in the function's place.
"""

from collections.abc import Callable
from typing import Any

import torch

_NAMESPACE = "completep"
_library = torch.library.Library(_NAMESPACE, "DEF")
LAUNCHERS: dict[str, Callable[..., Any]] = {}  # what each operator runs on CUDA tensors, by the operator's name


def register(schema: str, *, cpu: Callable[..., Any], cuda: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """Define `completep::<schema>` and return it as a callable.

    `cpu` and `cuda` receive every argument of the schema by position; `fake` makes the outputs of tensors without data.
    """
    name = schema.partition("(")[0]
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, cpu, "CPU")
    _library.impl(name, cuda, "CUDA")
    LAUNCHERS[name] = cuda
    torch.library.register_fake(f"{_NAMESPACE}::{name}", fake, lib=_library)
    return getattr(getattr(torch.ops, _NAMESPACE), name).default

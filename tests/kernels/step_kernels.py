"""The implementations of the optimizer and loss operations, side by side:
what the tests of this folder run through.

"cpu" is what CPU tensors get; "triton" are the launchers of the kernels, on the GPU where there is
one, else on CPU tensors in Triton's interpreter. Tests name them by `IMPLEMENTATIONS`, so that one
test holds for both.
"""

import dataclasses
import importlib
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import torch

from megatron_completep.kernels import reference
from megatron_completep.kernels.cpu import cross_entropy, optimizer

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PACKAGE = "megatron_completep.kernels"


@dataclass(frozen=True)
class Implementation:
    adamw_: Callable[..., Any]
    sum_of_squares: Callable[..., Any]
    begin_step_: Callable[..., Any]
    cross_entropy_forward: Callable[..., Any]
    cross_entropy_backward_: Callable[..., Any]


def launchers(*modules: ModuleType) -> SimpleNamespace:
    """The Triton launchers of kernel modules, by the names of their operations."""
    found = {
        name: value
        for module in modules
        for name, value in vars(module).items()
        if name.startswith("launch_")
    }
    return SimpleNamespace(**{name.removeprefix("launch_"): value for name, value in found.items()})


def _triton() -> Implementation:
    names = [field.name for field in dataclasses.fields(Implementation)]
    found = launchers(
        *(
            importlib.import_module(f"{PACKAGE}.ops.{name}")
            for name in ("adamw", "grad_norm", "cross_entropy")
        )
    )
    return Implementation(**{name: getattr(found, name) for name in names})


IMPLEMENTATIONS = {"triton": _triton()}
if DEVICE == "cpu":
    IMPLEMENTATIONS["cpu"] = Implementation(
        optimizer.adamw_,
        optimizer.sum_of_squares,
        reference.begin_step_,
        cross_entropy.cross_entropy_forward,
        cross_entropy.cross_entropy_backward_,
    )


def mutant(module: str, old: str, new: str) -> ModuleType:
    """A copy of a kernel module whose source has every `old` replaced by `new`:
    what a slip of the pen would make of it.

    `module`: its name inside the package, "ops.adamw" or "tiling". The copy stands in the same
    folder, so that its imports hold. It registers no operators: torch knows those of the module
    itself.
    """
    origin = importlib.import_module(f"{PACKAGE}.{module}")
    source = Path(str(origin.__file__)).read_text()
    assert old in source, f"{module} no longer contains {old!r}: change the mutation with it"
    name = f"{origin.__package__}.mutant_{abs(hash((module, old, new)))}"
    # Triton reads the source of a kernel from its file
    path = Path(str(origin.__file__)).parent / "__pycache__" / f"{name}.py"
    path.parent.mkdir(exist_ok=True)
    path.write_text(source.replace(old, new))
    try:
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None and spec.loader is not None
        copy = importlib.util.module_from_spec(spec)
        sys.modules[name] = copy
        with mock.patch.object(
            importlib.import_module(f"{PACKAGE}.library"), "register", lambda *_, **__: None
        ):
            spec.loader.exec_module(copy)
    finally:
        path.unlink()
    return copy

"""What training.compile turns on: the operations between products as their compiled definitions.

For small models whole layers are compiled of the same definitions, see layer_graph.py.
"""

from __future__ import annotations

import importlib

import torch

from megatron_completep import kernels
from megatron_completep.errors import ConfigError


def compiled_definitions(
    asked: bool, device: torch.device, precision: torch.dtype
) -> kernels.CompiledDefinitions | None:
    """What a model computes with between its products; None: the operators of `kernels`.

    asked: training.compile. On a GPU each of the operators is one kernel already, and in float64
        the operators are kept, so that results do not depend on a compiler: None there, too.

    Raises ConfigError where there is no C++ compiler, which Inductor needs.
    """
    if not asked or idle_reason(device, precision) is not None:
        return None
    require_compiler()
    return kernels.CompiledDefinitions()


def idle_reason(device: torch.device, precision: torch.dtype) -> str | None:
    """Why training.compile changes nothing in a run; None where it does."""
    if device.type != "cpu":
        return "on a GPU each operation between products is one kernel already"
    if precision == torch.float64:
        return "float64 keeps its operators, so that results do not depend on a compiler"
    return None


def require_compiler() -> None:
    """Raises ConfigError where Inductor finds no C++ compiler."""
    # Inductor is slow to import, and only such a run needs it.
    builder = importlib.import_module("torch._inductor.cpp_builder")
    missing = importlib.import_module("torch._inductor.exc").InvalidCxxCompiler
    try:
        builder.get_cpp_compiler()
    except missing as error:
        raise ConfigError(
            "training.compile = true needs a C++ compiler on a CPU, and none was found. "
            "Install g++, or name one in the environment variable CXX, "
            "or use training.compile = false."
        ) from error

"""The same bits from the same run on a GPU, for runs that ask for it."""

from __future__ import annotations

import torch
import torch.utils.deterministic

from megatron_completep.launch import set_defaults

# With workspaces of a fixed size cuBLAS splits a product the same way whatever runs beside it.
VARIABLES = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}


def use_deterministic_algorithms() -> None:
    """Let this process compute with algorithms alone that repeat their bits.

    torch raises an error where it has no such algorithm. Attention takes a kernel whose backward
    adds in a fixed order. Call it before the first product on a GPU, as cuBLAS reads its variable
    then. It holds until the process ends.
    """
    set_defaults(VARIABLES)
    torch.use_deterministic_algorithms(True)
    # Otherwise torch would fill every buffer that is made without a value. The project's kernels
    # write all of theirs, and tests run with this filling.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]

"""Initial weights: a pure function of (seed, parameter name, global position), whatever the rank, layout or creation order.

Row r of a logical matrix is drawn from its own counter-based stream, keyed by (seed, name, r). A rank draws the rows it holds
and keeps its columns of them.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from torch import Tensor, nn

from megatron_completep.completep import Declaration, Role, Table, declaration_of
from megatron_completep.config.derived import own_factors
from megatron_completep.config.schema import OptimizerConfig
from megatron_completep.parallel.placement import Placement, logical_name, placement_of

CONSTANT_ROLES = (Role.PRE_NORM, Role.HIDDEN_BIAS, Role.FINAL_NORM, Role.QK_NORM)  # gains 1 and biases 0, set where created


@torch.no_grad()
def initialize(model: nn.Module, table: Table, optimizer: OptimizerConfig, seed: int) -> None:
    """Fill every weight in place with N(0, std^2), std from the table and the user's own factors; float32 draws."""
    for name, parameter in model.named_parameters():
        declaration = declaration_of(name, parameter)
        if declaration.role in CONSTANT_ROLES:
            continue
        placement = placement_of(parameter)
        logical = logical_name(name, parameter)
        std = initial_std(logical, declaration, table, optimizer)
        values = draw(placement, tuple(parameter.shape), seed, logical) * np.float32(std)
        parameter.copy_(torch.from_numpy(values))


def initial_std(name: str, declaration: Declaration, table: Table, optimizer: OptimizerConfig) -> float:
    """Standard deviation that a parameter starts with: the table's, times the user's own factors for its name."""
    return table.values(declaration.role, declaration.width_ratio, optimizer).init_std * own_factors(optimizer, name).init_std


def draw(placement: Placement, local_shape: tuple[int, ...], seed: int, name: str) -> np.ndarray:
    """Standard normal float32 values of the local part of a logical [rows, columns] matrix; padding rows are 0."""
    rows, columns = placement.global_shape
    key = int.from_bytes(hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest(), "little")
    own_rows = placement.ranges if placement.dim == 0 else ((0, rows),)
    local = np.zeros(local_shape, dtype=np.float32)
    position = 0
    for start, stop in own_rows:
        for row in range(start, min(stop, rows)):
            values = np.random.Generator(np.random.Philox(key=[key, row])).standard_normal(columns, dtype=np.float32)
            local[position + row - start] = values if placement.dim != 1 else np.concatenate([values[a:b] for a, b in placement.ranges])
        position += stop - start
    return local


def fingerprint(tensor: Tensor) -> str:
    """A hash of a tensor's bits, for tests and consistency checks."""
    return hashlib.blake2b(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes(), digest_size=16).hexdigest()

"""Initial weights: a pure function of (seed, parameter name, global position), whatever the rank, layout or creation order.

Row r of a logical matrix is drawn from its own counter-based stream, keyed by (seed, name, r). A rank draws the rows it holds
and keeps its columns of them. Of a tensor with more dimensions, all but the last count the rows.
"""

from __future__ import annotations

import hashlib
from itertools import product

import numpy as np
import torch
from torch import Tensor, nn

from megatron_completep.completep import Table
from megatron_completep.config.derived import own_factors
from megatron_completep.config.schema import OptimizerConfig
from megatron_completep.parallel.parameter import Range, Spec, specs_of


@torch.no_grad()
def initialize(model: nn.Module, table: Table, optimizer: OptimizerConfig, seed: int) -> None:
    """Fill every weight in place with N(0, std^2), std from the table and the user's own factors; float32 draws."""
    parameters = dict(model.named_parameters())
    for name, spec in specs_of(model).items():
        if spec.constant is not None:
            continue  # a gain or a bias: filled where it was made
        drawn_as = spec.stored_name(name)
        std = initial_std(drawn_as, spec, table, optimizer)
        values = draw(spec, seed, drawn_as) * np.float32(std)
        parameters[name].copy_(torch.from_numpy(values))


def initial_std(name: str, spec: Spec, table: Table, optimizer: OptimizerConfig) -> float:
    """Standard deviation that a parameter starts with: the table's, times the user's own factors for its name."""
    values = table.values(spec.role, spec.width_ratio, optimizer)
    return values.init_std * own_factors(optimizer, name).init_std


def draw(spec: Spec, seed: int, name: str) -> np.ndarray:
    """Standard normal float32 values of what this rank holds of a logical tensor; padding is 0."""
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    key = int.from_bytes(digest, "little")
    *leading, columns = spec.shape
    column_ranges = spec.local_ranges(len(leading))
    held = [_logical_indices(spec.local_ranges(dim), size) for dim, size in enumerate(leading)]
    local = np.zeros(spec.local_shape, dtype=np.float32)
    for place in product(*(indices.items() for indices in held)):
        local_index = tuple(here for here, _ in place)
        logical_index = tuple(there for _, there in place)
        row = int(np.ravel_multi_index(logical_index, leading)) if leading else 0
        generator = np.random.Generator(np.random.Philox(key=[key, row]))
        values = generator.standard_normal(columns, dtype=np.float32)
        if column_ranges == ((0, columns),):
            kept = values
        else:
            kept = np.concatenate([values[start:stop] for start, stop in column_ranges])
        local[local_index][: len(kept)] = kept
    return local


def _logical_indices(ranges: tuple[Range, ...], size: int) -> dict[int, int]:
    """Position in the local tensor -> position in the logical one, along one dimension; padding left out."""
    logical = [index for start, stop in ranges for index in range(start, stop)]
    return {here: there for here, there in enumerate(logical) if there < size}


def fingerprint(tensor: Tensor) -> str:
    """A hash of a tensor's bits, for tests and consistency checks."""
    bits = tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()
    return hashlib.blake2b(bits, digest_size=16).hexdigest()

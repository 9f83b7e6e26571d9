"""Initial weights: a pure function of (seed, parameter name, global position).

Neither the rank, the layout nor the order of creation matters. Row r of a logical matrix is drawn
from a counter-based stream of its own, keyed by (seed, name, r); a rank draws the rows it holds and
keeps its columns of them. Of a tensor with more dimensions, all but the last count the rows.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from megatron_completep.completep import Table
from megatron_completep.config.derived import own_factors
from megatron_completep.config.schema import OptimizerConfig
from megatron_completep.parallel.parameter import Range, Spec, part_name, specs_of


@torch.no_grad()
def initialize(model: nn.Module, table: Table, optimizer: OptimizerConfig, seed: int) -> None:
    """Fill every weight in place with N(0, std^2), drawn in float32.

    The std is the table's, times the user's factors for the parameter. Raises ConfigError for a
    parameter that declares no role.
    """
    parameters = dict(model.named_parameters())
    for name, spec in specs_of(model).items():
        if spec.constant is not None:
            continue  # a gain or a bias: filled where it was made
        drawn_as = spec.stored_name(name)
        weights = draw(spec, seed, drawn_as)
        scale_parts(weights, spec.local_parts(), drawn_as, spec, table, optimizer)
        parameters[name].copy_(torch.from_numpy(weights))


def scale_parts(
    drawn: np.ndarray,
    parts: Sequence[tuple[str, int]],
    name: str,
    spec: Spec,
    table: Table,
    optimizer: OptimizerConfig,
) -> None:
    """Multiply standard normal numbers by the standard deviation of each part, in place.

    parts: name and size of each, as they lie along `spec.part_dim` of what was drawn.
    """
    start = 0
    for part, size in parts:
        index = (slice(None),) * spec.part_dim + (slice(start, start + size),)
        drawn[index] *= np.float32(initial_std(name, part, spec, table, optimizer))
        start += size


def initial_std(
    name: str, part: str, spec: Spec, table: Table, optimizer: OptimizerConfig
) -> float:
    """Standard deviation that a logical part starts with: the table's, times the user's factors."""
    by_table = table.values(spec.role, spec.width_ratio, optimizer, spec.matrix_of(part))
    return by_table.init_std * own_factors(optimizer, name, part_name(name, part)).init_std


def draw(spec: Spec, seed: int, name: str) -> np.ndarray:
    """Standard normal float32 numbers, of the shape that this rank holds of a logical tensor.

    Padding is 0.
    """
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    key = int.from_bytes(digest, "little")
    *leading, columns = spec.shape
    column_ranges = spec.local_ranges(len(leading))
    # All columns of a row are drawn and those of this rank kept: a normal number takes a varying
    # count of random words, so that none can be skipped.
    all_columns = column_ranges == ((0, columns),)
    local = np.zeros(spec.local_shape, dtype=np.float32)
    local_rows = local.reshape(math.prod(spec.local_shape[:-1]), spec.local_shape[-1])
    # One generator is set back to the beginning of each row's stream: making another one would take
    # several times as long as drawing a short row.
    stream = np.random.Philox(key=[key, 0])
    generator = np.random.Generator(stream)
    beginning = stream.state
    for local_row, logical_row in zip(*_rows(spec, leading), strict=True):
        beginning["state"]["key"][1] = logical_row
        stream.state = beginning
        numbers = generator.standard_normal(columns, dtype=np.float32)
        if not all_columns:
            numbers = np.concatenate([numbers[start:stop] for start, stop in column_ranges])
        local_rows[local_row, : len(numbers)] = numbers  # what is behind them is padding
    return local


def _rows(spec: Spec, leading: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """(number in the local tensor, number in the logical one) of every row that this rank holds.

    The number in the logical tensor is the same on every rank that draws the row.
    """
    if not leading:
        return np.zeros(1, dtype=np.int64), np.zeros(1, dtype=np.int64)
    indices = [_indices(spec.local_ranges(i), size) for i, size in enumerate(leading)]
    local = np.ix_(*(local for local, _ in indices))
    logical = np.ix_(*(logical for _, logical in indices))
    return (
        np.ravel_multi_index(local, spec.local_shape[:-1]).ravel(),
        np.ravel_multi_index(logical, leading).ravel(),
    )


def _indices(ranges: tuple[Range, ...], size: int) -> tuple[np.ndarray, np.ndarray]:
    """(positions in the local tensor, positions in the logical one) along one dimension.

    Padding is left out.
    """
    logical = np.concatenate([np.arange(start, stop) for start, stop in ranges])
    is_held = logical < size
    return np.flatnonzero(is_held), logical[is_held]


def fingerprint(tensor: Tensor) -> str:
    """A hash of a tensor's bits, for tests and consistency checks."""
    bits = tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()
    return hashlib.blake2b(bits, digest_size=16).hexdigest()

"""Float8 operands: the largest magnitude, then the cast with its transpose.

They are two passes: a scale must be known before the first element is rounded. Magnitudes are
compared as integers, whose order is that of floats without a sign, with NaN above infinity; a
maximum has the same bits in any order. The definition is `reference.float8_cast`.
"""

import torch
from torch import Tensor

from ..cpu import float8 as cpu
from ..launch import block_shape, float8_tile, options
from ..library import register
from ..optional_triton import tl, triton
from ..reference import float8_dtype
from ..tiling import ceil_div


@triton.jit
def _magnitude_bits(x: tl.tensor) -> tl.tensor:
    return x.to(tl.float32).to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def float8_largest_kernel(
    x: tl.tensor, largest: tl.tensor, n: tl.tensor, BLOCK: tl.constexpr
) -> None:
    """Each program looks at one block of the n elements. largest: int32 [1], bits of a float."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    i = start + tl.arange(0, BLOCK)
    bits = _magnitude_bits(tl.load(x + i, mask=i < n, other=0.0))
    tl.atomic_max(largest, tl.max(bits, 0), sem="relaxed")


@triton.jit
def float8_largest_of_segments_kernel(
    values: tl.tensor,
    segments: tl.tensor,  # int64 [programs, 3]: start, length, group
    largest: tl.tensor,  # int32 [groups], bits of floats
    BLOCK: tl.constexpr,
) -> None:
    """Each program looks at one segment."""
    row = segments + tl.program_id(0).to(tl.int64) * 3
    start = tl.multiple_of(tl.load(row), 64)
    length = tl.load(row + 1).to(tl.int32)
    group = tl.load(row + 2)
    # The padding of a segment is zero, and is loaded too, or vectors of 128 bits would be split.
    padded = tl.multiple_of((length + 63) // 64 * 64, 64)
    most = tl.zeros([BLOCK], dtype=tl.int32)
    for offset in range(0, length, BLOCK):
        i = offset + tl.arange(0, BLOCK)
        x = tl.load(values + start + i, mask=i < padded, other=0.0)
        most = tl.maximum(most, _magnitude_bits(x))
    tl.atomic_max(largest + group, tl.max(most, 0), sem="relaxed")


@triton.jit
def float8_cast_kernel(
    x: tl.tensor,  # [m, n]
    amax: tl.tensor,  # float32 []
    data: tl.tensor,  # float8 [m, n]
    transposed: tl.tensor,  # float8 [n, m], if TRANSPOSE
    scale: tl.tensor,  # float32 []
    m: tl.tensor,
    n: tl.tensor,
    LARGEST: tl.constexpr,  # number of the type
    TRANSPOSE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """Each program casts one tile; the first one writes the scale, too."""
    # The exponent of the scale is read off the bits of amax / LARGEST, as `frexp` does.
    magnitude = tl.load(amax)
    quotient = (magnitude * (1.0 / LARGEST)).to(tl.int32, bitcast=True)
    biased = tl.minimum(tl.maximum((quotient >> 23) + 1, 2), 253)
    biased = tl.where(magnitude == 0.0, 127, biased)
    # All bits of the exponent and one more: NaN, which no clamp below hides.
    finite = _magnitude_bits(magnitude) < 0x7F800000
    own_scale = tl.where(finite, biased << 23, 0x7FC00000).to(tl.float32, bitcast=True)
    inverse = tl.where(finite, (254 - biased) << 23, 0x7FC00000).to(tl.float32, bitcast=True)

    tiles = tl.cdiv(n, COLUMNS)
    program = tl.program_id(0)
    rows = (program // tiles).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = (program % tiles).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (rows[:, None] < m) & (columns[None, :] < n)
    places = rows[:, None] * n + columns[None, :]
    scaled = tl.load(x + places, mask=inside, other=0.0).to(tl.float32) * inverse
    scaled = tl.maximum(scaled, -LARGEST, propagate_nan=tl.PropagateNan.ALL)
    scaled = tl.minimum(scaled, LARGEST, propagate_nan=tl.PropagateNan.ALL)
    rounded = scaled.to(data.dtype.element_ty)
    tl.store(data + places, rounded, mask=inside)
    if TRANSPOSE:
        turned = columns[:, None] * m + rows[None, :]
        inside_turned = (columns[:, None] < n) & (rows[None, :] < m)
        tl.store(transposed + turned, tl.trans(rounded), mask=inside_turned)
    if program == 0:
        tl.store(scale, own_scale)


def launch_largest(x: Tensor) -> Tensor:
    """float32 [] of `x` of any shape."""
    x = x.contiguous()
    largest = torch.zeros((), dtype=torch.int32, device=x.device)
    size = x.numel()
    if size > 0:
        block, num_warps, _ = block_shape("float8_largest", x.dtype, x.device)
        grid = (ceil_div(size, block),)
        float8_largest_kernel[grid](x, largest, size, BLOCK=block, **options(num_warps))
    return largest.view(torch.float32)


def launch_largest_of_segments(values: Tensor, segments: Tensor, groups: int) -> Tensor:
    """float32 [groups]; `segments` as `device_segments` returns them."""
    largest = torch.zeros(groups, dtype=torch.int32, device=values.device)
    if segments.shape[0] > 0:
        # The table was cut to the blocks of AdamW, whose threads load elements of 4 bytes.
        block, num_warps, _ = block_shape("adamw", torch.float32, values.device)
        num_warps = max(1, num_warps * values.element_size() // 4)
        grid = (segments.shape[0],)
        float8_largest_of_segments_kernel[grid](
            values, segments, largest, BLOCK=block, **options(num_warps)
        )
    return largest.view(torch.float32)


def launch_cast(
    x: Tensor, amax: Tensor, gradient: bool, transpose: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """See `float8_cast`."""
    x = x.contiguous()
    rows, columns = x.shape
    dtype = float8_dtype(gradient)
    data = torch.empty_like(x, dtype=dtype)
    transposed = x.new_empty((columns, rows) if transpose else (0,), dtype=dtype)
    scale = torch.empty((), dtype=torch.float32, device=x.device)
    tile = float8_tile(x.dtype, x.device)
    grid = (max(1, ceil_div(rows, tile.rows) * ceil_div(columns, tile.columns)),)
    float8_cast_kernel[grid](
        x,
        amax,
        data,
        transposed,
        scale,
        rows,
        columns,
        LARGEST=torch.finfo(dtype).max,
        TRANSPOSE=transpose,
        ROWS=tile.rows,
        COLUMNS=tile.columns,
        **tile.options,
    )
    return data, scale, transposed


def _fake_cast(
    x: Tensor, amax: Tensor, gradient: bool, transpose: bool
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = float8_dtype(gradient)
    shape = (x.shape[1], x.shape[0]) if transpose else (0,)
    scale = x.new_empty((), dtype=torch.float32)
    return x.new_empty(x.shape, dtype=dtype), scale, x.new_empty(shape, dtype=dtype)


_largest = register(
    "float8_largest(Tensor x) -> Tensor",
    cpu=cpu.largest_magnitude,
    cuda=launch_largest,
    fake=lambda x: x.new_empty((), dtype=torch.float32),
)
_largest_of_segments = register(
    "float8_largest_of_segments(Tensor values, Tensor segments, int groups) -> Tensor",
    cpu=cpu.largest_of_segments,
    cuda=launch_largest_of_segments,
    fake=lambda values, segments, groups: values.new_empty(groups, dtype=torch.float32),
)
_cast = register(
    "float8_cast(Tensor x, Tensor amax, bool gradient, bool transpose) -> (Tensor, Tensor, Tensor)",
    cpu=cpu.float8_cast,
    cuda=launch_cast,
    fake=_fake_cast,
)


def largest_magnitude(x: Tensor) -> Tensor:
    """float32 []: the largest magnitude of `x`; NaN where an element is NaN."""
    return _largest(x.detach())


def largest_of_segments(values: Tensor, segments: Tensor, groups: int) -> Tensor:
    """float32 [groups]: the same for each group of segments of the flat `values`.

    segments: int64 [k, 3]: start, length, group (`device_segments`), padded with zeros to a
        multiple of 64. A group without any has 0.
    """
    return _largest_of_segments(values, segments, groups)


def float8_cast(
    x: Tensor, amax: Tensor, gradient: bool = False, transpose: bool = False
) -> tuple[Tensor, Tensor, Tensor | None]:
    """`x` [m, n] in float8, the scale [] by which it was divided, and its transpose [n, m].

    amax: float32 [], the magnitude up to which elements are told apart; larger ones saturate.
    gradient: e5m2 in place of e4m3.
    transpose: without it the third result is None.
    """
    data, scale, transposed = _cast(x.detach(), amax, gradient, transpose)
    return data, scale, transposed if transpose else None

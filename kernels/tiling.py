"""What the kernels that walk over rows have in common: a tile of ROWS rows, each covered by power-of-two segments of columns.

Segment k is WIDTHS[k] wide and starts at column k * WIDTHS[0]; all are alike, or there are two (`segments` chooses them).
Lanes past column HIDDEN are masked. Arithmetic is float32; row numbers are int64.
"""

# mypy: disable-error-code=assignment
# (A kernel's tuples of segments grow as they are unrolled.)

import torch
from torch import Tensor

from .optional_triton import tl, triton


def next_power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()


def segments(hidden: int) -> tuple[int, ...]:
    """Powers of two that cover `hidden` with few idle lanes: 768 = 3 x 256, 5120 = 4096 + 1024, 1000 -> 1024, 4096 = 2 x 2048.

    Three alike keep a row inside a warp. Two halves make wide rows cheaper in registers: one half is finished before the other.
    """
    whole = max(16, next_power_of_two(hidden))
    first = whole // 2
    second = max(128, next_power_of_two(hidden - first)) if hidden > first else whole
    if hidden in (384, 768):
        return (hidden // 3,) * 3
    if hidden > 512 and second < first:
        return first, second
    return (first, first) if whole >= 2048 else (whole,)


def row_bucket(hidden: int) -> int:
    """Hidden sizes that are launched alike share the elements their segments cover."""
    return sum(segments(hidden))


def rows_of(x: Tensor) -> tuple[Tensor, int]:
    """`x` and the distance between its rows [..., H], in elements; copied only when its rows are not evenly spaced."""
    hidden = x.shape[-1]
    if x.is_contiguous():
        return x, hidden
    x = x.reshape(-1, hidden)
    if x.stride(1) != 1:
        x = x.contiguous()
    return x, x.stride(0)


def new_like(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Without data, contiguous, of the shape of `x`."""
    return torch.empty(x.shape, dtype=dtype, device=x.device)


@triton.jit
def zero_tile(ROWS: tl.constexpr, WIDTH: tl.constexpr):
    return tl.zeros((ROWS, WIDTH), tl.float32)


@triton.jit
def load_vector(
    vector, ROWS: tl.constexpr, START: tl.constexpr, WIDTH: tl.constexpr, HIDDEN: tl.constexpr
):
    """One segment of `vector` [H] for every row of a tile: in the tile's own layout, it needs no exchange through shared memory."""
    column = START + tl.arange(0, WIDTH)[None, :] + tl.zeros((ROWS, 1), tl.int32)
    return tl.load(vector + column, mask=column < HIDDEN, other=0.0)


@triton.jit
def load_tile(
    tensor, row, in_rows, stride, START: tl.constexpr, WIDTH: tl.constexpr, HIDDEN: tl.constexpr
):
    """One segment of the rows of `tensor`, `stride` elements apart, in float32; 0 outside."""
    column = START + tl.arange(0, WIDTH)[None, :]
    return tl.load(tensor + row * stride + column, mask=in_rows & (column < HIDDEN), other=0.0).to(
        tl.float32
    )


@triton.jit
def store_tile(
    tensor, tile, row, in_rows, START: tl.constexpr, WIDTH: tl.constexpr, HIDDEN: tl.constexpr
):
    """One segment of contiguous rows, rounded to the tensor's dtype."""
    column = START + tl.arange(0, WIDTH)[None, :]
    tl.store(
        tensor + row * HIDDEN + column,
        tile.to(tensor.dtype.element_ty),
        mask=in_rows & (column < HIDDEN),
    )


@triton.jit
def row_sum(tiles):
    """Sum along the rows of all segments [ROWS, 1]."""
    if (
        tiles[len(tiles) - 1].shape[1] == tiles[0].shape[1]
    ):  # alike: added up first, they need one exchange between the warps
        total = tiles[0]
        for k in tl.static_range(1, len(tiles)):
            total += tiles[k]
        total = tl.sum(total, axis=1, keep_dims=True)
    else:
        total = tl.sum(tiles[0], axis=1, keep_dims=True) + tl.sum(tiles[1], axis=1, keep_dims=True)
    return total


@triton.jit
def dropout_factor(
    seed, dropout_p, row, START: tl.constexpr, WIDTH: tl.constexpr, HIDDEN: tl.constexpr
):
    """0 or 1 / (1 - p), a function of the seed and the position alone; one Philox counter serves four columns."""
    # Loaded at every use: a key known outside a loop would be spread over its ten rounds there, and hold twenty registers.
    key = tl.load(seed)
    counter = row * ((HIDDEN + 3) // 4) + (START // 4 + tl.arange(0, WIDTH // 4))[None, :]
    word_0, word_1, word_2, word_3 = tl.randint4x(key, counter)
    words = tl.join(tl.join(word_0, word_2), tl.join(word_1, word_3))
    words = tl.reshape(words, (row.shape[0], WIDTH)).to(tl.uint32, bitcast=True)
    threshold = tl.ceil(dropout_p * 16777216.0).to(tl.uint32) << 8  # the upper 24 bits decide
    return tl.where(words >= threshold, 1.0 / (1.0 - dropout_p), 0.0)


@triton.jit
def add_branch(
    total, branch, branch_bias, seed, y, row, in_rows, branch_stride, scale, dropout_p,
    START: tl.constexpr, WIDTH: tl.constexpr, HIDDEN: tl.constexpr,
):  # fmt: skip
    """One segment of the new residual stream: `total` plus the scaled branch, rounded as it is stored, and stored."""
    update = load_tile(branch, row, in_rows, branch_stride, START, WIDTH, HIDDEN)
    if branch_bias is not None:
        update += load_vector(branch_bias, row.shape[0], START, WIDTH, HIDDEN).to(tl.float32)
    if seed is not None:
        update *= dropout_factor(seed, dropout_p, row, START, WIDTH, HIDDEN)
    stored = (total + scale * update).to(y.dtype.element_ty)
    store_tile(y, stored, row, in_rows, START, WIDTH, HIDDEN)
    return stored.to(tl.float32)


@triton.jit
def store_branch_gradient(
    gradient,
    d_branch,
    seed,
    row,
    in_rows,
    scale,
    dropout_p,
    START: tl.constexpr,
    WIDTH: tl.constexpr,
    HIDDEN: tl.constexpr,
):
    """One segment of the branch's gradient from that of the stream: stored, and returned in float32."""
    gradient *= scale
    if seed is not None:
        gradient *= dropout_factor(seed, dropout_p, row, START, WIDTH, HIDDEN)
    store_tile(d_branch, gradient, row, in_rows, START, WIDTH, HIDDEN)
    return gradient


@triton.jit
def store_partial(
    partials,
    k: tl.constexpr,
    K: tl.constexpr,
    tile,
    START: tl.constexpr,
    WIDTH: tl.constexpr,
    HIDDEN: tl.constexpr,
):
    """The column sums of one segment, to this program's row of `partials` [P, K, H]."""
    column = START + tl.arange(0, WIDTH)
    offset = tl.program_id(0).to(tl.int64) * K * HIDDEN + k * HIDDEN
    tl.store(partials + offset + column, tl.sum(tile, axis=0), mask=column < HIDDEN)

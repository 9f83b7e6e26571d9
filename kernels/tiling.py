"""What the kernels that walk over rows share: how rows are cut into tiles and segments.

A tile is ROWS rows. Each row is covered by power-of-two segments of columns: segment k is WIDTHS[k]
wide and starts at column k * WIDTHS[0]. All segments are alike, or there are two (`segments`
chooses them). Lanes past column HIDDEN are masked. Arithmetic is float32; row numbers are int64.

In kernels `row` is the tile's row numbers [ROWS, 1], and `in_rows` says which of them exist.
"""

# mypy: disable-error-code=assignment
# (A kernel's tuples of segments grow as they are unrolled.)

import torch
from torch import Tensor

from .optional_triton import tl, triton


def next_power_of_two(n: int) -> int:
    """The smallest power of two that is not below `n`, for n >= 1."""
    return 1 << (n - 1).bit_length()


def ceil_div(count: int, size: int) -> int:
    """How many blocks of `size` cover `count`.

    `triton.cdiv` is made for kernels too, and costs six Python calls on the host.
    """
    return -(-count // size)


def segments(hidden: int) -> tuple[int, ...]:
    """Powers of two that cover `hidden` columns with few idle lanes.

    768 = 3 x 256, 5120 = 4096 + 1024, 1000 -> 1024, 4096 = 2 x 2048. Three alike keep a row inside
    a warp. Two halves of a wide row let the compiler finish one before it begins the other.
    """
    if hidden in (384, 768):
        return (hidden // 3,) * 3

    covering = max(16, next_power_of_two(hidden))
    half = covering // 2
    if hidden > 512:
        # The columns after the first half may need less than another half.
        remainder = max(128, next_power_of_two(hidden - half))
        if remainder < half:
            return half, remainder
    return (half, half) if covering >= 2048 else (covering,)


def row_bucket(hidden: int) -> int:
    """Hidden sizes that are launched alike share the elements that their segments cover."""
    return sum(segments(hidden))


def rows_of(x: Tensor) -> tuple[Tensor, int]:
    """`x` and the distance between its rows [..., H], in elements.

    It is copied only when its rows are not evenly spaced.
    """
    hidden = x.shape[-1]
    if x.is_contiguous():
        return x, hidden
    x = x.reshape(-1, hidden)
    if x.stride(1) != 1:
        x = x.contiguous()
    return x, x.stride(0)


def new_like(x: Tensor, dtype: torch.dtype) -> Tensor:
    """A contiguous tensor of the shape of `x`, not initialized."""
    return torch.empty(x.shape, dtype=dtype, device=x.device)


@triton.jit
def zero_tiles(ROWS: tl.constexpr, WIDTHS: tl.constexpr) -> tl.tuple:
    """Zeros for the segments of a tile, in float32."""
    tiles = ()
    for k in tl.static_range(len(WIDTHS)):
        tiles += (tl.zeros((ROWS, WIDTHS[k]), tl.float32),)
    return tiles


@triton.jit
def load_vector(
    vector: tl.tensor,
    ROWS: tl.constexpr,
    SEGMENT: tl.constexpr,
    WIDTHS: tl.constexpr,
    HIDDEN: tl.constexpr,
) -> tl.tensor:
    """One segment of `vector` [H], once for every row of a tile.

    It is loaded in the tile's own layout, so that it needs no exchange through shared memory.
    """
    column = SEGMENT * WIDTHS[0] + tl.arange(0, WIDTHS[SEGMENT])[None, :]
    column += tl.zeros((ROWS, 1), tl.int32)
    in_row = column < HIDDEN
    return tl.load(vector + column, mask=in_row, other=0.0)


@triton.jit
def load_tile(
    tensor: tl.tensor,
    row: tl.tensor,
    in_rows: tl.tensor,
    stride: tl.tensor,
    SEGMENT: tl.constexpr,
    WIDTHS: tl.constexpr,
    HIDDEN: tl.constexpr,
) -> tl.tensor:
    """One segment of the rows of `tensor`, `stride` elements apart, in float32; 0 outside."""
    column = SEGMENT * WIDTHS[0] + tl.arange(0, WIDTHS[SEGMENT])[None, :]
    mask = in_rows & (column < HIDDEN)
    address = tensor + row * stride + column
    return tl.load(address, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def store_tile(
    tensor: tl.tensor,
    tile: tl.tensor,
    row: tl.tensor,
    in_rows: tl.tensor,
    SEGMENT: tl.constexpr,
    WIDTHS: tl.constexpr,
    HIDDEN: tl.constexpr,
) -> None:
    """One segment of contiguous rows, rounded to the tensor's dtype."""
    column = SEGMENT * WIDTHS[0] + tl.arange(0, WIDTHS[SEGMENT])[None, :]
    mask = in_rows & (column < HIDDEN)
    address = tensor + row * HIDDEN + column
    tl.store(address, tile.to(tensor.dtype.element_ty), mask=mask)


@triton.jit
def row_sum(tiles: tl.tuple) -> tl.tensor:
    """Sum along the rows of all segments [ROWS, 1]."""
    if tiles[len(tiles) - 1].shape[1] == tiles[0].shape[1]:
        # Segments alike are added up first: then one exchange between the warps is enough.
        total = tiles[0]
        for k in tl.static_range(1, len(tiles)):
            total += tiles[k]
        total = tl.sum(total, axis=1, keep_dims=True)
    else:
        total = tl.sum(tiles[0], axis=1, keep_dims=True) + tl.sum(tiles[1], axis=1, keep_dims=True)
    return total


@triton.jit
def row_dot(a: tl.tuple, b: tl.tuple) -> tl.tensor:
    """Sum along the rows of the products of all segments [ROWS, 1]."""
    products = ()
    for k in tl.static_range(len(a)):
        products += (a[k] * b[k],)
    return row_sum(products)


@triton.jit
def add_tiles(total: tl.tuple, tiles: tl.tuple) -> tl.tuple:
    """total + tiles, segment by segment."""
    added = ()
    for k in tl.static_range(len(tiles)):
        added += (total[k] + tiles[k],)
    return added


@triton.jit
def add_tile_products(total: tl.tuple, a: tl.tuple, b: tl.tuple) -> tl.tuple:
    """total + a * b, segment by segment."""
    added = ()
    for k in tl.static_range(len(a)):
        added += (total[k] + a[k] * b[k],)
    return added


@triton.jit
def dropout_rows(seed: tl.tensor, row: tl.tensor) -> tl.tensor:
    """The numbers of rows in the whole batch [ROWS, 1], as in `reference.dropout_rows`."""
    number = row
    if seed is not None:
        # A tensor has fewer than 2^31 rows, so that the division is one of 32 bits.
        batch = tl.load(seed + 1).to(tl.int32)
        row = row.to(tl.int32)
        index = row // batch
        sample = row - index * batch + tl.load(seed + 2)
        turn = tl.load(seed + 5)
        start = tl.where(index < turn, tl.load(seed + 4), tl.load(seed + 6) - turn)
        number = sample * tl.load(seed + 3) + index + start
    return number


@triton.jit
def dropout_factor(
    seed: tl.tensor,
    dropout_p: tl.tensor,
    number: tl.tensor,
    SEGMENT: tl.constexpr,
    WIDTHS: tl.constexpr,
    HIDDEN: tl.constexpr,
) -> tl.tensor:
    """0 or 1 / (1 - p), a function of the key, the rows' numbers and the columns alone.

    One Philox counter serves four columns, as in `reference.dropout_factor`.
    """
    # The key is loaded at every use. A key known outside a loop would be spread over its ten rounds
    # there, and hold twenty registers.
    key = tl.load(seed)
    row_counter = number * ((HIDDEN + 3) // 4)
    column_counter = SEGMENT * WIDTHS[0] // 4 + tl.arange(0, WIDTHS[SEGMENT] // 4)
    counter = row_counter + column_counter[None, :]
    word_0, word_1, word_2, word_3 = tl.randint4x(key, counter)

    # This order of the joins leaves word c % 4 at column c.
    even = tl.join(word_0, word_2)
    odd = tl.join(word_1, word_3)
    words = tl.reshape(tl.join(even, odd), (number.shape[0], WIDTHS[SEGMENT]))
    words = words.to(tl.uint32, bitcast=True)
    # The upper 24 bits decide.
    threshold = tl.ceil(dropout_p * 16777216.0).to(tl.uint32) << 8
    return tl.where(words >= threshold, 1.0 / (1.0 - dropout_p), 0.0)


@triton.jit
def add_branch(
    total: tl.tensor,
    branch: tl.tensor,
    branch_bias: tl.tensor,
    seed: tl.tensor,
    y: tl.tensor,
    row: tl.tensor,
    number: tl.tensor,
    in_rows: tl.tensor,
    branch_stride: tl.tensor,
    scale: tl.tensor,
    dropout_p: tl.tensor,
    SEGMENT: tl.constexpr,
    WIDTHS: tl.constexpr,
    HIDDEN: tl.constexpr,
) -> tl.tensor:
    """One segment of the new residual stream: `total` plus the scaled branch.

    It is rounded and stored to `y`; what is returned is the rounded segment in float32.
    """
    update = load_tile(branch, row, in_rows, branch_stride, SEGMENT, WIDTHS, HIDDEN)
    if branch_bias is not None:
        bias = load_vector(branch_bias, row.shape[0], SEGMENT, WIDTHS, HIDDEN)
        update += bias.to(tl.float32)
    if seed is not None:
        update *= dropout_factor(seed, dropout_p, number, SEGMENT, WIDTHS, HIDDEN)
    stored = (total + scale * update).to(y.dtype.element_ty)
    store_tile(y, stored, row, in_rows, SEGMENT, WIDTHS, HIDDEN)
    return stored.to(tl.float32)


@triton.jit
def branch_gradient(
    gradient: tl.tensor,
    seed: tl.tensor,
    number: tl.tensor,
    scale: tl.tensor,
    dropout_p: tl.tensor,
    SEGMENT: tl.constexpr,
    WIDTHS: tl.constexpr,
    HIDDEN: tl.constexpr,
) -> tl.tensor:
    """One segment of the branch's gradient, in float32, from that of the stream."""
    gradient *= scale
    if seed is not None:
        gradient *= dropout_factor(seed, dropout_p, number, SEGMENT, WIDTHS, HIDDEN)
    return gradient


@triton.jit
def store_partial(
    partials: tl.tensor,
    VECTOR: tl.constexpr,
    VECTORS: tl.constexpr,
    tile: tl.tensor,
    SEGMENT: tl.constexpr,
    WIDTHS: tl.constexpr,
    HIDDEN: tl.constexpr,
) -> None:
    """Store a segment's column sums in vector VECTOR of this program's row of `partials`.

    partials: [P programs, VECTORS, H].
    """
    column = SEGMENT * WIDTHS[0] + tl.arange(0, WIDTHS[SEGMENT])
    program = tl.program_id(0).to(tl.int64)
    offset = program * VECTORS * HIDDEN + VECTOR * HIDDEN
    in_row = column < HIDDEN
    address = partials + offset + column
    tl.store(address, tl.sum(tile, axis=0), mask=in_row)

"""Gradients of a norm's vectors over rows that are too wide for registers.

The backward kernel of residual_norm.py then leaves d_weight, d_bias and d_branch_bias to this one,
which reads the rows again, a block of columns per program. It fills the same `partials`
[P programs, VECTORS, H hidden], without atomics, so the result is deterministic.
"""

from torch import Tensor

from ..launch import vector_gradient_shape
from ..optional_triton import tl, triton
from ..reference import Norm
from ..tiling import ceil_div, rows_of


@triton.jit(do_not_specialize=["rows"])
def norm_vector_gradients_kernel(
    d_out: tl.tensor, y: tl.tensor, mean: tl.tensor, rstd: tl.tensor, d_branch: tl.tensor,
    partials: tl.tensor, rows: tl.tensor, d_out_stride: tl.tensor, y_stride: tl.tensor,
    HIDDEN: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, RMS: tl.constexpr,
    HAS_BIAS: tl.constexpr, STAGES: tl.constexpr,
) -> None:  # fmt: skip
    """Vector-gradient partial sums for rows too wide for the backward kernel.

    Program (p, c) covers every P-th row tile of column block c. `d_branch` is None without a branch
    bias.
    """
    first_column = tl.program_id(1) * BLOCK
    column = first_column + tl.arange(0, BLOCK)
    in_row = (column < HIDDEN)[None, :]
    d_weight = tl.zeros((ROWS, BLOCK), tl.float32)
    d_bias = tl.zeros((ROWS, BLOCK), tl.float32)
    d_branch_bias = tl.zeros((ROWS, BLOCK), tl.float32)

    # x_hat is recomputed from the stored y and the statistics of its row.
    first_tile = tl.program_id(0).to(tl.int64)
    tiles = tl.cdiv(rows, ROWS)
    for tile in tl.range(first_tile, tiles, tl.num_programs(0), num_stages=STAGES):
        row = tile * ROWS + tl.arange(0, ROWS).to(tl.int64)[:, None]
        in_rows = row < rows
        mask = in_rows & in_row
        d_out_address = d_out + row * d_out_stride + column[None, :]
        d_out_tile = tl.load(d_out_address, mask=mask, other=0.0).to(tl.float32)
        y_address = y + row * y_stride + column[None, :]
        y_tile = tl.load(y_address, mask=mask, other=0.0).to(tl.float32)
        row_mean = 0.0 if RMS else tl.load(mean + row, mask=in_rows, other=0.0)
        x_hat = (y_tile - row_mean) * tl.load(rstd + row, mask=in_rows, other=0.0)
        d_weight += d_out_tile * x_hat
        if HAS_BIAS:
            d_bias += d_out_tile
        if d_branch is not None:
            d_branch_address = d_branch + row * HIDDEN + column[None, :]
            d_branch_bias += tl.load(d_branch_address, mask=mask, other=0.0).to(tl.float32)

    # Each program writes one row of partials, in the vector order of the backward kernel.
    VECTORS: tl.constexpr = 1 + HAS_BIAS + (d_branch is not None)
    program = tl.program_id(0).to(tl.int64)
    address = partials + program * VECTORS * HIDDEN + column
    mask = column < HIDDEN
    tl.store(address, tl.sum(d_weight, axis=0), mask=mask)
    if HAS_BIAS:
        tl.store(address + HIDDEN, tl.sum(d_bias, axis=0), mask=mask)
    if d_branch is not None:
        tl.store(address + (VECTORS - 1) * HIDDEN, tl.sum(d_branch_bias, axis=0), mask=mask)


def launch_vector_gradients(
    d_out: Tensor,
    y: Tensor,
    mean: Tensor,
    rstd: Tensor,
    d_branch: Tensor | None,
    partials: Tensor,
    has_bias: bool,
    norm: Norm,
) -> None:
    """Second launch of the backward for rows too wide for registers; fills `partials`."""
    programs, _, hidden = partials.shape
    rows = y.numel() // hidden
    d_out, d_out_stride = rows_of(d_out)
    y, y_stride = rows_of(y)
    block = vector_gradient_shape(y.device)
    grid = (programs, ceil_div(hidden, block.columns))
    norm_vector_gradients_kernel[grid](
        d_out, y, mean, rstd, d_branch, partials,
        rows, d_out_stride, y_stride,
        HIDDEN=hidden, BLOCK=block.columns, ROWS=block.rows, RMS=norm.rms,
        HAS_BIAS=has_bias, STAGES=2, **block.options,
    )  # fmt: skip

"""Scaled residual add + LayerNorm or RMSNorm in one pass over the rows, forward and backward; also either half alone.

    forward    y = residual + scale * dropout(branch + branch_bias)     rounded to y's dtype before the statistics
               x_hat = (y - mean) * rstd                                mean = 0 for RMSNorm
               out = x_hat * weight + bias

    backward   g = d_out * weight
               d_residual = d_y + rstd * (g - mean(g) - x_hat * mean(g * x_hat))      no mean(g) for RMSNorm
               d_branch = scale * dropout factor * d_residual
               d_weight = sum over rows of d_out * x_hat;  d_bias = ... of d_out;  d_branch_bias = ... of d_branch

A row of H elements is covered by two power-of-two segments, FIRST and SECOND (which may be 0), so that few lanes idle when H
is not a power of two. A program holds a tile of ROWS rows. The backward runs P programs, each of which strides over the
rows, adds its share of the three vector gradients up in registers, and writes them to its own row of `partials` [P, K, H]:
no atomics and no locks, hence the same bits every time. Rows wider than the registers hold leave the vector gradients to a
second kernel. All arithmetic is float32; row numbers are int64.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import native
from .launch import norm_backward_shape, norm_forward_shape, reduction_shape, rows_of, vector_gradient_shape

# --- forward ----------------------------------------------------------------------------------------------------------------------


@triton.jit
def _load_vector(vector, START: tl.constexpr, WIDTH: tl.constexpr, HIDDEN: tl.constexpr):
    column = START + tl.arange(0, WIDTH)[None, :]
    return tl.load(vector + column, mask=column < HIDDEN, other=0.0)


@triton.jit
def _dropout_factor(seed, dropout_p, row, START: tl.constexpr, WIDTH: tl.constexpr, HIDDEN: tl.constexpr):
    """0 or 1 / (1 - p), a function of seed and position alone; one Philox counter serves four columns."""
    counter = row * ((HIDDEN + 3) // 4) + (START // 4 + tl.arange(0, WIDTH // 4))[None, :]
    word_0, word_1, word_2, word_3 = tl.randint4x(tl.load(seed), counter)
    words = tl.join(tl.join(word_0, word_2), tl.join(word_1, word_3))
    words = tl.reshape(words, (row.shape[0], WIDTH)).to(tl.uint32, bitcast=True)
    uniform = (words >> 8).to(tl.float32) * 5.9604644775390625e-08  # 2^-24
    return tl.where(uniform >= dropout_p, 1.0 / (1.0 - dropout_p), 0.0)


@triton.jit
def _sum_segment(
    residual, branch, branch_bias, seed, y, row, in_rows, residual_stride, branch_stride, scale, dropout_p,
    START: tl.constexpr, WIDTH: tl.constexpr, HIDDEN: tl.constexpr,
):  # fmt: skip
    """One segment of the new residual stream in float32: added up, rounded as it is stored, and stored."""
    column = START + tl.arange(0, WIDTH)[None, :]
    mask = in_rows & (column < HIDDEN)
    total = tl.load(residual + row * residual_stride + column, mask=mask, other=0.0).to(tl.float32)
    if branch is not None:
        update = tl.load(branch + row * branch_stride + column, mask=mask, other=0.0).to(tl.float32)
        if branch_bias is not None:
            update += _load_vector(branch_bias, START, WIDTH, HIDDEN).to(tl.float32)
        if seed is not None:
            update *= _dropout_factor(seed, dropout_p, row, START, WIDTH, HIDDEN)
        stored = (total + scale * update).to(y.dtype.element_ty)
        tl.store(y + row * HIDDEN + column, stored, mask=mask)
        total = stored.to(tl.float32)
    return total


@triton.jit
def _centre(x, mean, START: tl.constexpr, WIDTH: tl.constexpr, HIDDEN: tl.constexpr):
    """x - mean, and 0 in the lanes past the end of the row, which must not count in the variance."""
    column = START + tl.arange(0, WIDTH)[None, :]
    return tl.where(column < HIDDEN, x - mean, 0.0)


@triton.jit
def _store_normed(x_hat, weight, bias, out, row, in_rows, START: tl.constexpr, WIDTH: tl.constexpr, HIDDEN: tl.constexpr):
    column = START + tl.arange(0, WIDTH)[None, :]
    normed = x_hat * _load_vector(weight, START, WIDTH, HIDDEN).to(tl.float32)
    if bias is not None:
        normed += _load_vector(bias, START, WIDTH, HIDDEN).to(tl.float32)
    tl.store(out + row * HIDDEN + column, normed.to(out.dtype.element_ty), mask=in_rows & (column < HIDDEN))


@triton.jit(do_not_specialize=["rows"])
def forward_kernel(
    residual, branch, branch_bias, weight, bias, seed, y, out, mean, rstd,
    rows, residual_stride, branch_stride, scale, eps, dropout_p,
    HIDDEN: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr, ROWS: tl.constexpr, RMS: tl.constexpr,
):  # fmt: skip
    """`branch` None: norm alone. `out` None: add alone."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS).to(tl.int64)[:, None]
    in_rows = row < rows
    x_1 = _sum_segment(residual, branch, branch_bias, seed, y, row, in_rows, residual_stride, branch_stride, scale, dropout_p,
                       0, FIRST, HIDDEN)  # fmt: skip
    if SECOND > 0:
        x_2 = _sum_segment(residual, branch, branch_bias, seed, y, row, in_rows, residual_stride, branch_stride, scale, dropout_p,
                           FIRST, SECOND, HIDDEN)  # fmt: skip
    if out is not None:
        if not RMS:
            total = tl.sum(x_1, axis=1, keep_dims=True)
            if SECOND > 0:
                total += tl.sum(x_2, axis=1, keep_dims=True)
            row_mean = total / HIDDEN
            tl.store(mean + row, row_mean, mask=in_rows)
            x_1 = _centre(x_1, row_mean, 0, FIRST, HIDDEN)
            if SECOND > 0:
                x_2 = _centre(x_2, row_mean, FIRST, SECOND, HIDDEN)
        squares = tl.sum(x_1 * x_1, axis=1, keep_dims=True)
        if SECOND > 0:
            squares += tl.sum(x_2 * x_2, axis=1, keep_dims=True)
        row_rstd = tl.rsqrt(squares / HIDDEN + eps)
        tl.store(rstd + row, row_rstd, mask=in_rows)
        _store_normed(x_1 * row_rstd, weight, bias, out, row, in_rows, 0, FIRST, HIDDEN)
        if SECOND > 0:
            _store_normed(x_2 * row_rstd, weight, bias, out, row, in_rows, FIRST, SECOND, HIDDEN)


# --- backward ---------------------------------------------------------------------------------------------------------------------


@triton.jit
def _load_gradients(
    d_out, y, gain, row, in_rows, row_mean, row_rstd, d_out_stride, y_stride,
    START: tl.constexpr, WIDTH: tl.constexpr, HIDDEN: tl.constexpr,
):  # fmt: skip
    """(d_out, x_hat, d_out * gain) of one segment; 0 past the end of the row, in the first and the last."""
    column = START + tl.arange(0, WIDTH)[None, :]
    mask = in_rows & (column < HIDDEN)
    d_normed = tl.load(d_out + row * d_out_stride + column, mask=mask, other=0.0).to(tl.float32)
    x_hat = (tl.load(y + row * y_stride + column, mask=mask, other=0.0).to(tl.float32) - row_mean) * row_rstd
    return d_normed, x_hat, d_normed * gain.to(tl.float32)


@triton.jit
def _store_gradients(
    gradient, d_y, d_residual, d_branch, seed, row, in_rows, d_y_stride, scale, dropout_p,
    START: tl.constexpr, WIDTH: tl.constexpr, HIDDEN: tl.constexpr,
):  # fmt: skip
    """Add `d_y` to the norm's gradient, store both outputs of one segment, return the branch's in float32."""
    column = START + tl.arange(0, WIDTH)[None, :]
    mask = in_rows & (column < HIDDEN)
    if d_y is not None:
        gradient += tl.load(d_y + row * d_y_stride + column, mask=mask, other=0.0).to(tl.float32)
    if d_residual is not None:
        tl.store(d_residual + row * HIDDEN + column, gradient.to(d_residual.dtype.element_ty), mask=mask)
    if d_branch is not None:
        gradient *= scale
        if seed is not None:
            gradient *= _dropout_factor(seed, dropout_p, row, START, WIDTH, HIDDEN)
        tl.store(d_branch + row * HIDDEN + column, gradient.to(d_branch.dtype.element_ty), mask=mask)
    return gradient


@triton.jit
def _store_partial(partials, k: tl.constexpr, K: tl.constexpr, tile, START: tl.constexpr, WIDTH: tl.constexpr, HIDDEN: tl.constexpr):
    column = START + tl.arange(0, WIDTH)
    offset = tl.program_id(0).to(tl.int64) * K * HIDDEN + k * HIDDEN
    tl.store(partials + offset + column, tl.sum(tile, axis=0), mask=column < HIDDEN)


@triton.jit(do_not_specialize=["rows"])
def backward_kernel(
    d_y, d_out, y, mean, rstd, weight, seed, d_residual, d_branch, partials,
    rows, d_y_stride, d_out_stride, y_stride, scale, dropout_p,
    HIDDEN: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr, ROWS: tl.constexpr, RMS: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_BRANCH_BIAS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """`partials` None: the vector gradients are left to `vector_gradient_kernel`. STAGES 2 prefetches the next tile of rows."""
    K: tl.constexpr = 1 + HAS_BIAS + HAS_BRANCH_BIAS
    gain_1 = _load_vector(weight, 0, FIRST, HIDDEN)  # outside the loop: inside, it would be prefetched again for every tile
    if SECOND > 0:
        gain_2 = _load_vector(weight, FIRST, SECOND, HIDDEN)
    weight_1 = tl.zeros((ROWS, FIRST), tl.float32)
    bias_1 = tl.zeros((ROWS, FIRST), tl.float32)
    branch_1 = tl.zeros((ROWS, FIRST), tl.float32)
    if SECOND > 0:
        weight_2 = tl.zeros((ROWS, SECOND), tl.float32)
        bias_2 = tl.zeros((ROWS, SECOND), tl.float32)
        branch_2 = tl.zeros((ROWS, SECOND), tl.float32)

    for tile in tl.range(tl.program_id(0).to(tl.int64), tl.cdiv(rows, ROWS), tl.num_programs(0), num_stages=STAGES):
        row = tile * ROWS + tl.arange(0, ROWS).to(tl.int64)[:, None]
        in_rows = row < rows
        row_rstd = tl.load(rstd + row, mask=in_rows, other=0.0)
        row_mean = 0.0 if RMS else tl.load(mean + row, mask=in_rows, other=0.0)
        d_out_1, x_hat_1, g_1 = _load_gradients(d_out, y, gain_1, row, in_rows, row_mean, row_rstd, d_out_stride, y_stride,
                                                0, FIRST, HIDDEN)  # fmt: skip
        along = tl.sum(g_1 * x_hat_1, axis=1, keep_dims=True)
        if SECOND > 0:
            d_out_2, x_hat_2, g_2 = _load_gradients(d_out, y, gain_2, row, in_rows, row_mean, row_rstd, d_out_stride, y_stride,
                                                    FIRST, SECOND, HIDDEN)  # fmt: skip
            along += tl.sum(g_2 * x_hat_2, axis=1, keep_dims=True)
        along = along / HIDDEN
        g_mean = 0.0
        if not RMS:
            g_mean = tl.sum(g_1, axis=1, keep_dims=True)
            if SECOND > 0:
                g_mean += tl.sum(g_2, axis=1, keep_dims=True)
            g_mean = g_mean / HIDDEN

        d_1 = _store_gradients((g_1 - g_mean - x_hat_1 * along) * row_rstd, d_y, d_residual, d_branch, seed, row, in_rows,
                               d_y_stride, scale, dropout_p, 0, FIRST, HIDDEN)  # fmt: skip
        if SECOND > 0:
            d_2 = _store_gradients((g_2 - g_mean - x_hat_2 * along) * row_rstd, d_y, d_residual, d_branch, seed, row, in_rows,
                                   d_y_stride, scale, dropout_p, FIRST, SECOND, HIDDEN)  # fmt: skip
        if partials is not None:
            weight_1 += d_out_1 * x_hat_1
            if SECOND > 0:
                weight_2 += d_out_2 * x_hat_2
            if HAS_BIAS:
                bias_1 += d_out_1
                if SECOND > 0:
                    bias_2 += d_out_2
            if HAS_BRANCH_BIAS:
                branch_1 += d_1
                if SECOND > 0:
                    branch_2 += d_2

    if partials is not None:
        _store_partial(partials, 0, K, weight_1, 0, FIRST, HIDDEN)
        if SECOND > 0:
            _store_partial(partials, 0, K, weight_2, FIRST, SECOND, HIDDEN)
        if HAS_BIAS:
            _store_partial(partials, 1, K, bias_1, 0, FIRST, HIDDEN)
            if SECOND > 0:
                _store_partial(partials, 1, K, bias_2, FIRST, SECOND, HIDDEN)
        if HAS_BRANCH_BIAS:
            _store_partial(partials, K - 1, K, branch_1, 0, FIRST, HIDDEN)
            if SECOND > 0:
                _store_partial(partials, K - 1, K, branch_2, FIRST, SECOND, HIDDEN)


@triton.jit(do_not_specialize=["rows"])
def vector_gradient_kernel(
    d_out, y, mean, rstd, d_branch, partials, rows, d_out_stride, y_stride,
    HIDDEN: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, RMS: tl.constexpr, HAS_BIAS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Partial sums for rows too wide for `backward_kernel`: program (p, c) sums its rows of one block of columns."""
    K: tl.constexpr = 1 + HAS_BIAS + (d_branch is not None)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    in_row = (column < HIDDEN)[None, :]
    d_weight = tl.zeros((ROWS, BLOCK), tl.float32)
    d_bias = tl.zeros((ROWS, BLOCK), tl.float32)
    d_branch_bias = tl.zeros((ROWS, BLOCK), tl.float32)
    for tile in tl.range(tl.program_id(0).to(tl.int64), tl.cdiv(rows, ROWS), tl.num_programs(0), num_stages=STAGES):
        row = tile * ROWS + tl.arange(0, ROWS).to(tl.int64)[:, None]
        in_rows = row < rows
        mask = in_rows & in_row
        d_normed = tl.load(d_out + row * d_out_stride + column[None, :], mask=mask, other=0.0).to(tl.float32)
        x = tl.load(y + row * y_stride + column[None, :], mask=mask, other=0.0).to(tl.float32)
        if not RMS:
            x -= tl.load(mean + row, mask=in_rows, other=0.0)
        d_weight += d_normed * (x * tl.load(rstd + row, mask=in_rows, other=0.0))
        if HAS_BIAS:
            d_bias += d_normed
        if d_branch is not None:
            d_branch_bias += tl.load(d_branch + row * HIDDEN + column[None, :], mask=mask, other=0.0).to(tl.float32)
    first = partials + tl.program_id(0).to(tl.int64) * K * HIDDEN + column
    tl.store(first, tl.sum(d_weight, axis=0), mask=column < HIDDEN)
    if HAS_BIAS:
        tl.store(first + HIDDEN, tl.sum(d_bias, axis=0), mask=column < HIDDEN)
    if d_branch is not None:
        tl.store(first + (K - 1) * HIDDEN, tl.sum(d_branch_bias, axis=0), mask=column < HIDDEN)


@triton.jit(do_not_specialize=["rows"])
def add_backward_kernel(
    d_y, seed, d_branch, partials, rows, d_y_stride, scale, dropout_p,
    HIDDEN: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Backward of the add alone: d_branch = scale * dropout factor * d_y, and its sum over rows where `partials` is given."""
    branch_1 = tl.zeros((ROWS, FIRST), tl.float32)
    if SECOND > 0:
        branch_2 = tl.zeros((ROWS, SECOND), tl.float32)
    for tile in tl.range(tl.program_id(0).to(tl.int64), tl.cdiv(rows, ROWS), tl.num_programs(0), num_stages=STAGES):
        row = tile * ROWS + tl.arange(0, ROWS).to(tl.int64)[:, None]
        in_rows = row < rows
        branch_1 += _store_gradients(tl.zeros((ROWS, FIRST), tl.float32), d_y, None, d_branch, seed, row, in_rows, d_y_stride,
                                     scale, dropout_p, 0, FIRST, HIDDEN)  # fmt: skip
        if SECOND > 0:
            branch_2 += _store_gradients(tl.zeros((ROWS, SECOND), tl.float32), d_y, None, d_branch, seed, row, in_rows, d_y_stride,
                                         scale, dropout_p, FIRST, SECOND, HIDDEN)  # fmt: skip
    if partials is not None:
        _store_partial(partials, 0, 1, branch_1, 0, FIRST, HIDDEN)
        if SECOND > 0:
            _store_partial(partials, 0, 1, branch_2, FIRST, SECOND, HIDDEN)


@triton.jit
def reduce_partials_kernel(partials, into, count, stride, HIDDEN: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """into [H] += sum over `count` rows, `stride` apart, in a fixed order."""
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    in_row = column < HIDDEN
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    for start in range(0, count, ROWS):
        row = start + tl.arange(0, ROWS)[:, None]
        total += tl.load(partials + row * stride + column[None, :], mask=(row < count) & in_row[None, :], other=0.0)
    old = tl.load(into + column, mask=in_row, other=0.0)
    tl.store(into + column, old + tl.sum(total, axis=0), mask=in_row)


# --- launchers --------------------------------------------------------------------------------------------------------------------


def _launch_forward(residual, branch, branch_bias, weight, bias, seed, y, out, mean, rstd, scale, eps, rms, dropout_p) -> None:
    hidden = residual.shape[-1]
    rows = residual.numel() // hidden
    if rows == 0:
        return
    shape = norm_forward_shape(hidden)
    residual, residual_stride = rows_of(residual)
    branch, branch_stride = (None, 0) if branch is None else rows_of(branch)
    forward_kernel[(triton.cdiv(rows, shape.rows),)](
        residual, branch, branch_bias, weight, bias, seed if dropout_p > 0.0 else None, y, out, mean, rstd,
        rows, residual_stride, branch_stride, scale, eps, dropout_p,
        HIDDEN=hidden, FIRST=shape.first, SECOND=shape.second, ROWS=shape.rows, RMS=rms, **shape.options,
    )  # fmt: skip


def _new_statistics(x: Tensor, rms: bool) -> tuple[Tensor, Tensor]:
    rows = x.numel() // x.shape[-1]
    return x.new_empty(0 if rms else rows, dtype=torch.float32), x.new_empty(rows, dtype=torch.float32)


def _new_like(x: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty(x.shape, dtype=dtype, device=x.device)


def norm_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, rms: bool, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    if x.dtype == torch.float64:
        return native.norm_forward(x, weight, bias, eps, rms, out_dtype)
    out = _new_like(x, out_dtype)
    mean, rstd = _new_statistics(x, rms)
    _launch_forward(x, None, None, weight, bias, None, None, out, mean, rstd, 1.0, eps, rms, 0.0)
    return out, mean, rstd


def residual_norm_forward(
    residual: Tensor,
    branch: Tensor,
    branch_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    scale: float,
    eps: float,
    rms: bool,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if residual.dtype == torch.float64:
        return native.residual_norm_forward(residual, branch, branch_bias, weight, bias, scale, eps, rms, dropout_p, seed)
    y, out = _new_like(residual, residual.dtype), _new_like(branch, branch.dtype)
    mean, rstd = _new_statistics(residual, rms)
    _launch_forward(residual, branch, branch_bias, weight, bias, seed, y, out, mean, rstd, scale, eps, rms, dropout_p)
    return y, out, mean, rstd


def scaled_add_forward(
    residual: Tensor, branch: Tensor, branch_bias: Tensor | None, scale: float, dropout_p: float, seed: Tensor | None
) -> Tensor:
    if residual.dtype == torch.float64:
        return native.scaled_add_forward(residual, branch, branch_bias, scale, dropout_p, seed)
    y = _new_like(residual, residual.dtype)
    _launch_forward(residual, branch, branch_bias, None, None, seed, y, None, None, None, scale, 0.0, True, dropout_p)
    return y


def residual_norm_backward(
    d_y: Tensor | None,
    d_out: Tensor,
    y: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    has_branch: bool,
    has_bias: bool,
    has_branch_bias: bool,
    scale: float,
    rms: bool,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    if y.dtype == torch.float64:
        return native.residual_norm_backward(
            d_y, d_out, y, mean, rstd, weight, has_branch, has_bias, has_branch_bias, scale, rms, dropout_p, seed
        )
    hidden = y.shape[-1]
    rows = y.numel() // hidden
    shape = norm_backward_shape(hidden, y.dtype, y.device)
    d_residual = _new_like(y, y.dtype)
    d_branch = _new_like(d_out, d_out.dtype) if has_branch else None
    partials = y.new_empty((shape.programs, 1 + has_bias + has_branch_bias, hidden), dtype=torch.float32)
    d_out, d_out_stride = rows_of(d_out)
    y, y_stride = rows_of(y)
    d_y, d_y_stride = (None, 0) if d_y is None else rows_of(d_y)
    backward_kernel[(shape.programs if shape.holds_vectors else max(1, triton.cdiv(rows, shape.rows)),)](
        d_y, d_out, y, mean, rstd, weight, seed if dropout_p > 0.0 else None, d_residual, d_branch,
        partials if shape.holds_vectors else None, rows, d_y_stride, d_out_stride, y_stride, scale, dropout_p,
        HIDDEN=hidden, FIRST=shape.first, SECOND=shape.second, ROWS=shape.rows, RMS=rms, HAS_BIAS=has_bias,
        HAS_BRANCH_BIAS=has_branch_bias, STAGES=shape.stages, **shape.options,
    )  # fmt: skip
    if not shape.holds_vectors:
        block = vector_gradient_shape(y.device)
        vector_gradient_kernel[(shape.programs, triton.cdiv(hidden, block.columns))](
            d_out, y, mean, rstd, d_branch if has_branch_bias else None, partials, rows, d_out_stride, y_stride,
            HIDDEN=hidden, BLOCK=block.columns, ROWS=block.rows, RMS=rms, HAS_BIAS=has_bias, STAGES=2, **block.options,
        )  # fmt: skip
    return d_residual, partials.new_empty(0, dtype=d_out.dtype) if d_branch is None else d_branch, partials


def scaled_add_backward(
    d_y: Tensor, has_branch_bias: bool, scale: float, dropout_p: float, seed: Tensor | None, branch_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    if d_y.dtype == torch.float64:
        return native.scaled_add_backward(d_y, has_branch_bias, scale, dropout_p, seed, branch_dtype)
    hidden = d_y.shape[-1]
    shape = norm_backward_shape(hidden, d_y.dtype, d_y.device)
    d_branch = _new_like(d_y, branch_dtype)
    partials = d_y.new_empty((shape.programs, int(has_branch_bias), hidden), dtype=torch.float32)
    rows = d_y.numel() // hidden
    d_y, d_y_stride = rows_of(d_y)
    add_backward_kernel[(shape.programs,)](
        d_y, seed if dropout_p > 0.0 else None, d_branch, partials if has_branch_bias else None,
        rows, d_y_stride, scale, dropout_p,
        HIDDEN=hidden, FIRST=shape.first, SECOND=shape.second, ROWS=shape.rows, STAGES=shape.stages, **shape.options,
    )  # fmt: skip
    return d_branch, partials


def reduce_partials(partials: Tensor, k: int, into: Tensor) -> None:
    if into.dtype == torch.float64:
        native.reduce_partials(partials, k, into)
        return
    count, kinds, hidden = partials.shape
    shape = reduction_shape(into.device)
    reduce_partials_kernel[(triton.cdiv(hidden, shape.columns),)](
        partials[:, k], into, count, kinds * hidden, HIDDEN=hidden, ROWS=shape.rows, BLOCK=shape.columns, **shape.options
    )

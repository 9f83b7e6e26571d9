"""Scaled residual add + LayerNorm or RMSNorm in one pass over the rows, forward and backward; also the norm alone.

    forward    y = residual + scale * dropout(branch + branch_bias)     rounded to y's dtype before the statistics
               x_hat = (y - mean) * rstd                                mean = 0 for RMSNorm
               out = x_hat * weight + bias

    backward   g = d_out * weight
               d_residual = d_y + rstd * (g - mean(g) - x_hat * mean(g * x_hat))      no mean(g) for RMSNorm
               d_branch = scale * dropout factor * d_residual
               d_weight = sum over rows of d_out * x_hat;  d_bias = ... of d_out;  d_branch_bias = ... of d_branch

The forward holds a tile of rows in each program (tiling.py). The backward runs P programs, each of which strides over the
rows, adds its share of the three vector gradients up in registers, and writes them to its own row of `partials` [P, K, H]: no
atomics and no locks, hence the same bits every time. Rows wider than the registers hold leave the vector gradients to a
second kernel.
"""

# mypy: disable-error-code=assignment
# (A kernel's tuples of segments grow as they are unrolled.)

from typing import Any

import torch
from torch import Tensor

from ..cpu import residual_norm as cpu
from ..launch import (
    WIDEST_IN_REGISTERS,
    backward_shape,
    forward_shape,
    partial_rows,
    vector_gradient_shape,
)
from ..library import first_derivative, register
from ..optional_triton import tl, triton
from ..reference import Join, Norm, compute_dtype
from ..tiling import (
    add_branch,
    load_tile,
    load_vector,
    new_like,
    row_sum,
    rows_of,
    store_branch_gradient,
    store_partial,
    store_tile,
    zero_tile,
)
from .partial_sums import Sink, receivers, vector_gradients

# --- kernels ----------------------------------------------------------------------------------------------------------------------


@triton.jit
def _centred(x, mean, WIDTHS: tl.constexpr, HIDDEN: tl.constexpr):
    """x - mean, and 0 in the lanes past the end of the row, which must not count in the variance."""
    tiles = ()
    for k in tl.static_range(len(WIDTHS)):
        tiles += (_centred_segment(x[k], mean, k * WIDTHS[0], WIDTHS[k], HIDDEN),)
    return tiles


@triton.jit
def _centred_segment(x, mean, START: tl.constexpr, WIDTH: tl.constexpr, HIDDEN: tl.constexpr):
    column = START + tl.arange(0, WIDTH)[None, :]
    return tl.where(column < HIDDEN, x - mean, 0.0)


@triton.jit
def _row_dot(a, b):
    products = ()
    for k in tl.static_range(len(a)):
        products += (a[k] * b[k],)
    return row_sum(products)


@triton.jit
def _add(total, tiles):
    added = ()
    for k in tl.static_range(len(tiles)):
        added += (total[k] + tiles[k],)
    return added


@triton.jit
def _multiply_add(total, a, b):
    added = ()
    for k in tl.static_range(len(a)):
        added += (total[k] + a[k] * b[k],)
    return added


@triton.jit(do_not_specialize=["rows"])
def residual_norm_forward_kernel(
    residual, branch, branch_bias, weight, bias, seed, y, out, mean, rstd,
    rows, residual_stride, branch_stride, scale, eps, dropout_p,
    HIDDEN: tl.constexpr, WIDTHS: tl.constexpr, ROWS: tl.constexpr, RMS: tl.constexpr,
):  # fmt: skip
    """`branch` None: norm alone."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS).to(tl.int64)[:, None]
    in_rows = row < rows
    x = ()
    for k in tl.static_range(len(WIDTHS)):
        total = load_tile(residual, row, in_rows, residual_stride, k * WIDTHS[0], WIDTHS[k], HIDDEN)
        if branch is not None:
            total = add_branch(total, branch, branch_bias, seed, y, row, in_rows, branch_stride, scale, dropout_p,
                               k * WIDTHS[0], WIDTHS[k], HIDDEN)  # fmt: skip
        x += (total,)
    if not RMS:
        row_mean = row_sum(x) / HIDDEN
        tl.store(mean + row, row_mean, mask=in_rows)
        x = _centred(x, row_mean, WIDTHS, HIDDEN)
    row_rstd = tl.rsqrt(_row_dot(x, x) / HIDDEN + eps)
    tl.store(rstd + row, row_rstd, mask=in_rows)
    for k in tl.static_range(len(WIDTHS)):
        normed = (
            x[k]
            * row_rstd
            * load_vector(weight, ROWS, k * WIDTHS[0], WIDTHS[k], HIDDEN).to(tl.float32)
        )
        if bias is not None:
            normed += load_vector(bias, ROWS, k * WIDTHS[0], WIDTHS[k], HIDDEN).to(tl.float32)
        store_tile(out, normed, row, in_rows, k * WIDTHS[0], WIDTHS[k], HIDDEN)


@triton.jit(do_not_specialize=["rows"])
def residual_norm_backward_kernel(
    d_y, d_out, y, mean, rstd, weight, seed, d_residual, d_branch, partials,
    rows, d_y_stride, d_out_stride, y_stride, scale, dropout_p,
    HIDDEN: tl.constexpr, WIDTHS: tl.constexpr, ROWS: tl.constexpr, RMS: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_BRANCH_BIAS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """`partials` None: the vector gradients are left to the kernel below. STAGES 2 prefetches the next tile of rows."""
    K: tl.constexpr = 1 + HAS_BIAS + HAS_BRANCH_BIAS
    gain, weight_sum, bias_sum, branch_sum = (), (), (), ()
    for k in tl.static_range(len(WIDTHS)):
        # The gain is loaded outside the loop: inside, it would be prefetched again for every tile.
        gain += (load_vector(weight, ROWS, k * WIDTHS[0], WIDTHS[k], HIDDEN),)
        weight_sum += (zero_tile(ROWS, WIDTHS[k]),)
        bias_sum += (zero_tile(ROWS, WIDTHS[k]),)
        branch_sum += (zero_tile(ROWS, WIDTHS[k]),)

    for tile in tl.range(
        tl.program_id(0).to(tl.int64), tl.cdiv(rows, ROWS), tl.num_programs(0), num_stages=STAGES
    ):
        row = tile * ROWS + tl.arange(0, ROWS).to(tl.int64)[:, None]
        in_rows = row < rows
        row_rstd = tl.load(rstd + row, mask=in_rows, other=0.0)
        row_mean = 0.0 if RMS else tl.load(mean + row, mask=in_rows, other=0.0)
        d_normed, x_hat, g = (), (), ()
        for k in tl.static_range(len(WIDTHS)):
            d_normed += (
                load_tile(d_out, row, in_rows, d_out_stride, k * WIDTHS[0], WIDTHS[k], HIDDEN),
            )
            x_hat += (
                (load_tile(y, row, in_rows, y_stride, k * WIDTHS[0], WIDTHS[k], HIDDEN) - row_mean)
                * row_rstd,
            )
            g += (d_normed[k] * gain[k].to(tl.float32),)
        along = _row_dot(g, x_hat) / HIDDEN
        g_mean = 0.0 if RMS else row_sum(g) / HIDDEN
        if partials is not None:
            weight_sum = _multiply_add(weight_sum, d_normed, x_hat)
            if HAS_BIAS:
                bias_sum = _add(bias_sum, d_normed)
        d_branch_tiles = ()
        for k in tl.static_range(len(WIDTHS)):
            gradient = (g[k] - g_mean - x_hat[k] * along) * row_rstd
            if d_y is not None:
                gradient += load_tile(
                    d_y, row, in_rows, d_y_stride, k * WIDTHS[0], WIDTHS[k], HIDDEN
                )
            store_tile(d_residual, gradient, row, in_rows, k * WIDTHS[0], WIDTHS[k], HIDDEN)
            if d_branch is not None:
                gradient = store_branch_gradient(gradient, d_branch, seed, row, in_rows, scale, dropout_p,
                                                 k * WIDTHS[0], WIDTHS[k], HIDDEN)  # fmt: skip
            d_branch_tiles += (gradient,)
        if HAS_BRANCH_BIAS and partials is not None:
            branch_sum = _add(branch_sum, d_branch_tiles)

    if partials is not None:
        for k in tl.static_range(len(WIDTHS)):
            store_partial(partials, 0, K, weight_sum[k], k * WIDTHS[0], WIDTHS[k], HIDDEN)
            if HAS_BIAS:
                store_partial(partials, 1, K, bias_sum[k], k * WIDTHS[0], WIDTHS[k], HIDDEN)
            if HAS_BRANCH_BIAS:
                store_partial(partials, K - 1, K, branch_sum[k], k * WIDTHS[0], WIDTHS[k], HIDDEN)


@triton.jit(do_not_specialize=["rows"])
def residual_norm_vector_gradient_kernel(
    d_out, y, mean, rstd, d_branch, partials, rows, d_out_stride, y_stride,
    HIDDEN: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, RMS: tl.constexpr, HAS_BIAS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Partial sums for rows too wide for the backward kernel: program (p, c) sums its rows of one block of columns."""
    K: tl.constexpr = 1 + HAS_BIAS + (d_branch is not None)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    in_row = (column < HIDDEN)[None, :]
    d_weight = tl.zeros((ROWS, BLOCK), tl.float32)
    d_bias = tl.zeros((ROWS, BLOCK), tl.float32)
    d_branch_bias = tl.zeros((ROWS, BLOCK), tl.float32)
    for tile in tl.range(
        tl.program_id(0).to(tl.int64), tl.cdiv(rows, ROWS), tl.num_programs(0), num_stages=STAGES
    ):
        row = tile * ROWS + tl.arange(0, ROWS).to(tl.int64)[:, None]
        in_rows = row < rows
        mask = in_rows & in_row
        d_normed = tl.load(d_out + row * d_out_stride + column[None, :], mask=mask, other=0.0).to(
            tl.float32
        )
        x = tl.load(y + row * y_stride + column[None, :], mask=mask, other=0.0).to(tl.float32)
        if not RMS:
            x -= tl.load(mean + row, mask=in_rows, other=0.0)
        d_weight += d_normed * (x * tl.load(rstd + row, mask=in_rows, other=0.0))
        if HAS_BIAS:
            d_bias += d_normed
        if d_branch is not None:
            d_branch_bias += tl.load(
                d_branch + row * HIDDEN + column[None, :], mask=mask, other=0.0
            ).to(tl.float32)
    first = partials + tl.program_id(0).to(tl.int64) * K * HIDDEN + column
    tl.store(first, tl.sum(d_weight, axis=0), mask=column < HIDDEN)
    if HAS_BIAS:
        tl.store(first + HIDDEN, tl.sum(d_bias, axis=0), mask=column < HIDDEN)
    if d_branch is not None:
        tl.store(first + (K - 1) * HIDDEN, tl.sum(d_branch_bias, axis=0), mask=column < HIDDEN)


# --- launchers --------------------------------------------------------------------------------------------------------------------


def _launch_forward(
    residual: Tensor,
    branch: Tensor | None,
    branch_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    join: Join,
    norm: Norm,
    y: Tensor | None,
    out: Tensor,
    mean: Tensor,
    rstd: Tensor,
) -> None:
    hidden = residual.shape[-1]
    rows = residual.numel() // hidden
    if rows == 0:
        return
    shape = forward_shape("norm_forward", hidden, residual.dtype, residual.device)
    residual, residual_stride = rows_of(residual)
    branch, branch_stride = (None, 0) if branch is None else rows_of(branch)
    residual_norm_forward_kernel[(triton.cdiv(rows, shape.rows),)](
        residual,
        branch,
        branch_bias,
        weight,
        bias,
        join.dropout_seed,
        y,
        out,
        mean,
        rstd,
        rows,
        residual_stride,
        branch_stride,
        join.scale,
        norm.eps,
        join.dropout_p,
        HIDDEN=hidden,
        WIDTHS=shape.widths,
        ROWS=shape.rows,
        RMS=norm.rms,
        **shape.options,
    )


def _new_statistics(x: Tensor, norm: Norm) -> tuple[Tensor, Tensor]:
    """(mean, rstd) to be written: one value a row, no mean for RMSNorm."""
    rows = x.numel() // x.shape[-1]
    mean = x.new_empty(0 if norm.rms else rows, dtype=torch.float32)
    return mean, x.new_empty(rows, dtype=torch.float32)


def launch_norm_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm: Norm,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """(out, mean, rstd)."""
    if x.dtype == torch.float64:
        return cpu.norm_forward(x, weight, bias, norm, out_dtype)
    out = new_like(x, out_dtype)
    mean, rstd = _new_statistics(x, norm)
    _launch_forward(x, None, None, weight, bias, Join(), norm, None, out, mean, rstd)
    return out, mean, rstd


def launch_residual_norm_forward(
    residual: Tensor,
    branch: Tensor,
    branch_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    join: Join,
    norm: Norm,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(y, out, mean, rstd)."""
    given = (residual, branch, branch_bias, weight, bias, join, norm)
    if residual.dtype == torch.float64:
        return cpu.residual_norm_forward(*given)
    y = new_like(residual, residual.dtype)
    out = new_like(branch, branch.dtype)
    mean, rstd = _new_statistics(residual, norm)
    _launch_forward(*given, y, out, mean, rstd)
    return y, out, mean, rstd


def launch_residual_norm_backward(
    d_y: Tensor | None,
    d_out: Tensor,
    y: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    has_branch: bool,
    has_bias: bool,
    has_branch_bias: bool,
    join: Join,
    norm: Norm,
) -> tuple[Tensor, Tensor, Tensor]:
    """(d_residual, d_branch (empty without a branch), partials [P, K, H])."""
    if y.dtype == torch.float64:
        has = (has_branch, has_bias, has_branch_bias)
        return cpu.residual_norm_backward(d_y, d_out, y, mean, rstd, weight, *has, join, norm)
    hidden = y.shape[-1]
    rows = y.numel() // hidden
    holds_vectors = hidden <= WIDEST_IN_REGISTERS
    shape = backward_shape("norm_backward", hidden, y.dtype, y.device)
    d_residual = new_like(y, y.dtype)
    d_branch = new_like(d_out, d_out.dtype) if has_branch else None
    vectors = 1 + has_bias + has_branch_bias
    partials = y.new_empty((shape.programs, vectors, hidden), dtype=torch.float32)
    d_out, d_out_stride = rows_of(d_out)
    y, y_stride = rows_of(y)
    d_y, d_y_stride = (None, 0) if d_y is None else rows_of(d_y)
    programs = shape.programs if holds_vectors else max(1, triton.cdiv(rows, shape.rows))
    residual_norm_backward_kernel[(programs,)](
        d_y,
        d_out,
        y,
        mean,
        rstd,
        weight,
        join.dropout_seed,
        d_residual,
        d_branch,
        partials if holds_vectors else None,
        rows,
        d_y_stride,
        d_out_stride,
        y_stride,
        join.scale,
        join.dropout_p,
        HIDDEN=hidden,
        WIDTHS=shape.widths,
        ROWS=shape.rows,
        RMS=norm.rms,
        HAS_BIAS=has_bias,
        HAS_BRANCH_BIAS=has_branch_bias,
        STAGES=shape.stages,
        **shape.options,
    )
    if not holds_vectors:
        block = vector_gradient_shape(y.device)
        grid = (shape.programs, triton.cdiv(hidden, block.columns))
        residual_norm_vector_gradient_kernel[grid](
            d_out,
            y,
            mean,
            rstd,
            d_branch if has_branch_bias else None,
            partials,
            rows,
            d_out_stride,
            y_stride,
            HIDDEN=hidden,
            BLOCK=block.columns,
            ROWS=block.rows,
            RMS=norm.rms,
            HAS_BIAS=has_bias,
            STAGES=2,
            **block.options,
        )
    if d_branch is None:
        d_branch = partials.new_empty(0, dtype=d_out.dtype)
    return d_residual, d_branch, partials


# --- registration -----------------------------------------------------------------------------------------------------------------


def _fake_statistics(x: Tensor, weight: Tensor, norm: Norm) -> tuple[Tensor, Tensor]:
    wide = compute_dtype(x, weight)
    rows = x.numel() // x.shape[-1]
    return x.new_empty(0 if norm.rms else rows, dtype=wide), x.new_empty(rows, dtype=wide)


def _fake_norm_forward(x, weight, bias, norm, out_dtype):
    return x.new_empty(x.shape, dtype=out_dtype), *_fake_statistics(x, weight, norm)


def _fake_residual_norm_forward(residual, branch, branch_bias, weight, bias, join, norm):
    y = residual.new_empty(residual.shape)
    out = branch.new_empty(branch.shape)
    return y, out, *_fake_statistics(residual, weight, norm)


def _fake_residual_norm_backward(
    d_y,
    d_out,
    y,
    mean,
    rstd,
    weight,
    has_branch,
    has_bias,
    has_branch_bias,
    join,
    norm,
):
    hidden = y.shape[-1]
    programs = partial_rows("norm_backward", y.device, y.dtype, hidden)
    partials = (programs, 1 + has_bias + has_branch_bias, hidden)
    d_branch = d_out.new_empty(d_out.shape if has_branch else 0)
    return y.new_empty(y.shape), d_branch, y.new_empty(partials, dtype=rstd.dtype)


_norm_forward = register(
    "norm_forward(Tensor x, Tensor weight, Tensor? bias, Norm norm, ScalarType out_dtype) -> (Tensor, Tensor, Tensor)",
    cpu=cpu.norm_forward,
    cuda=launch_norm_forward,
    fake=_fake_norm_forward,
)
_residual_norm_forward = register(
    "residual_norm_forward(Tensor residual, Tensor branch, Tensor? branch_bias, Tensor weight, "
    "Tensor? bias, Join join, Norm norm) -> (Tensor, Tensor, Tensor, Tensor)",
    cpu=cpu.residual_norm_forward,
    cuda=launch_residual_norm_forward,
    fake=_fake_residual_norm_forward,
)
_residual_norm_backward = register(
    "residual_norm_backward(Tensor? d_y, Tensor d_out, Tensor y, Tensor mean, Tensor rstd, "
    "Tensor weight, bool has_branch, bool has_bias, bool has_branch_bias, Join join, Norm norm) "
    "-> (Tensor, Tensor, Tensor)",
    cpu=cpu.residual_norm_backward,
    cuda=launch_residual_norm_backward,
    fake=_fake_residual_norm_backward,
)


# --- autograd ---------------------------------------------------------------------------------------------------------------------


class _ResidualNorm(torch.autograd.Function):
    """The vectors' gradients go through autograd as the others do, or to the sink."""

    @staticmethod
    def forward(
        ctx: Any,
        residual,
        branch,
        branch_bias,
        weight,
        bias,
        join: Join,
        norm: Norm,
        out_dtype,
        sink: Sink | None,
    ):
        if branch is None:
            y = residual
            out, mean, rstd = _norm_forward(residual, weight, bias, norm, out_dtype)
        else:
            given = (residual, branch, branch_bias, weight, bias, join, norm)
            y, out, mean, rstd = _residual_norm_forward(*given)
        ctx.save_for_backward(y, mean, rstd, weight)
        ctx.set_materialize_grads(False)
        ctx.join = join
        ctx.norm = norm
        ctx.has_branch = branch is not None
        ctx.out_dtype = out.dtype
        ctx.sink = sink
        ctx.receivers = receivers((weight, bias, branch_bias), sink)
        return (y, out) if ctx.has_branch else out

    @staticmethod
    @first_derivative
    def backward(ctx: Any, *gradients):
        d_y, d_out = gradients if ctx.has_branch else (None, *gradients)
        y, mean, rstd, weight = ctx.saved_tensors
        if d_out is None:
            d_out = torch.zeros(y.shape, dtype=ctx.out_dtype, device=y.device)
        _, bias, branch_bias = ctx.receivers
        d_residual, d_branch, partials = _residual_norm_backward(
            d_y,
            d_out,
            y,
            mean,
            rstd,
            weight,
            ctx.has_branch,
            bias is not None,
            branch_bias is not None,
            ctx.join,
            ctx.norm,
        )
        if not ctx.has_branch:
            d_branch = None
        d_weight, d_bias, d_branch_bias = vector_gradients(partials, ctx.receivers, ctx.sink)
        return d_residual, d_branch, d_branch_bias, d_weight, d_bias, None, None, None, None


def scaled_residual_norm(
    residual: Tensor,
    branch: Tensor,
    branch_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    join: Join,
    norm: Norm,
    sink: Sink | None = None,
) -> tuple[Tensor, Tensor]:
    """(y, out), where y = residual + scale * dropout(branch + branch_bias), out = norm(y) * weight + bias.

    `residual`, `branch` [..., H]; `branch_bias`, `weight`, `bias` [H]. `y` has the residual's dtype
    and is rounded before its statistics are taken; `out` has the branch's dtype. Statistics are
    float32, or float64 for float64 inputs. With a `sink` the gradients of the three vectors, which
    are then parameters, go there and not through autograd.
    Raises ValueError where dropout has no seed, and for a kind of norm that is not defined.
    """
    given = (residual, branch, branch_bias, weight, bias, join, norm)
    return _ResidualNorm.apply(*given, None, sink)


def norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm: Norm,
    out_dtype: torch.dtype | None = None,
    sink: Sink | None = None,
) -> Tensor:
    """The norm of `x` [..., H] over its last dimension, times `weight` plus `bias`, both [H].

    The result is in `out_dtype` (default: that of `x`). `sink` and errors: see `scaled_residual_norm`.
    """
    given = (x, None, None, weight, bias, Join(), norm)
    return _ResidualNorm.apply(*given, out_dtype or x.dtype, sink)

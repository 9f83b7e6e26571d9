"""Scaled residual add and LayerNorm or RMSNorm in one pass over the rows; also the norm alone.

    forward    y = residual + scale * dropout(branch + branch_bias)
               x_hat = (y - mean) * rstd                                mean = 0 for RMSNorm
               out = x_hat * weight + bias

    backward   g = d_out * weight
               d_residual = d_y + rstd * (g - mean(g) - x_hat * mean(g * x_hat))
               d_branch = scale * dropout factor * d_residual
               d_weight, d_bias, d_branch_bias = sums over rows of d_out * x_hat, d_out, d_branch

y is rounded to its dtype before its statistics are taken. RMSNorm has no mean(g) in d_residual.

The forward holds a tile of rows in each program (tiling.py). The backward runs P programs. Each
strides over the rows, adds up its share of the three vector gradients in registers, and writes them
to its own row of `partials` [P, K, H]: there are no atomics and no locks, hence the same bits every
time. Rows wider than the registers hold leave the vector gradients to a second kernel.
"""

# mypy: disable-error-code=assignment
# (A kernel's tuples of segments grow as they are unrolled.)

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..cpu import residual_norm as cpu
from ..cpu.compiled import CompiledDefinitions, server_of
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
    add_tile_products,
    add_tiles,
    ceil_div,
    load_tile,
    load_vector,
    new_like,
    row_dot,
    row_sum,
    rows_of,
    store_branch_gradient,
    store_partial,
    store_tile,
    zero_tiles,
)
from .partial_sums import Sink, receivers, vector_gradients

_NO_BRANCH = Join()  # stands for the join where nothing is added: the norm alone


@triton.jit
def _centred(x: tl.tuple, mean: tl.tensor, WIDTHS: tl.constexpr, HIDDEN: tl.constexpr) -> tl.tuple:
    """x - mean, and 0 in the lanes past the end of a row, which must not count in the variance."""
    tiles = ()
    for k in tl.static_range(len(WIDTHS)):
        tiles += (_centred_segment(x[k], mean, k, WIDTHS, HIDDEN),)
    return tiles


@triton.jit
def _centred_segment(
    x: tl.tensor, mean: tl.tensor,
    SEGMENT: tl.constexpr, WIDTHS: tl.constexpr, HIDDEN: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    column = SEGMENT * WIDTHS[0] + tl.arange(0, WIDTHS[SEGMENT])[None, :]
    return tl.where(column < HIDDEN, x - mean, 0.0)


@triton.jit(do_not_specialize=["rows"])
def residual_norm_forward_kernel(
    residual: tl.tensor, branch: tl.tensor, branch_bias: tl.tensor,
    weight: tl.tensor, bias: tl.tensor, seed: tl.tensor,
    y: tl.tensor, out: tl.tensor, mean: tl.tensor, rstd: tl.tensor,
    rows: tl.tensor, residual_stride: tl.tensor, branch_stride: tl.tensor,
    scale: tl.tensor, eps: tl.tensor, dropout_p: tl.tensor,
    HIDDEN: tl.constexpr, WIDTHS: tl.constexpr, ROWS: tl.constexpr, RMS: tl.constexpr,
) -> None:  # fmt: skip
    """Each program computes one tile of rows.

    Without `branch` it is the norm alone; `branch_bias`, `bias` and `seed` may be None too.
    """
    # The tile stays in registers from the sum to the norm: y is stored and not read again.
    first_row = tl.program_id(0).to(tl.int64) * ROWS
    row = first_row + tl.arange(0, ROWS).to(tl.int64)[:, None]
    in_rows = row < rows
    x = ()
    for k in tl.static_range(len(WIDTHS)):
        total = load_tile(residual, row, in_rows, residual_stride, k, WIDTHS, HIDDEN)
        if branch is not None:
            total = add_branch(
                total, branch, branch_bias, seed, y, row, in_rows, branch_stride, scale, dropout_p,
                k, WIDTHS, HIDDEN,
            )  # fmt: skip
        x += (total,)

    # The variance is taken of centred rows: the mean of squares less the squared mean would cancel.
    if not RMS:
        row_mean = row_sum(x) / HIDDEN
        tl.store(mean + row, row_mean, mask=in_rows)
        x = _centred(x, row_mean, WIDTHS, HIDDEN)
    row_rstd = tl.rsqrt(row_dot(x, x) / HIDDEN + eps)
    tl.store(rstd + row, row_rstd, mask=in_rows)

    for k in tl.static_range(len(WIDTHS)):
        normed = x[k] * row_rstd
        normed *= load_vector(weight, ROWS, k, WIDTHS, HIDDEN).to(tl.float32)
        if bias is not None:
            normed += load_vector(bias, ROWS, k, WIDTHS, HIDDEN).to(tl.float32)
        store_tile(out, normed, row, in_rows, k, WIDTHS, HIDDEN)


@triton.jit(do_not_specialize=["rows"])
def residual_norm_backward_kernel(
    d_y: tl.tensor, d_out: tl.tensor, y: tl.tensor, mean: tl.tensor, rstd: tl.tensor,
    weight: tl.tensor, seed: tl.tensor,
    d_residual: tl.tensor, d_branch: tl.tensor, partials: tl.tensor,
    rows: tl.tensor, d_y_stride: tl.tensor, d_out_stride: tl.tensor, y_stride: tl.tensor,
    scale: tl.tensor, dropout_p: tl.tensor,
    HIDDEN: tl.constexpr, WIDTHS: tl.constexpr, ROWS: tl.constexpr, RMS: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_BRANCH_BIAS: tl.constexpr, STAGES: tl.constexpr,
) -> None:  # fmt: skip
    """Program p takes tiles p, p + P, p + 2P, ...; STAGES 2 prefetches the next one.

    `d_y`, `d_branch` and `seed` may be None. Without `partials` the vector gradients are left to
    the kernel below.
    """
    # The gain is loaded outside the loop: inside, it would be prefetched again for every tile.
    gain = ()
    for k in tl.static_range(len(WIDTHS)):
        gain += (load_vector(weight, ROWS, k, WIDTHS, HIDDEN),)
    weight_sum = zero_tiles(ROWS, WIDTHS)
    bias_sum = zero_tiles(ROWS, WIDTHS)
    branch_sum = zero_tiles(ROWS, WIDTHS)

    first_tile = tl.program_id(0).to(tl.int64)
    tiles = tl.cdiv(rows, ROWS)
    for tile in tl.range(first_tile, tiles, tl.num_programs(0), num_stages=STAGES):
        row = tile * ROWS + tl.arange(0, ROWS).to(tl.int64)[:, None]
        in_rows = row < rows
        row_rstd = tl.load(rstd + row, mask=in_rows, other=0.0)
        row_mean = 0.0 if RMS else tl.load(mean + row, mask=in_rows, other=0.0)
        d_normed = ()
        x_hat = ()
        g = ()
        for k in tl.static_range(len(WIDTHS)):
            d_normed += (load_tile(d_out, row, in_rows, d_out_stride, k, WIDTHS, HIDDEN),)
            stored = load_tile(y, row, in_rows, y_stride, k, WIDTHS, HIDDEN)
            x_hat += ((stored - row_mean) * row_rstd,)
            g += (d_normed[k] * gain[k].to(tl.float32),)

        # The stream's gradient is g less its mean and less its component along x_hat. Lanes past
        # the end of a row have a d_out and a gain of 0, so they count in neither mean.
        along = row_dot(g, x_hat) / HIDDEN
        g_mean = 0.0 if RMS else row_sum(g) / HIDDEN
        if partials is not None:
            weight_sum = add_tile_products(weight_sum, d_normed, x_hat)
            if HAS_BIAS:
                bias_sum = add_tiles(bias_sum, d_normed)

        # The branch bias sums float32 gradients, before they are rounded to be stored.
        d_branch_tiles = ()
        for k in tl.static_range(len(WIDTHS)):
            gradient = (g[k] - g_mean - x_hat[k] * along) * row_rstd
            if d_y is not None:
                gradient += load_tile(d_y, row, in_rows, d_y_stride, k, WIDTHS, HIDDEN)
            store_tile(d_residual, gradient, row, in_rows, k, WIDTHS, HIDDEN)
            if d_branch is not None:
                gradient = store_branch_gradient(
                    gradient, d_branch, seed, row, in_rows, scale, dropout_p, k, WIDTHS, HIDDEN
                )
            d_branch_tiles += (gradient,)
        if HAS_BRANCH_BIAS and partials is not None:
            branch_sum = add_tiles(branch_sum, d_branch_tiles)

    if partials is not None:
        K: tl.constexpr = 1 + HAS_BIAS + HAS_BRANCH_BIAS
        for k in tl.static_range(len(WIDTHS)):
            store_partial(partials, 0, K, weight_sum[k], k, WIDTHS, HIDDEN)
            if HAS_BIAS:
                store_partial(partials, 1, K, bias_sum[k], k, WIDTHS, HIDDEN)
            if HAS_BRANCH_BIAS:
                store_partial(partials, K - 1, K, branch_sum[k], k, WIDTHS, HIDDEN)


@triton.jit(do_not_specialize=["rows"])
def residual_norm_vector_gradient_kernel(
    d_out: tl.tensor, y: tl.tensor, mean: tl.tensor, rstd: tl.tensor, d_branch: tl.tensor,
    partials: tl.tensor, rows: tl.tensor, d_out_stride: tl.tensor, y_stride: tl.tensor,
    HIDDEN: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, RMS: tl.constexpr,
    HAS_BIAS: tl.constexpr, STAGES: tl.constexpr,
) -> None:  # fmt: skip
    """Partial sums for rows too wide for the backward kernel.

    Program (p, c) sums its rows of one block of columns. Without a branch bias `d_branch` is None.
    """
    first_column = tl.program_id(1) * BLOCK
    column = first_column + tl.arange(0, BLOCK)
    in_row = (column < HIDDEN)[None, :]
    d_weight = tl.zeros((ROWS, BLOCK), tl.float32)
    d_bias = tl.zeros((ROWS, BLOCK), tl.float32)
    d_branch_bias = tl.zeros((ROWS, BLOCK), tl.float32)

    # x_hat is computed again from the stored y and the statistics of its row.
    first_tile = tl.program_id(0).to(tl.int64)
    tiles = tl.cdiv(rows, ROWS)
    for tile in tl.range(first_tile, tiles, tl.num_programs(0), num_stages=STAGES):
        row = tile * ROWS + tl.arange(0, ROWS).to(tl.int64)[:, None]
        in_rows = row < rows
        mask = in_rows & in_row
        d_out_address = d_out + row * d_out_stride + column[None, :]
        d_normed = tl.load(d_out_address, mask=mask, other=0.0).to(tl.float32)
        y_address = y + row * y_stride + column[None, :]
        x = tl.load(y_address, mask=mask, other=0.0).to(tl.float32)
        if not RMS:
            x -= tl.load(mean + row, mask=in_rows, other=0.0)
        x *= tl.load(rstd + row, mask=in_rows, other=0.0)
        d_weight += d_normed * x
        if HAS_BIAS:
            d_bias += d_normed
        if d_branch is not None:
            d_branch_address = d_branch + row * HIDDEN + column[None, :]
            d_branch_bias += tl.load(d_branch_address, mask=mask, other=0.0).to(tl.float32)

    # One row of partials a program; the order of its vectors is that of the backward kernel.
    K: tl.constexpr = 1 + HAS_BIAS + (d_branch is not None)
    program = tl.program_id(0).to(tl.int64)
    address = partials + program * K * HIDDEN + column
    mask = column < HIDDEN
    tl.store(address, tl.sum(d_weight, axis=0), mask=mask)
    if HAS_BIAS:
        tl.store(address + HIDDEN, tl.sum(d_bias, axis=0), mask=mask)
    if d_branch is not None:
        tl.store(address + (K - 1) * HIDDEN, tl.sum(d_branch_bias, axis=0), mask=mask)


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
    grid = (ceil_div(rows, shape.rows),)
    residual_norm_forward_kernel[grid](
        residual, branch, branch_bias, weight, bias, join.dropout_seed,
        y, out, mean, rstd,
        rows, residual_stride, branch_stride,
        join.scale, norm.eps, join.dropout_p,
        HIDDEN=hidden, WIDTHS=shape.widths, ROWS=shape.rows, RMS=norm.rms, **shape.options,
    )  # fmt: skip


def _new_statistics(x: Tensor, norm: Norm, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(mean, rstd) [rows], to be written; RMSNorm has no mean."""
    rows = x.numel() // x.shape[-1]
    mean = x.new_empty(0 if norm.rms else rows, dtype=dtype)
    return mean, x.new_empty(rows, dtype=dtype)


def launch_norm_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, norm: Norm, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """(out, mean, rstd)."""
    if x.dtype == torch.float64:
        return cpu.norm_forward(x, weight, bias, norm, out_dtype)
    out = new_like(x, out_dtype)
    mean, rstd = _new_statistics(x, norm, torch.float32)
    _launch_forward(x, None, None, weight, bias, _NO_BRANCH, norm, None, out, mean, rstd)
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
    arguments = (residual, branch, branch_bias, weight, bias, join, norm)
    if residual.dtype == torch.float64:
        return cpu.residual_norm_forward(*arguments)
    y = new_like(residual, residual.dtype)
    out = new_like(branch, branch.dtype)
    mean, rstd = _new_statistics(residual, norm, torch.float32)
    _launch_forward(*arguments, y, out, mean, rstd)
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
    shape = backward_shape("norm_backward", hidden, y.dtype, y.device)
    d_residual = new_like(y, y.dtype)
    d_branch = new_like(d_out, d_out.dtype) if has_branch else None
    vectors = 1 + has_bias + has_branch_bias
    partials = y.new_empty((shape.programs, vectors, hidden), dtype=torch.float32)
    # Rows may be strided, so that a slice of a wider tensor is not copied.
    d_out, d_out_stride = rows_of(d_out)
    y, y_stride = rows_of(y)
    d_y, d_y_stride = (None, 0) if d_y is None else rows_of(d_y)

    # Programs that hold no vector gradients have one tile each: nothing is kept from tile to tile.
    holds_vectors = hidden <= WIDEST_IN_REGISTERS
    programs = shape.programs
    if not holds_vectors:
        programs = max(1, ceil_div(rows, shape.rows))
    grid = (programs,)
    residual_norm_backward_kernel[grid](
        d_y, d_out, y, mean, rstd, weight, join.dropout_seed,
        d_residual, d_branch, partials if holds_vectors else None,
        rows, d_y_stride, d_out_stride, y_stride,
        join.scale, join.dropout_p,
        HIDDEN=hidden, WIDTHS=shape.widths, ROWS=shape.rows, RMS=norm.rms,
        HAS_BIAS=has_bias, HAS_BRANCH_BIAS=has_branch_bias, STAGES=shape.stages, **shape.options,
    )  # fmt: skip
    if not holds_vectors:
        bias_rows = d_branch if has_branch_bias else None
        _launch_vector_gradients(d_out, y, mean, rstd, bias_rows, partials, has_bias, norm)
    # An operator of torch returns a tensor in every place.
    if d_branch is None:
        d_branch = partials.new_empty(0, dtype=d_out.dtype)
    return d_residual, d_branch, partials


def _launch_vector_gradients(
    d_out: Tensor,
    y: Tensor,
    mean: Tensor,
    rstd: Tensor,
    d_branch: Tensor | None,
    partials: Tensor,
    has_bias: bool,
    norm: Norm,
) -> None:
    """The second launch of a backward over rows wider than the registers: it fills `partials`."""
    programs, _, hidden = partials.shape
    rows = y.numel() // hidden
    d_out, d_out_stride = rows_of(d_out)
    y, y_stride = rows_of(y)
    block = vector_gradient_shape(y.device)
    grid = (programs, ceil_div(hidden, block.columns))
    residual_norm_vector_gradient_kernel[grid](
        d_out, y, mean, rstd, d_branch, partials,
        rows, d_out_stride, y_stride,
        HIDDEN=hidden, BLOCK=block.columns, ROWS=block.rows, RMS=norm.rms,
        HAS_BIAS=has_bias, STAGES=2, **block.options,
    )  # fmt: skip


def _fake_norm_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, norm: Norm, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    out = x.new_empty(x.shape, dtype=out_dtype)
    return out, *_new_statistics(x, norm, compute_dtype(x, weight))


def _fake_residual_norm_forward(
    residual: Tensor, branch: Tensor, branch_bias: Tensor | None,
    weight: Tensor, bias: Tensor | None, join: Join, norm: Norm,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    y = residual.new_empty(residual.shape)
    out = branch.new_empty(branch.shape)
    return y, out, *_new_statistics(residual, norm, compute_dtype(residual, weight))


def _fake_residual_norm_backward(
    d_y: Tensor | None, d_out: Tensor, y: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor,
    has_branch: bool, has_bias: bool, has_branch_bias: bool, join: Join, norm: Norm,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    hidden = y.shape[-1]
    programs = partial_rows("norm_backward", y.device, y.dtype, hidden)
    partials = (programs, 1 + has_bias + has_branch_bias, hidden)
    d_branch = d_out.new_empty(d_out.shape if has_branch else 0)
    return y.new_empty(y.shape), d_branch, y.new_empty(partials, dtype=rstd.dtype)


_norm_forward = register(
    "norm_forward(Tensor x, Tensor weight, Tensor? bias, Norm norm, ScalarType out_dtype) "
    "-> (Tensor, Tensor, Tensor)",
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


class _ResidualNorm(torch.autograd.Function):
    """The vectors' gradients go through autograd as the others do, or to the sink."""

    @staticmethod
    def forward(
        ctx: Any,
        residual: Tensor,
        branch: Tensor | None,
        branch_bias: Tensor | None,
        weight: Tensor,
        bias: Tensor | None,
        join: Join,
        norm: Norm,
        out_dtype: torch.dtype,
        sink: Sink | None,
        compiled: CompiledDefinitions | None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        if branch is None:
            y = residual
            norm_forward = compiled.norm_forward if compiled else _norm_forward
            out, mean, rstd = norm_forward(residual, weight, bias, norm, out_dtype)
        else:
            forward = compiled.residual_norm_forward if compiled else _residual_norm_forward
            y, out, mean, rstd = forward(residual, branch, branch_bias, weight, bias, join, norm)
        # x_hat is not saved: the backward computes it again from y.
        ctx.save_for_backward(y, mean, rstd, weight)
        # An output that nobody used has the gradient None, not a tensor of zeros.
        ctx.set_materialize_grads(False)
        ctx.compiled = compiled
        ctx.join = join
        ctx.norm = norm
        ctx.has_branch = branch is not None
        ctx.out_dtype = out.dtype
        ctx.sink = sink
        ctx.receivers = receivers((weight, bias, branch_bias), sink)
        return (y, out) if ctx.has_branch else out

    @staticmethod
    @first_derivative
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        d_y, d_out = gradients if ctx.has_branch else (None, *gradients)
        y, mean, rstd, weight = ctx.saved_tensors
        if d_out is None:
            d_out = torch.zeros(y.shape, dtype=ctx.out_dtype, device=y.device)
        _, bias, branch_bias = ctx.receivers
        has = (ctx.has_branch, bias is not None, branch_bias is not None)
        compiled = ctx.compiled
        backward = compiled.residual_norm_backward if compiled else _residual_norm_backward
        d_residual, d_branch, partials = backward(
            d_y, d_out, y, mean, rstd, weight, *has, ctx.join, ctx.norm
        )
        d_weight, d_bias, d_branch_bias = vector_gradients(partials, ctx.receivers, ctx.sink)
        if not ctx.has_branch:
            d_branch = None
        return d_residual, d_branch, d_branch_bias, d_weight, d_bias, *[None] * 5


_residual_norm: Callable[..., Any] = _ResidualNorm.apply


def scaled_residual_norm(
    residual: Tensor,
    branch: Tensor,
    branch_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    join: Join,
    norm: Norm,
    sink: Sink | None = None,
    compiled: CompiledDefinitions | None = None,
) -> tuple[Tensor, Tensor]:
    """(y, out): the new residual stream and its norm.

        y = residual + scale * dropout(branch + branch_bias)
        out = norm(y) * weight + bias

    `residual`, `branch` [..., H]; `branch_bias`, `weight`, `bias` [H]. `y` has the residual's dtype
    and is rounded before its statistics are taken; `out` has the branch's dtype. Statistics are
    float32, or float64 for float64 inputs. With a `sink` the gradients of the three vectors, which
    are then parameters, go there and not through autograd. `compiled` runs in place of the
    operators on the tensors that it serves.

    Raises ValueError where dropout has no seed, and for a kind of norm that is not defined.
    """
    how = (join, norm, None, sink, server_of(residual, compiled))
    y, out = _residual_norm(residual, branch, branch_bias, weight, bias, *how)
    return y, out


def norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm: Norm,
    out_dtype: torch.dtype | None = None,
    sink: Sink | None = None,
    compiled: CompiledDefinitions | None = None,
) -> Tensor:
    """The norm of `x` [..., H] over its last dimension, times `weight` plus `bias`, both [H].

    The result is in `out_dtype` (default: that of `x`). For `sink`, `compiled` and errors
    see `scaled_residual_norm`.
    """
    how = (_NO_BRANCH, norm, out_dtype or x.dtype, sink, server_of(x, compiled))
    out: Tensor = _residual_norm(x, None, None, weight, bias, *how)
    return out

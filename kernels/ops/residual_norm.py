"""Fused scaled residual add + LayerNorm/RMSNorm, in one pass over the rows.

The norm can also be used without the add.

    forward    y = residual + scale * dropout(branch + branch_bias)
               x_hat = (y - mean) * rstd                                mean = 0 for RMSNorm
               out = x_hat * weight + bias

    backward   g = d_out * weight
               d_residual = d_y + rstd * (g - mean(g) - x_hat * mean(g * x_hat))
                                                                without mean(g) for RMSNorm
               d_branch = scale * dropout factor * d_residual
               d_weight, d_bias, d_branch_bias = sums over rows of d_out * x_hat, d_out, d_branch

y is rounded to its dtype before its statistics are computed.

In the forward kernel each program keeps one tile of rows in registers (tiling.py). The backward
kernel runs P programs. Each one strides over the rows, sums its contribution to the vector
gradients (d_weight, d_bias, d_branch_bias) in registers, and writes it to its own row of `partials`
[P programs, VECTORS, H hidden]. No atomics or locks are needed, so the result is deterministic.
If a row is too wide for registers, a second kernel computes the vector gradients
(norm_vector_gradients.py). In all kernels k is the index of a segment of a row.
"""

# Tuples of segments are extended in unrolled loops, which mypy sees as changing type.
# mypy: disable-error-code=assignment

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
)
from ..library import first_derivative, register
from ..optional_triton import tl, triton
from ..reference import Join, Norm, compute_dtype
from ..tiling import (
    add_branch,
    add_tile_products,
    add_tiles,
    branch_gradient,
    ceil_div,
    dropout_rows,
    load_tile,
    load_vector,
    new_like,
    row_dot,
    row_sum,
    rows_of,
    store_partial,
    store_tile,
    zero_tiles,
)
from .norm_vector_gradients import launch_vector_gradients
from .partial_sums import Sink, receivers, vector_gradients

_NO_BRANCH = Join()  # the `join` argument of the norm without the add


@triton.jit
def _centred(x: tl.tuple, mean: tl.tensor, WIDTHS: tl.constexpr, HIDDEN: tl.constexpr) -> tl.tuple:
    """x - mean; 0 in lanes past the end of the row, which must not contribute to the variance."""
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

    Without `branch` only the norm is computed; `branch_bias`, `bias` and `seed` may be None too.
    """
    # The tile stays in registers from the sum to the norm: y is stored and not read again.
    first_row = tl.program_id(0).to(tl.int64) * ROWS
    row = first_row + tl.arange(0, ROWS).to(tl.int64)[:, None]
    in_rows = row < rows
    number = dropout_rows(seed, row)
    y_tiles = ()
    for k in tl.static_range(len(WIDTHS)):
        total = load_tile(residual, row, in_rows, residual_stride, k, WIDTHS, HIDDEN)
        if branch is not None:
            total = add_branch(
                total, branch, branch_bias, seed, y, row, number, in_rows, branch_stride,
                scale, dropout_p, k, WIDTHS, HIDDEN,
            )  # fmt: skip
        y_tiles += (total,)

    # Compute the variance from centred rows; E[x^2] - E[x]^2 would suffer from cancellation.
    if RMS:
        centred = y_tiles
    else:
        row_mean = row_sum(y_tiles) / HIDDEN
        tl.store(mean + row, row_mean, mask=in_rows)
        centred = _centred(y_tiles, row_mean, WIDTHS, HIDDEN)
    row_rstd = tl.rsqrt(row_dot(centred, centred) / HIDDEN + eps)
    tl.store(rstd + row, row_rstd, mask=in_rows)

    for k in tl.static_range(len(WIDTHS)):
        x_hat = centred[k] * row_rstd
        out_tile = x_hat * load_vector(weight, ROWS, k, WIDTHS, HIDDEN).to(tl.float32)
        if bias is not None:
            out_tile += load_vector(bias, ROWS, k, WIDTHS, HIDDEN).to(tl.float32)
        store_tile(out, out_tile, row, in_rows, k, WIDTHS, HIDDEN)


@triton.jit
def _store_vector_sums(
    partials: tl.tensor, d_weight: tl.tuple, d_bias: tl.tuple, d_branch_bias: tl.tuple,
    WIDTHS: tl.constexpr, HIDDEN: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_BRANCH_BIAS: tl.constexpr,
) -> None:  # fmt: skip
    """Write the program's sums to its row of `partials`: d_weight, then those that exist."""
    VECTORS: tl.constexpr = 1 + HAS_BIAS + HAS_BRANCH_BIAS
    for k in tl.static_range(len(WIDTHS)):
        store_partial(partials, 0, VECTORS, d_weight[k], k, WIDTHS, HIDDEN)
        if HAS_BIAS:
            store_partial(partials, 1, VECTORS, d_bias[k], k, WIDTHS, HIDDEN)
        if HAS_BRANCH_BIAS:
            store_partial(partials, VECTORS - 1, VECTORS, d_branch_bias[k], k, WIDTHS, HIDDEN)


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
    """Program p processes tiles p, p + P, ...; with STAGES = 2 the next tile is prefetched.

    `d_y`, `d_branch` and `seed` may be None. If `partials` is None, norm_vector_gradients.py
    computes the vector gradients.
    """
    # The gain is loaded outside the loop: inside, it would be prefetched again for every tile.
    gain = ()
    for k in tl.static_range(len(WIDTHS)):
        gain += (load_vector(weight, ROWS, k, WIDTHS, HIDDEN),)
    d_weight = zero_tiles(ROWS, WIDTHS)
    d_bias = zero_tiles(ROWS, WIDTHS)
    d_branch_bias = zero_tiles(ROWS, WIDTHS)

    first_tile = tl.program_id(0).to(tl.int64)
    tiles = tl.cdiv(rows, ROWS)
    for tile in tl.range(first_tile, tiles, tl.num_programs(0), num_stages=STAGES):
        row = tile * ROWS + tl.arange(0, ROWS).to(tl.int64)[:, None]
        in_rows = row < rows
        number = dropout_rows(seed, row)
        row_rstd = tl.load(rstd + row, mask=in_rows, other=0.0)
        row_mean = 0.0 if RMS else tl.load(mean + row, mask=in_rows, other=0.0)
        d_out_tiles = ()
        x_hat = ()
        g = ()
        for k in tl.static_range(len(WIDTHS)):
            d_out_tiles += (load_tile(d_out, row, in_rows, d_out_stride, k, WIDTHS, HIDDEN),)
            y_tile = load_tile(y, row, in_rows, y_stride, k, WIDTHS, HIDDEN)
            x_hat += ((y_tile - row_mean) * row_rstd,)
            g += (d_out_tiles[k] * gain[k].to(tl.float32),)

        # Part of d_residual that comes from the norm: rstd * (g - mean(g) - x_hat * mean(g *
        # x_hat)). Lanes past the end of a row have d_out = 0 and a gain of 0, so they contribute to
        # neither mean.
        along = row_dot(g, x_hat) / HIDDEN
        g_mean = 0.0 if RMS else row_sum(g) / HIDDEN
        if partials is not None:
            d_weight = add_tile_products(d_weight, d_out_tiles, x_hat)
            if HAS_BIAS:
                d_bias = add_tiles(d_bias, d_out_tiles)

        # d_branch_bias is summed from the float32 gradients, before they are rounded for storage.
        d_branch_tiles = ()
        for k in tl.static_range(len(WIDTHS)):
            d_residual_tile = (g[k] - g_mean - x_hat[k] * along) * row_rstd
            if d_y is not None:
                d_residual_tile += load_tile(d_y, row, in_rows, d_y_stride, k, WIDTHS, HIDDEN)
            store_tile(d_residual, d_residual_tile, row, in_rows, k, WIDTHS, HIDDEN)
            if d_branch is not None:
                d_branch_tile = branch_gradient(
                    d_residual_tile, seed, number, scale, dropout_p, k, WIDTHS, HIDDEN
                )
                store_tile(d_branch, d_branch_tile, row, in_rows, k, WIDTHS, HIDDEN)
                d_branch_tiles += (d_branch_tile,)
        if HAS_BRANCH_BIAS and partials is not None:
            d_branch_bias = add_tiles(d_branch_bias, d_branch_tiles)

    if partials is not None:
        _store_vector_sums(
            partials, d_weight, d_bias, d_branch_bias, WIDTHS, HIDDEN, HAS_BIAS, HAS_BRANCH_BIAS
        )


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
    """Allocate mean and rstd, both [rows]; for RMSNorm mean is empty."""
    rows = x.numel() // x.shape[-1]
    mean = x.new_empty(0 if norm.rms else rows, dtype=dtype)
    return mean, x.new_empty(rows, dtype=dtype)


def launch_norm_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, norm: Norm, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch the norm kernel; returns (out, mean, rstd)."""
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
    """Launch the fused forward kernel; returns (y, out, mean, rstd)."""
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
    """Launch the backward kernel or kernels; returns (d_residual, d_branch, partials).

    partials: [P, vectors, H]. d_branch is empty without a branch.
    """
    if y.dtype == torch.float64:
        return cpu.residual_norm_backward(
            d_y, d_out, y, mean, rstd, weight,
            has_branch, has_bias, has_branch_bias, join, norm,
        )  # fmt: skip
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

    # Without vector gradients in registers nothing carries over between tiles, so each program gets
    # one tile.
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
        d_branch_for_bias = d_branch if has_branch_bias else None
        launch_vector_gradients(d_out, y, mean, rstd, d_branch_for_bias, partials, has_bias, norm)
    # A registered torch operator cannot return None, so return an empty tensor.
    if d_branch is None:
        d_branch = partials.new_empty(0, dtype=d_out.dtype)
    return d_residual, d_branch, partials


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
    """Autograd function of the fused op.

    Gradients of weight, bias and branch_bias go to the sink if there is one, else through autograd.
    """

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
        # x_hat is not saved: the backward recomputes it from y.
        ctx.save_for_backward(y, mean, rstd, weight)
        # The gradient of an unused output is None, not a tensor of zeros.
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
    """Add a branch to the residual stream and norm the sum; returns (y, out).

        y = residual + scale * dropout(branch + branch_bias)
        out = norm(y) * weight + bias

    `residual`, `branch` [..., H]; `branch_bias`, `weight`, `bias` [H]. `y` has the residual's dtype
    and is rounded before its statistics are computed; `out` has the branch's dtype. Statistics are
    float32, or float64 for float64 inputs. With a `sink` the three vectors must be parameters, and
    their gradients go there and not through autograd. `compiled`, if given, replaces the registered
    operators for tensors on a CPU that are not float64.

    Raises ValueError if dropout_p > 0 without a seed, or if norm.kind is unknown.
    """
    how = (join, norm, None, sink, server_of(residual, compiled))
    y, out = _residual_norm(residual, branch, branch_bias, weight, bias, *how)
    return y, out


def norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    settings: Norm,
    out_dtype: torch.dtype | None = None,
    sink: Sink | None = None,
    compiled: CompiledDefinitions | None = None,
) -> Tensor:
    """The norm of `x` [..., H] over its last dimension, times `weight` plus `bias`, both [H].

    The result is in `out_dtype` (default: that of `x`). For `sink`, `compiled` and errors
    see `scaled_residual_norm`.
    """
    how = (_NO_BRANCH, settings, out_dtype or x.dtype, sink, server_of(x, compiled))
    out: Tensor = _residual_norm(x, None, None, weight, bias, *how)
    return out

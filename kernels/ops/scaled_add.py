"""The scaled residual add alone, where no norm follows: the end of a pipeline stage.

forward    y = residual + scale * dropout(branch + branch_bias)
backward   d_residual = d_y
           d_branch = scale * dropout factor * d_y
           d_branch_bias = sum over rows of d_branch
"""

# mypy: disable-error-code=assignment
# (A kernel's tuples of segments grow as they are unrolled.)

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..cpu import residual_norm as cpu
from ..launch import backward_shape, forward_shape, partial_rows
from ..library import first_derivative, register
from ..optional_triton import tl, triton
from ..reference import Join, compute_dtype
from ..tiling import (
    add_branch,
    branch_gradient,
    ceil_div,
    dropout_rows,
    load_tile,
    new_like,
    rows_of,
    store_partial,
    store_tile,
    zero_tiles,
)
from .partial_sums import Sink, receivers, vector_gradients


@triton.jit(do_not_specialize=["rows"])
def scaled_add_forward_kernel(
    residual: tl.tensor, branch: tl.tensor, branch_bias: tl.tensor, seed: tl.tensor, y: tl.tensor,
    rows: tl.tensor, residual_stride: tl.tensor, branch_stride: tl.tensor,
    scale: tl.tensor, dropout_p: tl.tensor,
    HIDDEN: tl.constexpr, WIDTHS: tl.constexpr, ROWS: tl.constexpr,
) -> None:  # fmt: skip
    """Each program computes one tile of rows. `branch_bias` and `seed` may be None."""
    first_row = tl.program_id(0).to(tl.int64) * ROWS
    row = first_row + tl.arange(0, ROWS).to(tl.int64)[:, None]
    in_rows = row < rows
    number = dropout_rows(seed, row)
    for k in tl.static_range(len(WIDTHS)):
        total = load_tile(residual, row, in_rows, residual_stride, k, WIDTHS, HIDDEN)
        add_branch(
            total, branch, branch_bias, seed, y, row, number, in_rows, branch_stride,
            scale, dropout_p, k, WIDTHS, HIDDEN,
        )  # fmt: skip


@triton.jit(do_not_specialize=["rows"])
def scaled_add_backward_kernel(
    d_y: tl.tensor, seed: tl.tensor, d_branch: tl.tensor, partials: tl.tensor,
    rows: tl.tensor, d_y_stride: tl.tensor, scale: tl.tensor, dropout_p: tl.tensor,
    HIDDEN: tl.constexpr, WIDTHS: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr,
) -> None:  # fmt: skip
    """Program p takes tiles p, p + P, p + 2P, ...; `partials` is None without a branch bias."""
    bias_sum = zero_tiles(ROWS, WIDTHS)
    # The first tile is int64, and so are the row numbers: an offset in elements may pass 2^31.
    first_tile = tl.program_id(0).to(tl.int64)
    tiles = tl.cdiv(rows, ROWS)
    for tile in tl.range(first_tile, tiles, tl.num_programs(0), num_stages=STAGES):
        row = tile * ROWS + tl.arange(0, ROWS).to(tl.int64)[:, None]
        in_rows = row < rows
        number = dropout_rows(seed, row)
        added = ()
        for k in tl.static_range(len(WIDTHS)):
            gradient = load_tile(d_y, row, in_rows, d_y_stride, k, WIDTHS, HIDDEN)
            gradient = branch_gradient(gradient, seed, number, scale, dropout_p, k, WIDTHS, HIDDEN)
            store_tile(d_branch, gradient, row, in_rows, k, WIDTHS, HIDDEN)
            added += (bias_sum[k] + gradient,)
        # Without partials nothing is kept, and the compiler drops the additions.
        if partials is not None:
            bias_sum = added

    if partials is not None:
        for k in tl.static_range(len(WIDTHS)):
            store_partial(partials, 0, 1, bias_sum[k], k, WIDTHS, HIDDEN)


def launch_scaled_add_forward(
    residual: Tensor,
    branch: Tensor,
    branch_bias: Tensor | None,
    join: Join,
) -> Tensor:
    """y [..., H], contiguous, in the residual's dtype."""
    if residual.dtype == torch.float64:
        return cpu.scaled_add_forward(residual, branch, branch_bias, join)
    # One launch whatever the leading shape is: it is flattened to rows.
    y = new_like(residual, residual.dtype)
    hidden = residual.shape[-1]
    rows = residual.numel() // hidden
    if rows == 0:
        return y
    shape = forward_shape("scaled_add_forward", hidden, residual.dtype, residual.device)
    residual, residual_stride = rows_of(residual)
    branch, branch_stride = rows_of(branch)
    grid = (ceil_div(rows, shape.rows),)
    scaled_add_forward_kernel[grid](
        residual, branch, branch_bias, join.dropout_seed, y,
        rows, residual_stride, branch_stride,
        join.scale, join.dropout_p,
        HIDDEN=hidden, WIDTHS=shape.widths, ROWS=shape.rows, **shape.options,
    )  # fmt: skip
    return y


def launch_scaled_add_backward(
    d_y: Tensor,
    has_branch_bias: bool,
    join: Join,
    branch_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """(d_branch, partials [P, 1 or 0, H]); the residual's gradient is `d_y` itself."""
    if d_y.dtype == torch.float64:
        return cpu.scaled_add_backward(d_y, has_branch_bias, join, branch_dtype)
    hidden = d_y.shape[-1]
    rows = d_y.numel() // hidden
    shape = backward_shape("scaled_add_backward", hidden, d_y.dtype, d_y.device)
    d_branch = new_like(d_y, branch_dtype)
    size = (shape.programs, int(has_branch_bias), hidden)
    partials = d_y.new_empty(size, dtype=torch.float32)
    # Rows may be strided, so that a slice of a wider tensor is not copied.
    d_y, d_y_stride = rows_of(d_y)
    grid = (shape.programs,)
    scaled_add_backward_kernel[grid](
        d_y, join.dropout_seed, d_branch, partials if has_branch_bias else None,
        rows, d_y_stride, join.scale, join.dropout_p,
        HIDDEN=hidden, WIDTHS=shape.widths, ROWS=shape.rows, STAGES=shape.stages, **shape.options,
    )  # fmt: skip
    return d_branch, partials


def _fake_backward(
    d_y: Tensor, has_branch_bias: bool, join: Join, branch_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    hidden = d_y.shape[-1]
    programs = partial_rows("scaled_add_backward", d_y.device, d_y.dtype, hidden)
    size = (programs, int(has_branch_bias), hidden)
    d_branch = d_y.new_empty(d_y.shape, dtype=branch_dtype)
    return d_branch, d_y.new_empty(size, dtype=compute_dtype(d_y))


_scaled_add_forward = register(
    "scaled_add_forward(Tensor residual, Tensor branch, Tensor? branch_bias, Join join) -> Tensor",
    cpu=cpu.scaled_add_forward,
    cuda=launch_scaled_add_forward,
    fake=lambda residual, *_: residual.new_empty(residual.shape),
)
_scaled_add_backward = register(
    "scaled_add_backward(Tensor d_y, bool has_branch_bias, Join join, ScalarType branch_dtype) "
    "-> (Tensor, Tensor)",
    cpu=cpu.scaled_add_backward,
    cuda=launch_scaled_add_backward,
    fake=_fake_backward,
)


class _ScaledAdd(torch.autograd.Function):
    """The bias's gradient goes through autograd as the others do, or to the sink."""

    @staticmethod
    def forward(
        ctx: Any,
        residual: Tensor,
        branch: Tensor,
        branch_bias: Tensor | None,
        join: Join,
        sink: Sink | None,
    ) -> Tensor:
        ctx.join = join
        ctx.branch_dtype = branch.dtype
        ctx.sink = sink
        ctx.receivers = receivers((branch_bias,), sink)
        return _scaled_add_forward(residual, branch, branch_bias, join)

    @staticmethod
    @first_derivative
    def backward(ctx: Any, d_y: Tensor) -> tuple[Tensor | None, ...]:
        # The gradient of the residual is `d_y` itself, neither copied nor changed.
        (branch_bias,) = ctx.receivers
        has_bias = branch_bias is not None
        d_branch, partials = _scaled_add_backward(d_y, has_bias, ctx.join, ctx.branch_dtype)
        (d_bias,) = vector_gradients(partials, ctx.receivers, ctx.sink)
        return d_y, d_branch, d_bias, None, None


_scaled_add: Callable[..., Tensor] = _ScaledAdd.apply


def scaled_add(
    residual: Tensor,
    branch: Tensor,
    branch_bias: Tensor | None,
    join: Join,
    sink: Sink | None = None,
) -> Tensor:
    """`residual + scale * dropout(branch + branch_bias)` [..., H].

    The result is rounded once, to the residual's dtype.

    With a `sink` the gradient of `branch_bias` [H], which is then a parameter, goes there and not
    through autograd. Raises ValueError where dropout has no seed.
    """
    return _scaled_add(residual, branch, branch_bias, join, sink)

"""The scaled residual add alone, where no norm follows: the end of a pipeline stage.

forward    y = residual + scale * dropout(branch + branch_bias)
backward   d_residual = d_y;  d_branch = scale * dropout factor * d_y;  d_branch_bias = sum over rows of d_branch
"""

# mypy: disable-error-code=assignment
# (A kernel's tuples of segments grow as they are unrolled.)

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import native
from .launch import backward_shape, forward_shape, partial_rows, rows_of
from .library import register
from .optional_triton import tl, triton
from .partial_sums import reduced
from .row_tiles import add_branch, load_tile, new_like, store_branch_gradient, store_partial, zero_tile


@triton.jit(do_not_specialize=["rows"])
def forward_kernel(
    residual, branch, branch_bias, seed, y, rows, residual_stride, branch_stride, scale, dropout_p,
    HIDDEN: tl.constexpr, WIDTHS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS).to(tl.int64)[:, None]
    in_rows = row < rows
    for k in tl.static_range(len(WIDTHS)):
        total = load_tile(residual, row, in_rows, residual_stride, k * WIDTHS[0], WIDTHS[k], HIDDEN)
        add_branch(total, branch, branch_bias, seed, y, row, in_rows, branch_stride, scale, dropout_p,
                   k * WIDTHS[0], WIDTHS[k], HIDDEN)  # fmt: skip


@triton.jit(do_not_specialize=["rows"])
def backward_kernel(
    d_y, seed, d_branch, partials, rows, d_y_stride, scale, dropout_p,
    HIDDEN: tl.constexpr, WIDTHS: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """`partials` None: there is no branch bias."""
    bias_sum = ()
    for k in tl.static_range(len(WIDTHS)):
        bias_sum += (zero_tile(ROWS, WIDTHS[k]),)
    for tile in tl.range(tl.program_id(0).to(tl.int64), tl.cdiv(rows, ROWS), tl.num_programs(0), num_stages=STAGES):
        row = tile * ROWS + tl.arange(0, ROWS).to(tl.int64)[:, None]
        in_rows = row < rows
        added = ()
        for k in tl.static_range(len(WIDTHS)):
            gradient = load_tile(d_y, row, in_rows, d_y_stride, k * WIDTHS[0], WIDTHS[k], HIDDEN)
            added += (bias_sum[k] + store_branch_gradient(gradient, d_branch, seed, row, in_rows, scale, dropout_p,
                                                          k * WIDTHS[0], WIDTHS[k], HIDDEN),)  # fmt: skip
        if partials is not None:
            bias_sum = added
    if partials is not None:
        for k in tl.static_range(len(WIDTHS)):
            store_partial(partials, 0, 1, bias_sum[k], k * WIDTHS[0], WIDTHS[k], HIDDEN)


def launch_scaled_add_forward(
    residual: Tensor, branch: Tensor, branch_bias: Tensor | None, scale: float, dropout_p: float, seed: Tensor | None
) -> Tensor:
    if residual.dtype == torch.float64:
        return native.scaled_add_forward(residual, branch, branch_bias, scale, dropout_p, seed)
    y = new_like(residual, residual.dtype)
    hidden = residual.shape[-1]
    rows = residual.numel() // hidden
    if rows == 0:
        return y
    shape = forward_shape("scaled_add_forward", hidden, residual.dtype, residual.device)
    residual, residual_stride = rows_of(residual)
    branch, branch_stride = rows_of(branch)
    forward_kernel[(triton.cdiv(rows, shape.rows),)](
        residual, branch, branch_bias, seed if dropout_p > 0.0 else None, y, rows, residual_stride, branch_stride, scale, dropout_p,
        HIDDEN=hidden, WIDTHS=shape.widths, ROWS=shape.rows, **shape.options,
    )  # fmt: skip
    return y


def launch_scaled_add_backward(
    d_y: Tensor, has_branch_bias: bool, scale: float, dropout_p: float, seed: Tensor | None, branch_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    if d_y.dtype == torch.float64:
        return native.scaled_add_backward(d_y, has_branch_bias, scale, dropout_p, seed, branch_dtype)
    hidden = d_y.shape[-1]
    rows = d_y.numel() // hidden
    shape = backward_shape("scaled_add_backward", hidden, d_y.dtype, d_y.device)
    d_branch = new_like(d_y, branch_dtype)
    partials = d_y.new_empty((shape.programs, int(has_branch_bias), hidden), dtype=torch.float32)
    d_y, d_y_stride = rows_of(d_y)
    backward_kernel[(shape.programs,)](
        d_y, seed if dropout_p > 0.0 else None, d_branch, partials if has_branch_bias else None, rows, d_y_stride, scale, dropout_p,
        HIDDEN=hidden, WIDTHS=shape.widths, ROWS=shape.rows, STAGES=shape.stages, **shape.options,
    )  # fmt: skip
    return d_branch, partials


def _fake_backward(d_y, has_branch_bias, scale, dropout_p, seed, branch_dtype):
    hidden = d_y.shape[-1]
    partials = (partial_rows("scaled_add_backward", d_y.device, d_y.dtype, hidden), int(has_branch_bias), hidden)
    return d_y.new_empty(d_y.shape, dtype=branch_dtype), d_y.new_empty(partials, dtype=native.compute_dtype(d_y))


_scaled_add_forward = register(
    "scaled_add_forward(Tensor residual, Tensor branch, Tensor? branch_bias, float scale, float dropout_p, Tensor? seed) -> Tensor",
    cpu=native.scaled_add_forward,
    cuda=launch_scaled_add_forward,
    fake=lambda residual, *_: residual.new_empty(residual.shape),
)
_scaled_add_backward = register(
    "scaled_add_backward(Tensor d_y, bool has_branch_bias, float scale, float dropout_p, Tensor? seed, ScalarType branch_dtype) "
    "-> (Tensor, Tensor)",
    cpu=native.scaled_add_backward,
    cuda=launch_scaled_add_backward,
    fake=_fake_backward,
)


def scaled_add_forward(
    residual: Tensor,
    branch: Tensor,
    branch_bias: Tensor | None,
    scale: float,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """`residual + scale * dropout(branch + branch_bias)` [..., H] without autograd: the end of a pipeline stage."""
    return _scaled_add_forward(residual, branch, branch_bias, scale, dropout_p, seed)


def scaled_add_backward(
    d_y: Tensor,
    has_branch_bias: bool,
    scale: float,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    branch_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """(d_branch, partials [P, 1 or 0, H]); the residual's gradient is `d_y` itself."""
    return _scaled_add_backward(d_y, has_branch_bias, scale, dropout_p, seed, branch_dtype or d_y.dtype)


class _ScaledAdd(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, residual, branch, branch_bias, scale, dropout_p, seed):
        ctx.save_for_backward(seed)
        ctx.settings = (branch_bias is not None, scale, dropout_p)
        ctx.branch_dtype = branch.dtype
        ctx.bias_dtype = None if branch_bias is None else branch_bias.dtype
        return _scaled_add_forward(residual, branch, branch_bias, scale, dropout_p, seed)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_y):
        has_branch_bias, scale, dropout_p = ctx.settings
        d_branch, partials = _scaled_add_backward(d_y, has_branch_bias, scale, dropout_p, ctx.saved_tensors[0], ctx.branch_dtype)
        return d_y, d_branch, reduced(partials, 0, ctx.bias_dtype) if has_branch_bias else None, None, None, None


def scaled_add(
    residual: Tensor,
    branch: Tensor,
    branch_bias: Tensor | None = None,
    scale: float = 1.0,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """`residual + scale * dropout(branch + branch_bias)` [..., H], in the residual's dtype, rounded once."""
    return _ScaledAdd.apply(residual, branch, branch_bias, scale, dropout_p, seed)

"""The last step of a vector's gradient: the partial sums [P, K, H] of a backward, summed over P in a fixed order.

An operation of its own, so that whoever schedules weight gradients decides when it runs, and straight into the main gradient.
"""

import torch
from torch import Tensor

from . import native
from .launch import reduction_shape
from .library import register
from .optional_triton import tl, triton


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


def launch_reduce_partials(partials: Tensor, k: int, into: Tensor) -> None:
    if into.dtype == torch.float64:
        native.reduce_partials(partials, k, into)
        return
    count, kinds, hidden = partials.shape
    shape = reduction_shape(into.device)
    reduce_partials_kernel[(triton.cdiv(hidden, shape.columns),)](
        partials[:, k], into, count, kinds * hidden, HIDDEN=hidden, ROWS=shape.rows, BLOCK=shape.columns, **shape.options
    )


_reduce_partials = register(
    "reduce_partials_(Tensor partials, int k, Tensor(a!) into) -> ()",
    cpu=native.reduce_partials,
    cuda=launch_reduce_partials,
    fake=lambda partials, k, into: None,
)


def reduce_partials(partials: Tensor, k: int, into: Tensor) -> None:
    """Add the sum over P of `partials[:, k]` ([P, K, H]) to `into` [H], in a fixed order (bitwise repeatable)."""
    _reduce_partials(partials, k, into)


def reduced(partials: Tensor, k: int, dtype: torch.dtype) -> Tensor:
    """The column sums of `partials[:, k]` as a new tensor [H]."""
    total = partials.new_zeros(partials.shape[-1])
    _reduce_partials(partials, k, total)
    return total.to(dtype)

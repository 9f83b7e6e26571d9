"""The last step of a vector's gradient: the partial sums of a backward become one sum.

The partial sums are [P, K, H], and the sum over P has a fixed order. It is an operation of its own,
so that whoever schedules weight gradients (a `Sink`) decides when it runs. It adds straight into
the main gradient.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from ..cpu import residual_norm as cpu
from ..launch import reduction_shape
from ..library import register
from ..optional_triton import tl, triton
from ..tiling import ceil_div


@triton.jit
def reduce_partials_kernel(
    partials: tl.tensor,  # float32, from the first row on
    into: tl.tensor,  # float32 [H]
    count: tl.tensor,
    stride: tl.tensor,
    HIDDEN: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """into [H] += sum over `count` rows, `stride` elements apart, in a fixed order."""
    first_column = tl.program_id(0) * BLOCK
    column = first_column + tl.arange(0, BLOCK)
    in_row = column < HIDDEN
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    for start in range(0, count, ROWS):
        row = start + tl.arange(0, ROWS)[:, None]
        mask = (row < count) & in_row[None, :]
        address = partials + row * stride + column[None, :]
        total += tl.load(address, mask=mask, other=0.0)

    # One more reduction, over the rows of the tile; then the main gradient is read and written.
    old = tl.load(into + column, mask=in_row, other=0.0)
    tl.store(into + column, old + tl.sum(total, axis=0), mask=in_row)


def launch_reduce_partials(partials: Tensor, k: int, into: Tensor) -> None:
    """Add the sum over P of `partials[:, k]` to `into` [H]; a program sums a block of columns."""
    if into.dtype == torch.float64:
        cpu.reduce_partials(partials, k, into)
        return
    # The rows of vector k lie K * H elements apart: a stride, not a copy.
    count, vectors, hidden = partials.shape
    shape = reduction_shape(into.device)
    grid = (ceil_div(hidden, shape.columns),)
    reduce_partials_kernel[grid](
        partials[:, k],
        into,
        count,
        vectors * hidden,
        HIDDEN=hidden,
        ROWS=shape.rows,
        BLOCK=shape.columns,
        **shape.options,
    )


_reduce_partials = register(
    "reduce_partials_(Tensor partials, int k, Tensor(a!) into) -> ()",
    cpu=cpu.reduce_partials,
    cuda=launch_reduce_partials,
    fake=lambda partials, k, into: None,
)


class Sink(Protocol):
    """Takes the gradients of parameters in place of autograd, as a trainer's queue does."""

    def push(self, parameter: Any, accumulate: Callable[[Tensor, bool], None]) -> None:
        """Take one contribution to the gradient of `parameter`, to be added now or later.

        `accumulate(main_grad, first)` adds it to `main_grad` [H], float32 or float64. Where `first`
        is true it is written over what is there.
        """


def receivers(vectors: Sequence[Tensor | None], sink: Sink | None) -> tuple[Any, ...]:
    """What a forward remembers of its vectors: the parameters for a sink, dtypes for autograd.

    None stands for a vector that the operation was not given.
    """
    if sink is not None:
        return tuple(vectors)
    dtypes = []
    for vector in vectors:
        dtypes.append(None if vector is None else vector.dtype)
    return tuple(dtypes)


def vector_gradients(
    partials: Tensor,
    receivers: Sequence[Any],
    sink: Sink | None,
) -> list[Tensor | None]:
    """What a backward returns for its vectors, whose gradients are in `partials` [P, K, H].

    The K gradients belong to the receivers that are not None, in this order. With a `sink`, every
    gradient is pushed there, and autograd gets None.
    """
    gradients: list[Tensor | None] = []
    row = 0
    for receiver in receivers:
        if receiver is None:
            gradients.append(None)
            continue
        # Without a sink the sum is taken now; a sink decides when its `accumulate` is called.
        if sink is None:
            gradients.append(_column_sums(partials, row, receiver))
        else:
            sink.push(receiver, _accumulation(partials, row))
            gradients.append(None)
        row += 1
    return gradients


def reduce_partials(partials: Tensor, k: int, into: Tensor) -> None:
    """Add the sum over P of `partials[:, k]` ([P, K, H]) to `into` [H].

    The order is fixed, so the sum is bitwise repeatable.
    """
    _reduce_partials(partials, k, into)


def _column_sums(partials: Tensor, k: int, dtype: torch.dtype) -> Tensor:
    """The gradient [H] of vector `k`, summed in the dtype of the partial sums and rounded once."""
    total = partials.new_zeros(partials.shape[-1])
    _reduce_partials(partials, k, total)
    return total.to(dtype)


def _accumulation(partials: Tensor, k: int) -> Callable[[Tensor, bool], None]:
    """What a sink gets for vector `k`; it keeps `partials` alive until it is dropped."""

    def accumulate(main_grad: Tensor, first: bool) -> None:
        if first:
            main_grad.zero_()
        _reduce_partials(partials, k, main_grad)

    return accumulate

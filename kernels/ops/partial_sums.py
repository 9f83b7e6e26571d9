"""The last step of vectors' gradients: the partial sums of a backward become one sum each.

The partial sums are [P, K, H], and the sums over P have a fixed order. It is an operation of its
own, so that whoever schedules weight gradients (a `Sink`) decides when it runs. One launch serves
all K vectors of a backward, and adds straight into their main gradients.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from ..cpu import residual_norm as cpu
from ..launch import reduction_shape
from ..library import register
from ..optional_triton import tl, triton
from ..tiling import ceil_div

MOST_VECTORS = 3  # weight, bias and branch bias of a norm


@triton.jit
def _store_sums(
    into: tl.tensor, sums: tl.tensor, column: tl.tensor, in_row: tl.tensor,
    OVERWRITE: tl.constexpr,
) -> None:  # fmt: skip
    """into [H] += sums, or = where OVERWRITE; nothing where `into` is None."""
    if into is not None:
        if not OVERWRITE:
            sums += tl.load(into + column, mask=in_row, other=0.0)
        tl.store(into + column, sums, mask=in_row)


@triton.jit
def reduce_partials_kernel(
    partials: tl.tensor,  # float32 [count, VECTORS, HIDDEN]
    first: tl.tensor, second: tl.tensor, third: tl.tensor,  # float32 [H], or None
    count: tl.tensor,
    OVERWRITE: tl.constexpr,  # bit k: of vector k
    VECTORS: tl.constexpr, HIDDEN: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    """Program (c, k) sums block c of the columns of vector k over `count` rows, in a fixed order.

    `first`, `second` and `third` take the sums of vectors 0, 1 and 2.
    """
    vector = tl.program_id(1)
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    in_row = column < HIDDEN
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    for start in range(0, count, ROWS):
        row = start + tl.arange(0, ROWS)[:, None]
        mask = (row < count) & in_row[None, :]
        address = partials + (row * VECTORS + vector) * HIDDEN + column[None, :]
        total += tl.load(address, mask=mask, other=0.0)

    # One more reduction, over the rows of the tile; then a main gradient is read and written.
    sums = tl.sum(total, axis=0)
    if vector == 0:
        _store_sums(first, sums, column, in_row, (OVERWRITE & 1) != 0)
    if vector == 1:
        _store_sums(second, sums, column, in_row, (OVERWRITE & 2) != 0)
    if vector == 2:
        _store_sums(third, sums, column, in_row, (OVERWRITE & 4) != 0)


def launch_reduce_partials(
    partials: Tensor,
    first: Tensor | None,
    second: Tensor | None,
    third: Tensor | None,
    overwrite: int,
) -> None:
    """One launch; see `reduce_partials`. `overwrite`: bit k says it of vector k."""
    if partials.dtype == torch.float64:
        cpu.reduce_partials(partials, first, second, third, overwrite)
        return
    count, vectors, hidden = partials.shape
    shape = reduction_shape(partials.device)
    grid = (ceil_div(hidden, shape.columns), vectors)
    reduce_partials_kernel[grid](
        partials, first, second, third,
        count,
        OVERWRITE=overwrite, VECTORS=vectors, HIDDEN=hidden,
        ROWS=shape.rows, BLOCK=shape.columns, **shape.options,
    )  # fmt: skip


_reduce_partials = register(
    "reduce_partials_(Tensor partials, Tensor(a!)? first, Tensor(b!)? second, Tensor(c!)? third, "
    "int overwrite) -> ()",
    cpu=cpu.reduce_partials,
    cuda=launch_reduce_partials,
    fake=lambda *_: None,
)

# Called with the main gradients [H] of several vectors, float32 or float64, and with whether each
# is stale and must be overwritten. None stands for a vector that takes no gradient.
AccumulateAll = Callable[[Sequence[Tensor | None], Sequence[bool]], None]


class Sink(Protocol):
    """Takes the gradients of parameters in place of autograd, as a trainer's queue does."""

    def push_together(self, parameters: Sequence[Any], accumulate: AccumulateAll) -> None:
        """Take one contribution to the gradient of each parameter, all to be added at one time.

        That may be now or later: `accumulate` adds them.
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
    present = [receiver for receiver in receivers if receiver is not None]
    if not present:
        return [None] * len(receivers)
    # Without a sink the sums are taken now; a sink decides when its `accumulate` is called.
    if sink is not None:
        sink.push_together(present, partial(reduce_partials, partials))
        return [None] * len(receivers)
    sums = iter(_column_sums(partials, present))
    return [None if receiver is None else next(sums) for receiver in receivers]


def reduce_partials(
    partials: Tensor, into: Sequence[Tensor | None], overwrite: Sequence[bool]
) -> None:
    """Add the sums over P of `partials` [P, K, H] to the K tensors `into`, each [H].

    into: None stands for a vector whose sum is not wanted. overwrite: by vector, whether the sum is
    written over what is there. The order is fixed, so the sums are bitwise repeatable.
    """
    bits = sum(1 << k for k, stale in enumerate(overwrite) if stale)
    absent: list[Tensor | None] = [None] * (MOST_VECTORS - len(into))
    first, second, third = [*into, *absent]
    _reduce_partials(partials, first, second, third, bits)


def _column_sums(partials: Tensor, dtypes: Sequence[torch.dtype]) -> list[Tensor]:
    """The gradients [H], summed in the dtype of the partial sums and rounded once."""
    sums = partials.new_empty(partials.shape[1:])
    reduce_partials(partials, sums.unbind(), [True] * len(dtypes))
    # One conversion for all vectors, which mostly have one dtype.
    rounded = {dtype: sums.to(dtype) for dtype in set(dtypes)}
    return [rounded[dtype][k] for k, dtype in enumerate(dtypes)]

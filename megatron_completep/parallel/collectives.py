"""Collectives over one axis of the mesh. Each is the identity where the axis has one rank.

`start_*` return a `Pending`, whose `wait()` gives the result: a caller can compute meanwhile.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_completep.parallel.axis import Axis

# torch 2.13 renamed the two; 2.11 has the old names only.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


@dataclass(slots=True)
class Pending:
    """A collective under way."""

    result: Tensor
    work: dist.Work | None = None

    def wait(self) -> Tensor:
        """Wait for the collective and return its result; later calls return it again."""
        if self.work is not None:
            self.work.wait()
            self.work = None
        return self.result


def start_all_reduce(
    x: Tensor, axis: Axis, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM
) -> Pending:
    """Sum (or max) over the axis, in place."""
    if axis.group is None:
        return Pending(x)
    # A view with gaps cannot be reduced in place: its copy is, and the copy is the result.
    x = x.contiguous()
    return Pending(x, dist.all_reduce(x, op, group=axis.group, async_op=True))


def start_all_gather(x: Tensor, axis: Axis, out: Tensor | None = None) -> Pending:
    """[s, ...] on each rank -> [size * s, ...], in rank order along the first dimension."""
    if axis.group is None:
        return Pending(x)
    out = x.new_empty(axis.size * x.shape[0], *x.shape[1:]) if out is None else out
    return Pending(out, _all_gather(out, x.contiguous(), group=axis.group, async_op=True))


def start_reduce_scatter(x: Tensor, axis: Axis, out: Tensor | None = None) -> Pending:
    """[size * s, ...] -> [s, ...]: this rank's part of the sum over the axis."""
    if axis.group is None:
        return Pending(x)
    out = x.new_empty(x.shape[0] // axis.size, *x.shape[1:]) if out is None else out
    return Pending(out, _reduce_scatter(out, x.contiguous(), group=axis.group, async_op=True))


def start_all_to_all(
    x: Tensor, axis: Axis, sent_sizes: list[int], received_sizes: list[int]
) -> Pending:
    """Send run number r of the flat x [sum(sent_sizes)] to rank r, for every rank of the axis.

    The result [sum(received_sizes)] holds what the ranks sent here, in rank order. An element of
    the sizes may be 0.
    """
    if axis.group is None:
        return Pending(x)
    out = x.new_empty(sum(received_sizes))
    work = dist.all_to_all_single(
        out, x, received_sizes, sent_sizes, group=axis.group, async_op=True
    )
    return Pending(out, work)


def read_on_host(arrived: Tensor) -> Any:
    """What a collective brought, as nested lists of Python numbers.

    On a GPU the host waits here for the other ranks, and not where the collective is waited for:
    the watchdog takes this file's functions for waiting.
    """
    return arrived.tolist()


def all_reduce(x: Tensor, axis: Axis, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Tensor:
    """The sum (or maximum) over the axis, in place where x is contiguous."""
    return start_all_reduce(x, axis, op).wait()


def all_gather(x: Tensor, axis: Axis) -> Tensor:
    """[s, ...] on each rank -> [size * s, ...], in rank order."""
    return start_all_gather(x, axis).wait()


def reduce_scatter(x: Tensor, axis: Axis) -> Tensor:
    """[size * s, ...] -> [s, ...]: this rank's part of the sum over the axis."""
    return start_reduce_scatter(x, axis).wait()


def exchange(x: Tensor, axis: Axis, peer: int) -> Tensor:
    """Send x to rank `peer` of the axis and return what that rank sends, of the same shape."""
    assert axis.group is not None
    received = torch.empty_like(x)
    peer_in_world = dist.get_global_rank(axis.group, peer)
    # Both at once: two ranks that send first and receive then could wait for each other.
    operations = [
        dist.P2POp(dist.isend, x.contiguous(), peer_in_world, axis.group),
        dist.P2POp(dist.irecv, received, peer_in_world, axis.group),
    ]
    for work in dist.batch_isend_irecv(operations):
        work.wait()
    return received


class _SumForward(torch.autograd.Function):
    """Sums partial results in forward; the gradient of each of them is the gradient of the sum."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis, scatter: bool) -> Tensor:
        ctx.axis = axis
        ctx.scatter = scatter
        return reduce_scatter(x, axis) if scatter else all_reduce(x, axis)

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor, None, None]:
        d_x = all_gather(d_out, ctx.axis) if ctx.scatter else d_out
        return d_x, None, None


def sum_over(x: Tensor, axis: Axis, scatter: bool = False) -> Tensor:
    """Sum partial activations over the axis, differentiably.

    scatter: each rank keeps its part of the first dimension of the sum (sequence parallelism).
    """
    if axis.group is None:
        return x
    total: Tensor = _SumForward.apply(x, axis, scatter)  # type: ignore[no-untyped-call]
    return total

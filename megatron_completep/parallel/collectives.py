"""Collectives over one axis of the mesh. Each is the identity where the axis has one rank.

`start_*` return a `Pending` whose `wait()` gives the result, so that a caller can compute meanwhile.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_completep.parallel.axis import Axis

# torch 2.13 renamed the two; 2.11 has the old names only.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


@dataclass
class Pending:
    """A collective under way."""

    result: Tensor
    work: dist.Work | None = None

    def wait(self) -> Tensor:
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


def all_reduce(x: Tensor, axis: Axis, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Tensor:
    return start_all_reduce(x, axis, op).wait()


def all_gather(x: Tensor, axis: Axis) -> Tensor:
    return start_all_gather(x, axis).wait()


def reduce_scatter(x: Tensor, axis: Axis) -> Tensor:
    return start_reduce_scatter(x, axis).wait()


def exchange(x: Tensor, axis: Axis, peer: int) -> Tensor:
    """Send x to rank `peer` of the axis and return what that one sends, of the same shape."""
    assert axis.group is not None
    received, other = torch.empty_like(x), dist.get_global_rank(axis.group, peer)
    operations = [
        dist.P2POp(dist.isend, x.contiguous(), other, axis.group),
        dist.P2POp(dist.irecv, received, other, axis.group),
    ]
    for work in dist.batch_isend_irecv(operations):
        work.wait()
    return received


class _SumForward(torch.autograd.Function):
    """Forward: sum over the axis (reduce-scatter along S under sequence parallelism). Backward: the gradient as it is (all-gather)."""

    @staticmethod
    def forward(ctx, x, axis: Axis, scatter: bool):
        ctx.axis, ctx.scatter = axis, scatter
        return reduce_scatter(x, axis) if scatter else all_reduce(x, axis)

    @staticmethod
    def backward(ctx, d_out):
        return (all_gather(d_out, ctx.axis) if ctx.scatter else d_out), None, None


def sum_over(x: Tensor, axis: Axis, scatter: bool = False) -> Tensor:
    """Sum partial activations over the axis, differentiably; with `scatter` each rank keeps its part of the first dimension."""
    return x if axis.group is None else _SumForward.apply(x, axis, scatter)

"""Gradients in one buffer, and the reduction of each bucket of it into the shard (ZeRO-1)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import Parameter

from megatron_completep.optim.layout import LOADS, Layout
from megatron_completep.parallel.axis import Axis, Reduction
from megatron_completep.parallel.collectives import (
    Pending,
    start_all_reduce,
    start_reduce_scatter,
)

# With bf16 communication at most this many buckets are in their reduce-scatter, and at most as many
# older ones in their all-reduce over replicas.
OVERLAPPED = 2


@dataclass
class RunningReduction:
    """The reduction of one bucket, from its start until the result is in `grad_shard`."""

    pending: Pending  # first the reduce-scatter over the shard axis, then the sum over replicas
    replica: Axis  # the ranks that hold the same shard
    target: Tensor  # the bucket's slice of `grad_shard`
    replica_sum_started: bool = False

    def sum_over_replicas(self) -> None:
        """Wait for the reduce-scatter, and start the sum over replicas behind it, once."""
        if not self.replica_sum_started:
            self.pending = start_all_reduce(self.pending.wait(), self.replica)
            self.replica_sum_started = True

    def finish(self) -> None:
        """Wait until the sum lies in its place."""
        self.sum_over_replicas()
        gradients = self.pending.wait()
        # The sum is in another buffer if it was communicated in another dtype, or if there was no
        # reduce-scatter (one shard).
        if gradients.data_ptr() != self.target.data_ptr():
            self.target.copy_(gradients)


class WholeGradients:
    """The gradients of a rank in one buffer; a step reduces each bucket of it once.

    Attributes:
        kept: whether `main_grad` outlives the reduction.
        grad: as `Shards.grad`; the parameters' `main_grad` become views into it.
    """

    kept: ClassVar[bool] = True

    def __init__(
        self,
        parameters: Mapping[str, Parameter],
        layout: Layout,
        reductions: Mapping[str, Reduction],
        like: Tensor,
        communication_dtype: torch.dtype | None,
    ):
        """like: a tensor of the gradients' type, on their device.

        communication_dtype: in which gradients are sent; None: their own.
        """
        self._layout = layout
        self._reductions = reductions
        self._communication_dtype = communication_dtype
        self._running: list[RunningReduction] = []
        self.grad = like.new_zeros(layout.size)
        for piece in layout.pieces:
            parameter = parameters[piece.name]
            view = self.grad[piece.start : piece.start + piece.size].view(parameter.shape)
            parameter.main_grad = view  # type: ignore[attr-defined]

    def reduce(self, number: int, target: Tensor) -> None:
        """Start the reduce-scatter of a complete bucket over its shard axis.

        target: the bucket's slice of `grad_shard`.
        """
        bucket = self._layout.buckets[number]
        shard, replica = self._reductions[bucket.axis]
        gradients = self.grad[bucket.start : bucket.stop]
        # Loads of experts are counts, which no rounding may change.
        if self._communication_dtype is None or bucket.kind == LOADS:
            pending = start_reduce_scatter(gradients, shard, target)
        else:
            # The sum arrives in the communicated dtype and is copied to `target` later.
            self._free_older_copies()
            pending = start_reduce_scatter(gradients.to(self._communication_dtype), shard)
        self._running.append(RunningReduction(pending, replica, target))

    def _free_older_copies(self) -> None:
        """Wait for older buckets, whose copies in the communicated dtype live until then.

        A rank thus holds at most four copies at a time, instead of one copy per bucket at the end
        of backward. All ranks that reduce together do this at the same buckets, as they start them
        in one order.
        """
        if len(self._running) >= OVERLAPPED:
            self._running[-OVERLAPPED].sum_over_replicas()
        if len(self._running) >= 2 * OVERLAPPED:
            self._running.pop(0).finish()

    def finish(self, targets: Sequence[Tensor]) -> None:
        """Wait for all reductions. Communicates over the replica axes.

        targets: the slices of `grad_shard`, by bucket.
        """
        # Start all replica all-reduces before waiting for any.
        for reduction in self._running:
            reduction.sum_over_replicas()
        for reduction in self._running:
            reduction.finish()
        self._running.clear()

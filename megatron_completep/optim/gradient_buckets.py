"""Full gradients that live one bucket at a time: `parallel.sharding: gradients` (ZeRO-2).

The full gradient of a bucket exists from the first contribution of a micro-batch to the end of its
reduce-scatter, which adds into this rank's shard. So every micro-batch is reduced, and a step of
several sends its gradients several times.

Buffers are tensors of their own and not views into one storage that is shrunk: what is freed cannot
be reached, and in the place of a parameter's gradient stands `REDUCED`, which no kernel takes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import Parameter

from megatron_completep.optim.layout import LOADS, Bucket, Layout, Piece, Run
from megatron_completep.parallel.axis import Reduction
from megatron_completep.parallel.collectives import (
    Pending,
    start_all_reduce,
    start_reduce_scatter,
)
from megatron_completep.parallel.gradients import REDUCED
from megatron_completep.parallel.parameter import spec_of

LIVE = 2  # buckets of a kind: one that is filled, and one that is under way


@dataclass
class _Running:
    """The reduce-scatter of one bucket in one micro-batch."""

    number: int
    sent: Tensor  # kept until the collective has read it
    pending: Pending
    target: Tensor  # the bucket's slice of `grad_shard`
    first: bool  # of the step: what `target` holds is overwritten

    def finish(self) -> None:
        """Wait, and add the sum to the shard."""
        summed = self.pending.wait()
        if not self.first:
            self.target.add_(summed)
        elif summed.data_ptr() != self.target.data_ptr():
            self.target.copy_(summed)


class BucketGradients:
    """The buffers of the buckets that a micro-batch is filling or reducing.

    At most `LIVE` of a kind are live, and those of parameters that a micro-batch uses twice (a tied
    embedding), which lie in buckets of their own and are filled from its beginning to its end.

    Args:
        parameters: by name, with the names of `layout`.
        like: a tensor of the gradients' type, on their device.
        communication_dtype: in which gradients are sent; None: their own.

    Attributes:
        kept: whether `main_grad` outlives the reduction.
    """

    kept: ClassVar[bool] = False

    def __init__(
        self,
        parameters: Mapping[str, Parameter],
        layout: Layout,
        reductions: Mapping[str, Reduction],
        like: Tensor,
        communication_dtype: torch.dtype | None,
    ):
        self._parameters = parameters
        self._layout = layout
        self._reductions = reductions
        self._like = like
        self._communication_dtype = communication_dtype
        self._pieces: dict[int, list[Piece]] = {}
        self._bucket_of: dict[Parameter, int] = {}
        self._filled_long: set[int] = set()
        for piece in layout.pieces:
            self._pieces.setdefault(piece.bucket, []).append(piece)
            self._bucket_of[parameters[piece.name]] = piece.bucket
            if spec_of(parameters[piece.name]).uses > 1:
                self._filled_long.add(piece.bucket)
            parameters[piece.name].main_grad = REDUCED  # type: ignore[attr-defined]
        self._gaps = {
            number: _gaps(layout.buckets[number], p) for number, p in self._pieces.items()
        }
        self._filling: dict[int, Tensor] = {}
        self._running: list[_Running] = []
        self._arrived: set[int] = set()  # buckets with a sum of this step in `grad_shard`

    def begin_step(self) -> None:
        """The next sum of each bucket overwrites its slice of `grad_shard`."""
        self._arrived.clear()

    def allocate(self, parameter: Parameter) -> None:
        """Give the bucket of a parameter its buffer, if it has none. Its contents are stale."""
        number = self._bucket_of[parameter]
        if number in self._filling:
            return
        self._make_room(number)
        bucket = self._layout.buckets[number]
        buffer = self._like.new_empty(bucket.size)
        for start, stop in self._gaps[number]:
            buffer[start:stop].zero_()  # sums over the shard read the padding, too
        for piece in self._pieces[number]:
            start = piece.start - bucket.start
            member = self._parameters[piece.name]
            view = buffer[start : start + piece.size].view(member.shape)
            member.main_grad = view  # type: ignore[attr-defined]
        self._filling[number] = buffer

    def _make_room(self, number: int) -> None:
        """Wait for the oldest reductions while too many buckets of this one's kind are live."""
        # Its own gradients of the micro-batch before count once.
        while any(reduction.number == number for reduction in self._running):
            self._running.pop(0).finish()
        kind = self._layout.buckets[number].kind
        limited = number not in self._filled_long
        while limited and self._running and self._live(kind) >= LIVE:
            self._running.pop(0).finish()

    def _live(self, kind: str) -> int:
        running = [reduction.number for reduction in self._running]
        numbers = [n for n in [*self._filling, *running] if n not in self._filled_long]
        return sum(self._layout.buckets[n].kind == kind for n in numbers)

    def reduce(self, number: int, target: Tensor) -> None:
        """Start the reduce-scatter of a complete bucket over its shard axis.

        target: the bucket's slice of `grad_shard`, to which the sum is added.
        """
        first = number not in self._arrived
        self._arrived.add(number)
        for piece in self._pieces[number]:
            self._parameters[piece.name].main_grad = REDUCED  # type: ignore[attr-defined]
        bucket = self._layout.buckets[number]
        gradients = self._filling.pop(number)
        sent = gradients.to(self._sent_as(bucket))
        # The sum arrives elsewhere if it is added to those of earlier micro-batches, or converted.
        into = target if first and sent.dtype == target.dtype else None
        shard = self._reductions[bucket.axis].shard
        pending = start_reduce_scatter(sent, shard, into)
        self._running.append(_Running(number, sent, pending, target, first))

    def _sent_as(self, bucket: Bucket) -> torch.dtype:
        # Loads of experts are counts, which no rounding may change.
        if self._communication_dtype is None or bucket.kind == LOADS:
            return self._like.dtype
        return self._communication_dtype

    def finish(self, targets: Sequence[Tensor]) -> None:
        """End the step's reductions, and sum over replicas. Communicates over the replica axes.

        targets: the slices of `grad_shard`, by bucket.
        """
        for reduction in self._running:
            reduction.finish()
        self._running.clear()
        # Once a step, as replicas hold sums over all micro-batches; all start before any is waited
        # for.
        pendings: list[tuple[Tensor, Pending]] = []
        for bucket, target in zip(self._layout.buckets, targets, strict=True):
            replica = self._reductions[bucket.axis].replica
            if replica.size > 1:
                sent = target.to(self._sent_as(bucket))
                pendings.append((target, start_all_reduce(sent, replica)))
        for target, pending in pendings:
            summed = pending.wait()
            if summed.data_ptr() != target.data_ptr():
                target.copy_(summed)


def live_elements(buckets: Sequence[Bucket], filled_long: Sequence[Bucket]) -> int:
    """Elements of full gradients that are live at most, for the plan.

    filled_long: those of `buckets` that hold a parameter that a micro-batch uses twice.
    """
    total = sum(bucket.size for bucket in filled_long)
    sizes_of_kinds: dict[str, list[int]] = {}
    for bucket in buckets:
        if bucket not in filled_long:
            sizes_of_kinds.setdefault(bucket.kind, []).append(bucket.size)
    for sizes in sizes_of_kinds.values():
        total += sum(sorted(sizes)[-LIVE:])
    return total


def _gaps(bucket: Bucket, pieces: Sequence[Piece]) -> list[Run]:
    """The runs of a bucket, counted from its start, that belong to no parameter."""
    gaps: list[Run] = []
    position = 0
    for piece in pieces:
        start = piece.start - bucket.start
        if start > position:
            gaps.append((position, start))
        position = start + piece.size
    if bucket.size > position:
        gaps.append((position, bucket.size))
    return gaps

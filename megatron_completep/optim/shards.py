"""Flat buffers of parameters, gradients and masters, sharded over the ranks of a copy (ZeRO-1).

Gradients of a bucket are reduce-scattered while backward goes on; an update rule, of which nothing
here knows, changes this rank's shard of the masters; the new parameters are all-gathered bucket by
bucket while the next forward runs. Gradients are sums over the tokens that count: the average is a
factor in the update.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import cached_property, partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from megatron_completep import kernels
from megatron_completep.config.schema import ParallelConfig
from megatron_completep.optim.layout import Layout, Segment, entry_of, lay_out
from megatron_completep.parallel.axis import Axis
from megatron_completep.parallel.collectives import (
    Pending,
    all_reduce,
    exchange,
    start_all_gather,
    start_all_reduce,
    start_reduce_scatter,
)
from megatron_completep.parallel.context import ParallelContext
from megatron_completep.parallel.gradients import GradientQueue, accumulate_tensor
from megatron_completep.parallel.parameter import Spec, spec_of


class _Reducing(NamedTuple):
    """A reduction under way, over whose ranks its result is summed next, and where that goes."""

    pending: Pending
    replica: Axis
    own: Tensor


class Shards:
    """Owns the flat buffers that the chunks' parameters become views of.

    chunks: this rank's model chunks, float32 or float64, already initialized; each has a `queue`.
    precision: what the parameters are stored and computed in; float32 masters are kept in the shard
    under bf16.

    Attributes:
        flat: the parameters of this rank, in `precision`.
        grad: the gradients of this rank, float32 or float64, laid out alike.
        master: this rank's shard of the parameters, float32 or float64; where nothing divides it,
            and nothing is rounded, it is `flat` itself.
        grad_shard: this rank's shard of the summed gradients; empty while nothing needs it.
        flat_shard: what a rule writes the rounded masters to; None where the masters themselves
            are gathered.
        started: buckets whose reduction has started in this step, in order.
    """

    def __init__(
        self,
        chunks: Sequence[nn.Module],
        context: ParallelContext,
        parallel: ParallelConfig,
        precision: torch.dtype = torch.float32,
    ):
        self.context = context
        self.chunks = list(chunks)
        self.queues = [getattr(chunk, "queue", None) or GradientQueue() for chunk in chunks]
        self.parameters = _in_backward_order(chunks)
        self.specs: dict[str, Spec] = {
            name: spec_of(p, name) for name, p in self.parameters.items()
        }
        self.reductions = context.reductions
        self.layout: Layout = lay_out(
            [entry_of(name, spec) for name, spec in self.specs.items()],
            {name: reduction.shard.size for name, reduction in self.reductions.items()},
            int(parallel.bucket_megabytes * 2**20 / 4),
        )
        self._own = {name: reduction.shard.rank for name, reduction in self.reductions.items()}
        self.segments: tuple[Segment, ...] = self.layout.segments(self._own)
        self.started: list[int] = []
        self._communication_dtype = torch.bfloat16 if parallel.gradient_dtype == "bf16" else None
        axes = {bucket.axis for bucket in self.layout.buckets}
        self._sharded = any(self.reductions[axis].shard.size > 1 for axis in axes)
        self._reduces = any(self.reductions[axis].size > 1 for axis in axes)
        self._make_buffers(precision)
        self._attach()

    # --- construction --------------------------------------------------------------------------

    def _make_buffers(self, precision: torch.dtype) -> None:
        """Move the parameters into one buffer, and keep this rank's shard of the masters."""
        layout, device = self.layout, self.context.device
        wide = torch.float64 if precision == torch.float64 else torch.float32
        whole = torch.zeros(layout.size, dtype=wide, device=device)
        self.grad = torch.zeros(layout.size, dtype=wide, device=device)
        for piece in layout.pieces:
            parameter = self.parameters[piece.name]
            whole[piece.start : piece.start + piece.size] = parameter.detach().flatten()
        self.flat = whole if precision == wide else whole.to(precision)
        self.master = self.own_shard(whole) if self._sharded else whole
        self.grad_shard = self.grad.new_empty(0) if self._sharded else self.grad
        if precision == wide:
            self.flat_shard: Tensor | None = None
        else:
            self.flat_shard = self.own_shard(self.flat) if self._sharded else self.flat
        for piece in layout.pieces:
            parameter, end = self.parameters[piece.name], piece.start + piece.size
            parameter.data = self.flat[piece.start : end].view(parameter.shape)
            parameter.main_grad = self.grad[piece.start : end].view(parameter.shape)  # type: ignore[attr-defined]

    def own_shard(self, flat: Tensor) -> Tensor:
        """A copy of what this rank owns of a buffer that is laid out like `flat`."""
        slices = self.layout.slices(self._own)
        return torch.cat([flat[start:stop] for start, stop in slices]) if slices else flat.clone()

    # Tables are made at the first step: construction never reads a tensor's value, and so runs on
    # fake tensors too.
    @cached_property
    def segment_table(self) -> Tensor:
        """int64 [n, 3]: start in the shard, length, and number of the parameter in `parameters`."""
        return self._table(self.segments)

    @cached_property
    def counted_table(self) -> Tensor:
        """The same for what counts on this rank: each element of the model counts once."""
        specs, context = self.specs, self.context
        return self._table([s for s in self.segments if specs[s.name].counts_on(s.name, context)])

    def _table(self, segments: Sequence[Segment]) -> Tensor:
        index = {name: i for i, name in enumerate(self.parameters)}
        rows = torch.tensor(
            [(s.shard_start, s.size, index[s.name]) for s in segments], dtype=torch.int64
        )
        return kernels.device_segments(rows.view(-1, 3), self.context.device)

    @cached_property
    def partial_segments(self) -> list[Segment]:
        """The segments whose gradient on this rank is a share of a sum over tensor ranks."""
        return [s for s in self.segments if self.specs[s.name].partial_gradient]

    @cached_property
    def tied_buckets(self) -> list[int]:
        """The buckets of parameters that both ends of the pipeline hold."""
        return [
            piece.bucket
            for piece in self.layout.pieces
            if self.specs[piece.name].tied_to is not None
        ]

    def _attach(self) -> None:
        """Be called for every completed gradient, and for those that autograd makes itself."""
        self._bucket_of = {
            self.parameters[piece.name]: piece.bucket for piece in self.layout.pieces
        }
        self._bucket_sizes = Counter(self._bucket_of.values())
        self._missing: Counter[int] = Counter()
        self._order: list[int] = []
        self._reducing: list[_Reducing] = []
        self._gathering: dict[int, Pending] = {}
        for chunk, queue in zip(self.chunks, self.queues, strict=True):
            queue.on_complete = self._on_complete
            for parameter in chunk.parameters():
                # By weak reference: Python's collector cannot see through a tensor's hooks, and
                # would keep all of this for ever.
                parameter.register_post_accumulate_grad_hook(
                    partial(adopt_grad, weakref.ref(queue))
                )
            if self._sharded:
                self._wait_in_forward(chunk)

    def _wait_in_forward(self, chunk: nn.Module) -> None:
        """Let each module wait, before it runs, for the buckets that bring its new parameters."""
        for module in chunk.modules():
            buckets = sorted({self._bucket_of[p] for p in module.parameters(recurse=False)})
            if buckets:
                module.register_forward_pre_hook(
                    lambda _module, _args, buckets=tuple(buckets): self._await_buckets(buckets)
                )

    def _await_buckets(self, buckets: Iterable[int]) -> None:
        for bucket in buckets:
            pending = self._gathering.pop(bucket, None)
            if pending is not None:
                pending.wait()

    # --- gradients -----------------------------------------------------------------------------

    def begin_step(self, micro_batches: int) -> None:
        """Expect the gradients of `micro_batches` forward-backward passes."""
        self._missing = Counter(self._bucket_sizes)
        self._order = self._starting_order()
        self.started = []
        if self._sharded:
            # Activations may have the memory until the first bucket is complete.
            self.grad_shard = self.grad.new_empty(0)
        for chunk, queue in zip(self.chunks, self.queues, strict=True):
            queue.begin_step(chunk.parameters(), micro_batches)

    def _starting_order(self) -> list[int]:
        """All buckets, in the order in which their reductions start.

        It does not depend on which contribution comes last: ranks that reduce together must start
        alike, and which gradient a rank completes first may depend on its data. First come the
        buckets that backward completes, as they lie; then those that hold a parameter that is not
        trained, whose gradient is complete only after backward. (A tied parameter has its place
        among the others: what waits for the end is the sum with the other end of the pipeline.)
        """
        not_trained = {
            bucket for parameter, bucket in self._bucket_of.items() if not parameter.requires_grad
        }
        return sorted(
            range(len(self.layout.buckets)), key=lambda bucket: (bucket in not_trained, bucket)
        )

    def _on_complete(self, parameter: Parameter) -> None:
        """Called when the last gradient of a parameter has arrived: start what may start now."""
        self._missing[self._bucket_of[parameter]] -= 1
        for bucket in self._order[len(self.started) :]:
            if self._missing[bucket]:
                break  # later ones wait for their turn, complete or not
            self.started.append(bucket)
            self._reduce(bucket)

    def _reduce(self, bucket: int) -> None:
        """Start the reduce-scatter of a complete bucket into this rank's shard."""
        if not self._reduces:
            return
        self.hold_grad_shard()
        place = self.layout.buckets[bucket]
        shard, replica = self.reductions[place.axis]
        gradients, own = (
            self.grad[place.start : place.stop],
            self.grad_shard[slice(*place.in_shard)],
        )
        if self._communication_dtype is None:
            pending = start_reduce_scatter(gradients, shard, own)
        else:
            pending = start_reduce_scatter(gradients.to(self._communication_dtype), shard)
        self._reducing.append(_Reducing(pending, replica, own))

    def hold_grad_shard(self) -> None:
        """Make the buffer of reduced gradients where there is none yet in this step."""
        if self.grad_shard.numel() == 0:
            self.grad_shard = torch.zeros_like(self.master)

    def finish_gradients(self) -> None:
        """Wait until `grad_shard` holds this rank's part of the whole gradient.

        That is the sum over data ranks, and over tensor ranks and pipeline ends where it is due.
        """
        for queue in self.queues:
            queue.finish_step()
        # All sums across replicas start before the first is waited for.
        across = []
        for scattered in self._reducing:
            pending = start_all_reduce(scattered.pending.wait(), scattered.replica)
            across.append(scattered._replace(pending=pending))
        for summed in across:
            reduced = summed.pending.wait()
            if reduced.data_ptr() != summed.own.data_ptr():
                summed.own.copy_(reduced)
        self._reducing.clear()
        for bucket in self.tied_buckets:
            self._add_other_end(bucket)
        if self.partial_segments:
            self._sum_partial_gradients()

    def _add_other_end(self, bucket: int) -> None:
        """Exchange the gradient of a tied embedding, so that first and last stage hold the sum.

        This is the last of all sums: a + b is b + a, so both ends hold the same bits, whatever
        order each end's data ranks are summed in.
        """
        pipeline, own = (
            self.context.pipeline,
            self.grad_shard[slice(*self.layout.buckets[bucket].in_shard)],
        )
        own.add_(exchange(own, pipeline, pipeline.size - 1 - pipeline.rank))

    def _sum_partial_gradients(self) -> None:
        """Sum what tensor ranks hold shares of, such as norms under sequence parallelism."""
        segments = self.partial_segments
        views = [self.grad_shard[s.shard_start : s.shard_start + s.size] for s in segments]
        summed = all_reduce(torch.cat(views), self.context.tensor)
        for view, total in zip(views, summed.split([s.size for s in segments]), strict=True):
            view.copy_(total)

    def sum_of_squares(self) -> Tensor:
        """Of the gradients that count on this rank, a float64 scalar.

        Over the whole mesh these add up to the squared norm.
        """
        return kernels.sum_of_squares(self.grad_shard, self.counted_table)

    # --- parameters ----------------------------------------------------------------------------

    def start_gathering(self) -> None:
        """Send the new parameters round in the order in which the next forward needs them."""
        if not self._sharded:
            return
        updated = self.master if self.flat_shard is None else self.flat_shard
        for number, bucket in reversed(list(enumerate(self.layout.buckets))):
            own, whole = updated[slice(*bucket.in_shard)], self.flat[bucket.start : bucket.stop]
            self._gathering[number] = start_all_gather(
                own, self.reductions[bucket.axis].shard, whole
            )

    def adopt_masters(self) -> None:
        """Let every parameter follow the masters, which were replaced by those of a checkpoint.

        Communicates over the shard axis.
        """
        if self.flat_shard is not None:
            self.flat_shard.copy_(self.master)
        self.start_gathering()
        self.wait_for_parameters()

    def wait_for_parameters(self) -> None:
        """Every parameter is the new one from here on."""
        self._await_buckets(list(self._gathering))


def _in_backward_order(chunks: Sequence[nn.Module]) -> dict[str, Parameter]:
    """Name -> parameter, roughly in the order in which backward completes their gradients."""
    return {
        name: p
        for chunk in reversed(chunks)
        for name, p in reversed(list(chunk.named_parameters()))
    }


def adopt_grad(owner: weakref.ref[GradientQueue], parameter: Parameter) -> None:
    """Hand a gradient that autograd made itself, for a module that knows no queue, to the queue.

    The owner is held weakly: the garbage collector cannot see a cycle that runs through a tensor's
    hooks, and would never free the optimizer.
    """
    gradient, parameter.grad = parameter.grad, None
    queue = owner()
    if gradient is not None and queue is not None:
        queue.push(parameter, accumulate_tensor(gradient))

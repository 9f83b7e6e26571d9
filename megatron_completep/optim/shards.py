"""Flat buffers of parameters, gradients and masters, sharded over data-parallel ranks (ZeRO-1).

The buffers are divided into buckets (layout.py); one collective reduces, or gathers, one bucket. A
step goes through the following stages. Nothing here knows the update rule.

1. `begin_step` fixes the order in which the reductions of the buckets will start. It is the same on
   all ranks that reduce together.
2. During backward, `_on_complete` is called when the last gradient of a parameter has arrived. The
   reduce-scatter of a bucket starts when all of its gradients have arrived and the reductions of
   all buckets before it in the order have started. Nobody waits for a reduction here, but for
   that of an older bucket where gradients are sent in another type: copies would pile up.
3. After backward, `finish_gradients` completes the parameters that got no gradient, which starts
   the reductions that are left. It waits for every reduction, in the order in which they started,
   and adds what other ranks hold of shared parameters.
4. The update rule changes this rank's shard of the masters.
5. `start_gathering` starts the all-gathers of the new parameters, in the order in which forward
   needs them. A module waits, before it runs, for the buckets of its own parameters alone.

To wait means that what is launched next on the current stream of a GPU waits; the host goes on. On
a CPU the host waits.

Gradients are sums over the tokens that count. The update divides by the number of tokens.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from megatron_completep import kernels
from megatron_completep.config.schema import ParallelConfig
from megatron_completep.optim.layout import (
    Bucket,
    Layout,
    Piece,
    Segment,
    elements_of_bucket,
    entry_of,
    lay_out,
)
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

Hook = Callable[[Parameter], None]


# Buckets whose reduce-scatter is under way, and buckets behind them whose sum over replicas is,
# where gradients are sent in another type than they are accumulated in.
OVERLAPPED = 2


@dataclass
class _RunningReduction:
    """The reduction of one bucket, from its start until its sum lies in `grad_shard`."""

    pending: Pending  # first the reduce-scatter over the shard axis, then the sum over replicas
    replica: Axis  # the ranks that hold the same shard
    target: Tensor  # the bucket's slice of `grad_shard`
    scattered: bool = False  # whether the sum over replicas has started

    def sum_over_replicas(self) -> None:
        """Wait for the reduce-scatter, and start the sum over replicas behind it, once."""
        if not self.scattered:
            self.pending = start_all_reduce(self.pending.wait(), self.replica)
            self.scattered = True

    def finish(self) -> None:
        """Wait until the sum lies in its place."""
        self.sum_over_replicas()
        gradients = self.pending.wait()
        # The sum lies elsewhere where it was sent in another type, or nothing was scattered.
        if gradients.data_ptr() != self.target.data_ptr():
            self.target.copy_(gradients)


class Shards:
    """Owns the flat buffers that the chunks' parameters become views of.

    Args:
        chunks: this rank's model chunks, float32 or float64, initialized. A chunk that has a
            `queue` hands its gradients to it; for one that has none, a queue is made.
        context: the mesh of ranks.
        parallel: the size of a bucket and the type in which gradients are communicated.
        precision: what parameters are stored and computed in. Under bf16 the shard keeps masters in
            float32.

    Attributes:
        flat: the parameters of this rank, in `precision`.
        grad: the gradients of this rank, float32 or float64, laid out as `flat`.
        master: this rank's shard of the parameters, float32 or float64. It is `flat` itself where
            nothing is sharded and nothing is rounded.
        grad_shard: this rank's shard of the summed gradients; empty until the first reduction of a
            step starts.
        flat_shard: where a rule writes the rounded masters, from which they are gathered; None
            where the masters themselves are gathered.
        started: the buckets whose reductions have started in this step, in order.
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
        self.queues: list[GradientQueue] = []
        for chunk in chunks:
            self.queues.append(getattr(chunk, "queue", None) or GradientQueue())
        self.parameters = _in_backward_order(chunks)
        self.specs: dict[str, Spec] = {}
        for name, parameter in self.parameters.items():
            self.specs[name] = spec_of(parameter, name)

        self.reductions = context.reductions
        self.layout = self._lay_out(parallel.bucket_megabytes)
        self._shard_ranks = {axis: r.shard.rank for axis, r in self.reductions.items()}
        self.segments: tuple[Segment, ...] = self.layout.segments(self._shard_ranks)

        # An axis that no parameter is summed over does not count.
        axes = {bucket.axis for bucket in self.layout.buckets}
        self._sharded = any(self.reductions[axis].shard.size > 1 for axis in axes)
        self._reduces = any(self.reductions[axis].size > 1 for axis in axes)
        self._communication_dtype = torch.bfloat16 if parallel.gradient_dtype == "bf16" else None
        self._make_buffers(precision)

        self.started: list[int] = []
        self._start_order: list[int] = []
        self._missing: Counter[int] = Counter()  # bucket -> parameters without their last gradient
        self._running: list[_RunningReduction] = []
        self._gathers: dict[int, Pending] = {}  # bucket -> the all-gather of its new parameters
        self._attach()

    # --- construction --------------------------------------------------------------------------

    def _lay_out(self, bucket_megabytes: float) -> Layout:
        entries = [entry_of(name, spec) for name, spec in self.specs.items()]
        shards = {axis: reduction.shard.size for axis, reduction in self.reductions.items()}
        most_ranks = max(reduction.size for reduction in self.reductions.values())
        return lay_out(entries, shards, elements_of_bucket(bucket_megabytes, most_ranks))

    def _make_buffers(self, precision: torch.dtype) -> None:
        """Move the parameters into one buffer, and keep this rank's shard of the masters."""
        device = self.context.device
        master_dtype = torch.float64 if precision == torch.float64 else torch.float32
        masters = torch.zeros(self.layout.size, dtype=master_dtype, device=device)
        for placement in self.layout.pieces:
            parameter = self.parameters[placement.name]
            _view(masters, placement, parameter.shape).copy_(parameter.detach())

        self.grad = torch.zeros(self.layout.size, dtype=master_dtype, device=device)
        rounded = precision != master_dtype
        self.flat = masters.to(precision) if rounded else masters
        # Where nothing is sharded, the buffers serve as their own shards.
        self.master = self.own_shard(masters) if self._sharded else masters
        self.grad_shard = self.grad.new_empty(0) if self._sharded else self.grad
        self.flat_shard: Tensor | None = None
        if rounded:
            self.flat_shard = self.own_shard(self.flat) if self._sharded else self.flat

        for placement in self.layout.pieces:
            parameter = self.parameters[placement.name]
            parameter.data = _view(self.flat, placement, parameter.shape)
            main_grad = _view(self.grad, placement, parameter.shape)
            parameter.main_grad = main_grad  # type: ignore[attr-defined]

    def own_shard(self, flat: Tensor) -> Tensor:
        """A copy of this rank's shard of a buffer that is laid out as `flat`."""
        slices = self.layout.slices(self._shard_ranks)
        if not slices:  # a rank without parameters
            return flat.clone()
        return torch.cat([flat[start:stop] for start, stop in slices])

    # The tables are made at the first step: construction never reads the value of a tensor, so that
    # it runs on fake tensors too.
    @cached_property
    def segment_table(self) -> Tensor:
        """int64 [n, 3]: start in the shard, length, and number of the parameter in `parameters`.

        On a GPU long segments are cut, so that every program of a kernel has about the same work.
        """
        return self._table(self.segments)

    @cached_property
    def counted_segments(self) -> tuple[Segment, ...]:
        """The segments that count on this rank.

        Over the whole mesh each element of the model counts once, although several ranks may hold
        it.
        """
        counted = []
        for segment in self.segments:
            if self.specs[segment.name].counts_on(segment.name, self.context):
                counted.append(segment)
        return tuple(counted)

    @cached_property
    def counted_table(self) -> Tensor:
        """`segment_table` of the segments that count on this rank.

        It is for kernels: a walk over its rows on the host would launch something for every 1024
        elements of a GPU's shard. `counted_segments` is for the host.
        """
        return self._table(self.counted_segments)

    @cached_property
    def norm_table(self) -> Tensor:
        """`counted_table` with segments that follow one another joined: one row a run of them.

        The norm does not ask which parameter an element belongs to, and on a CPU every row costs
        a dozen operators. What lies between two segments of a run is padding, which is zero.
        """
        runs: list[Segment] = []
        previous_counts = False
        for segment in self.segments:
            counts = self.specs[segment.name].counts_on(segment.name, self.context)
            if counts and previous_counts:
                size = segment.shard_start + segment.size - runs[-1].shard_start
                runs[-1] = replace(runs[-1], size=size)
            elif counts:
                runs.append(segment)
            previous_counts = counts
        return self._table(runs)

    def _table(self, segments: Sequence[Segment]) -> Tensor:
        numbers = {name: number for number, name in enumerate(self.parameters)}
        rows = [(s.shard_start, s.size, numbers[s.name]) for s in segments]
        table = torch.tensor(rows, dtype=torch.int64).view(-1, 3)
        return kernels.device_segments(table, self.context.device)

    @cached_property
    def partial_segments(self) -> list[Segment]:
        """The segments whose gradient on this rank is a share of a sum over tensor ranks."""
        return [s for s in self.segments if self.specs[s.name].partial_gradient]

    @cached_property
    def tied_buckets(self) -> list[int]:
        """The buckets of parameters that both ends of the pipeline hold."""
        tied = [p for p in self.layout.pieces if self.specs[p.name].tied_to is not None]
        return [placement.bucket for placement in tied]

    def _attach(self) -> None:
        """Register what is called for complete gradients, and before a module runs."""
        self._bucket_of: dict[Parameter, int] = {}
        for placement in self.layout.pieces:
            self._bucket_of[self.parameters[placement.name]] = placement.bucket
        self._bucket_sizes = Counter(self._bucket_of.values())  # in parameters

        # Kept, because a walk over all modules costs host time in every step.
        self._of_chunks = [list(chunk.parameters()) for chunk in self.chunks]
        for chunk, parameters, queue in zip(self.chunks, self._of_chunks, self.queues, strict=True):
            queue.on_complete = self._on_complete
            for parameter in parameters:
                # A weak reference, as the garbage collector cannot see a cycle that runs through
                # the hooks of a tensor, and would never free the optimizer.
                adopt: Hook = partial(adopt_grad, weakref.ref(queue))
                register: Callable[[Hook], object] = parameter.register_post_accumulate_grad_hook
                register(adopt)
            if self._sharded:
                self._wait_in_forward(chunk)

    def _wait_in_forward(self, chunk: nn.Module) -> None:
        """Let each module wait, before it runs, for the buckets of its own parameters."""
        for module in chunk.modules():
            buckets = sorted({self._bucket_of[p] for p in module.parameters(recurse=False)})
            if buckets:
                module.register_forward_pre_hook(
                    lambda _module, _args, buckets=tuple(buckets): self._await_buckets(buckets)
                )

    # --- gradients -----------------------------------------------------------------------------

    def begin_step(self, micro_batches: int) -> None:
        """Expect the gradients of `micro_batches` forward-backward passes."""
        self._missing = Counter(self._bucket_sizes)
        self._start_order = self._starting_order()
        self.started = []
        if self._sharded:
            # Activations may use this memory until the first reduction starts.
            self.grad_shard = self.grad.new_empty(0)
        for parameters, queue in zip(self._of_chunks, self.queues, strict=True):
            queue.begin_step(parameters, micro_batches)

    def _starting_order(self) -> list[int]:
        """The numbers of all buckets, in the order in which their reductions start.

        Ranks that reduce together must start their collectives in the same order, or they hang.
        Which gradient a rank completes first may depend on its data, so the order must not. The
        buckets that backward completes come first, as they lie in the buffer. Those with a
        parameter that is not trained come last, as its gradient is complete only after backward.

        A tied parameter needs no place at the end: what is added after backward is the gradient of
        the other end of the pipeline, see `_add_other_end`.
        """
        completed_late = set()
        for parameter, bucket in self._bucket_of.items():
            if not parameter.requires_grad:
                completed_late.add(bucket)
        numbers = range(len(self.layout.buckets))
        completed_by_backward = [bucket for bucket in numbers if bucket not in completed_late]
        return completed_by_backward + sorted(completed_late)

    def _on_complete(self, parameter: Parameter) -> None:
        """Called when the last gradient of a parameter has arrived: start what may start now."""
        self._missing[self._bucket_of[parameter]] -= 1
        not_started = self._start_order[len(self.started) :]
        # Several may start at once, where this gradient was the one that complete buckets behind
        # it waited for.
        for bucket in not_started:
            if self._missing[bucket]:
                break
            self.started.append(bucket)
            self._start_reduction(bucket)

    def _start_reduction(self, number: int) -> None:
        """Start the reduce-scatter of a complete bucket into this rank's shard."""
        if not self._reduces:
            return
        self.hold_grad_shard()
        bucket = self.layout.buckets[number]
        shard, replica = self.reductions[bucket.axis]
        gradients = self.grad[bucket.start : bucket.stop]
        target = _slice(self.grad_shard, bucket)
        if self._communication_dtype is None:
            pending = start_reduce_scatter(gradients, shard, target)
        else:
            # The sum arrives in the type that is sent, and is copied to `target` later.
            self._free_older_copies()
            pending = start_reduce_scatter(gradients.to(self._communication_dtype), shard)
        self._running.append(_RunningReduction(pending, replica, target))

    def _free_older_copies(self) -> None:
        """Wait for older buckets, whose copies in the type that is sent live until then.

        So a rank holds four copies at most, and not one of every bucket when backward ends. All
        ranks that reduce together do this at the same buckets, as they start them in one order.
        """
        if len(self._running) >= OVERLAPPED:
            self._running[-OVERLAPPED].sum_over_replicas()
        if len(self._running) >= 2 * OVERLAPPED:
            self._running.pop(0).finish()

    def hold_grad_shard(self) -> None:
        """Allocate the buffer of reduced gradients where this step has none yet."""
        if self.grad_shard.numel() == 0:
            self.grad_shard = torch.zeros_like(self.master)

    def finish_gradients(self) -> None:
        """Wait until `grad_shard` holds this rank's shard of the summed gradients.

        The sum is over data ranks, and for some parameters over tensor ranks or both ends of the
        pipeline. Communicates over the shard, replica, tensor and pipeline axes.
        """
        # Completes parameters without a gradient: after this every reduction has started.
        for queue in self.queues:
            queue.finish_step()

        # Every sum over replicas starts before the first of them is waited for.
        for reduction in self._running:
            reduction.sum_over_replicas()
        for reduction in self._running:
            reduction.finish()
        self._running.clear()

        for bucket in self.tied_buckets:
            self._add_other_end(bucket)
        if self.partial_segments:
            self._sum_partial_gradients()

    def _add_other_end(self, bucket: int) -> None:
        """Exchange the gradient of a tied embedding, so that first and last stage hold the sum.

        This is the last of all sums: a + b is b + a, so both ends hold the same bits, in whatever
        order the data ranks of each end were summed.
        """
        pipeline = self.context.pipeline
        other_end = pipeline.size - 1 - pipeline.rank
        gradients = _slice(self.grad_shard, self.layout.buckets[bucket])
        gradients.add_(exchange(gradients, pipeline, other_end))

    def _sum_partial_gradients(self) -> None:
        """Sum what tensor ranks hold shares of, such as norms under sequence parallelism."""
        segments = self.partial_segments
        views = [self.grad_shard[s.shard_start : s.shard_start + s.size] for s in segments]
        # One all-reduce for all of them, as most are single vectors.
        summed = all_reduce(torch.cat(views), self.context.tensor)
        sizes = [segment.size for segment in segments]
        for view, total in zip(views, torch.split(summed, sizes), strict=True):
            view.copy_(total)

    def sum_of_squares(self) -> Tensor:
        """The squares of the gradients that count on this rank, summed: a float64 scalar.

        Over the whole mesh these add up to the square of the gradient's norm.
        """
        return kernels.sum_of_squares(self.grad_shard, self.norm_table)

    # --- parameters ----------------------------------------------------------------------------

    def start_gathering(self) -> None:
        """Start all-gathers of the new parameters, in the order in which forward needs them.

        Communicates over the shard axis of each bucket.
        """
        if not self._sharded:
            return
        updated = self.master if self.flat_shard is None else self.flat_shard
        # Buckets lie in backward order, so the last one holds what forward needs first.
        for number in reversed(range(len(self.layout.buckets))):
            bucket = self.layout.buckets[number]
            shard = self.reductions[bucket.axis].shard
            parameters = self.flat[bucket.start : bucket.stop]
            # An axis with one shard gathers nothing, but beside a sharded one the updated shard is
            # a copy.
            if shard.size == 1:
                parameters.copy_(_slice(updated, bucket))
                continue
            self._gathers[number] = start_all_gather(_slice(updated, bucket), shard, parameters)

    def _await_buckets(self, buckets: Iterable[int]) -> None:
        """Wait for the all-gathers of these buckets, where they have not been waited for yet."""
        for bucket in buckets:
            pending = self._gathers.pop(bucket, None)
            if pending is not None:
                pending.wait()

    def adopt_masters(self) -> None:
        """Set all parameters from the masters, which were replaced by those of a checkpoint.

        Communicates over the shard axis.
        """
        if self.flat_shard is not None:
            self.flat_shard.copy_(self.master)
        self.start_gathering()
        self.wait_for_parameters()

    def wait_for_parameters(self) -> None:
        """Wait for the all-gathers of all buckets that no module has waited for."""
        self._await_buckets(list(self._gathers))


def _view(flat: Tensor, placement: Piece, shape: torch.Size) -> Tensor:
    """One parameter's elements of a buffer that is laid out as `Shards.flat`."""
    return flat[placement.start : placement.start + placement.size].view(shape)


def _slice(shard: Tensor, bucket: Bucket) -> Tensor:
    """One bucket's elements of a shard."""
    start, stop = bucket.in_shard
    return shard[start:stop]


def _in_backward_order(chunks: Sequence[nn.Module]) -> dict[str, Parameter]:
    """Name -> parameter, roughly in the order in which backward completes their gradients."""
    parameters = {}
    for chunk in reversed(chunks):
        for name, parameter in reversed(list(chunk.named_parameters())):
            parameters[name] = parameter
    return parameters


def adopt_grad(owner: weakref.ref[GradientQueue], parameter: Parameter) -> None:
    """Push a gradient that autograd made itself, for a module that knows no queue, to the queue.

    Called after autograd has accumulated into `parameter.grad`. The queue is held weakly, see
    `Shards._attach`.
    """
    gradient = parameter.grad
    parameter.grad = None
    queue = owner()
    if gradient is not None and queue is not None:
        queue.push(parameter, accumulate_tensor(gradient))

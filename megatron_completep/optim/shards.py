"""Flat buffers of parameters, gradients and masters, sharded over data-parallel ranks (ZeRO-1, 2).

The buffers are divided into buckets (layout.py); one collective reduces, or gathers, one bucket. A
step goes through the following stages. None of them depends on the update rule.

1. `begin_step` fixes the order in which the reductions of the buckets will start. It is the same on
   all ranks that reduce together.
2. During backward, `_on_complete` is called when the last gradient of a parameter has arrived. The
   reduce-scatter of a bucket starts when all of its gradients have arrived and the reductions of
   all buckets before it in the order have started. Backward does not wait for reductions, unless
   gradients are communicated in bf16: then it waits for older buckets, to free their bf16 copies.
3. After backward, `finish_gradients` completes the parameters that got no gradient, which starts
   the remaining reductions. It waits for every reduction, in the order in which they started, and
   adds the contributions of other tensor and pipeline ranks to parameters they share.
4. The update rule changes this rank's shard of the masters.
5. `start_gathering` starts the all-gathers of the new parameters, in the order in which forward
   needs them. Before a module runs it waits only for the buckets that hold its own parameters.

With `parallel.sharding: gradients` stages 1 and 2 belong to one micro-batch, `next_micro_batch`
begins the next one, and gradients have no buffer of their own but those of single buckets
(gradient_buckets.py).

With an `UpdateStream` stages 4 and 5 are one, `start_updates`: each bucket is updated and gathered
on its own, in that same order, while the next forward pass begins.

On a GPU, waiting means that the current stream waits and the host continues; on a CPU the host
waits.

Gradients are sums over the tokens whose loss is counted. The update divides by their number.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import replace
from functools import cached_property, partial

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from megatron_completep import kernels
from megatron_completep.config.schema import ParallelConfig
from megatron_completep.optim.gradient_buckets import BucketGradients
from megatron_completep.optim.layout import (
    Bucket,
    Layout,
    Piece,
    Segment,
    cut_at_parts,
    elements_of_bucket,
    entry_of,
    lay_out,
)
from megatron_completep.optim.reduction import WholeGradients
from megatron_completep.optim.update_stream import Arrival, UpdateStream
from megatron_completep.parallel.collectives import (
    Pending,
    all_reduce,
    exchange,
    start_all_gather,
)
from megatron_completep.parallel.context import ParallelContext
from megatron_completep.parallel.gradients import GradientQueue, push_autograd_grad
from megatron_completep.parallel.parameter import Spec, spec_of

Hook = Callable[[Parameter], None]
KindOf = Callable[[Spec], str]


def one_kind(_: Spec) -> str:
    """For an update rule that does not tell parameters apart."""
    return ""


class Shards:
    """Owns the flat buffers; the parameters of the chunks become views into them.

    Args:
        chunks: this rank's model chunks, float32 or float64, initialized. Gradients go to the
            chunk's own `queue` if it has one, else to a new GradientQueue.
        context: the mesh of ranks.
        parallel: the size of a bucket, the dtype in which gradients are communicated, and whether
            whole gradients exist (`sharding`).
        precision: dtype of the stored parameters and of the computation. Under bf16 the shard keeps
            masters in float32.
        kind_of: the kind of a parameter, see `layout.Entry`.
        updates: where updates run under the next forward pass; None: they run at once.

    Attributes:
        flat: the parameters of this rank, in `precision`.
        gradients: what holds this rank's gradients until they are reduced. `WholeGradients` has
            them all in `grad`, float32 or float64, laid out as `flat`.
        master: this rank's shard of the parameters, float32 or float64. It aliases `flat` if there
            is one shard and `precision` is the master dtype.
        grad_shard: this rank's shard of the summed gradients; empty until the first reduction of a
            step starts.
        flat_shard: buffer into which the update rule writes the rounded parameters before the
            all-gather; None if masters are gathered directly.
        started: the buckets whose reductions have started in this step, in order.
        on_new_parameters: called when all of this rank's shard has new values.
    """

    def __init__(
        self,
        chunks: Sequence[nn.Module],
        context: ParallelContext,
        parallel: ParallelConfig,
        precision: torch.dtype = torch.float32,
        kind_of: KindOf = one_kind,
        updates: UpdateStream | None = None,
    ):
        self.context = context
        self.kind_of = kind_of
        self.updates = updates
        self.chunks = list(chunks)
        self.queues: list[GradientQueue] = []
        for chunk in chunks:
            self.queues.append(getattr(chunk, "queue", None) or GradientQueue())
        self.parameters = _in_backward_order(chunks)
        self.specs: dict[str, Spec] = {}
        for name, parameter in self.parameters.items():
            self.specs[name] = spec_of(parameter, name)

        summed_over = sorted({"gradient", *(spec.summed_over for spec in self.specs.values())})
        self.reductions = {axis: context.reduction(axis) for axis in summed_over}
        self.layout = self._lay_out(parallel)
        self._shard_ranks = {axis: r.shard.rank for axis, r in self.reductions.items()}
        self.segments = self.layout.segments(self._shard_ranks)
        axes = {bucket.axis for bucket in self.layout.buckets}  # over which anything is reduced
        self._sharded = any(self.reductions[axis].shard.size > 1 for axis in axes)
        self._reduces = any(self.reductions[axis].size > 1 for axis in axes)
        self._make_buffers(precision)
        self.gradients = self._hold_gradients(parallel)
        self.grad_shard = self.master.new_empty(0)
        # If nothing is sharded, the gradients serve as their own shard.
        if not self._sharded and isinstance(self.gradients, WholeGradients):
            self.grad_shard = self.gradients.grad

        self.on_new_parameters: list[Callable[[], None]] = []
        self.started: list[int] = []
        self._start_order: list[int] = []
        self._missing: Counter[int] = Counter()  # bucket -> parameters without their last gradient
        self._arriving: dict[int, Arrival] = {}  # bucket -> its new parameters, under way
        self._sent: set[int] = set()  # buckets of this step whose gathers have started
        self._attach()

    # --- construction --------------------------------------------------------------------------

    def _lay_out(self, parallel: ParallelConfig) -> Layout:
        entries = []
        for name, spec in self.specs.items():
            entries.append(entry_of(name, spec, self.kind_of(spec)))
        shards = {axis: reduction.shard.size for axis, reduction in self.reductions.items()}
        most_ranks = max(reduction.size for reduction in self.reductions.values())
        return lay_out(entries, shards, elements_of_bucket(parallel.bucket_megabytes, most_ranks))

    def _make_buffers(self, precision: torch.dtype) -> None:
        """Move the parameters into one buffer, and keep this rank's shard of the masters."""
        master_dtype = torch.float64 if precision == torch.float64 else torch.float32
        masters = torch.zeros(self.layout.size, dtype=master_dtype, device=self.context.device)
        for piece in self.layout.pieces:
            parameter = self.parameters[piece.name]
            _view(masters, piece, parameter.shape).copy_(parameter.detach())

        rounded = precision != master_dtype
        self.flat = masters.to(precision) if rounded else masters
        # If nothing is sharded, the buffers serve as their own shards.
        self.master = self.own_shard(masters) if self._sharded else masters
        self.flat_shard: Tensor | None = None
        if rounded:
            self.flat_shard = self.own_shard(self.flat) if self._sharded else self.flat

        for piece in self.layout.pieces:
            parameter = self.parameters[piece.name]
            parameter.data = _view(self.flat, piece, parameter.shape)

    def _hold_gradients(self, parallel: ParallelConfig) -> WholeGradients | BucketGradients:
        # With one shard there is nothing to share: the reduced gradients are the gradients.
        by_bucket = parallel.sharding == "gradients" and self._sharded
        make_gradients = BucketGradients if by_bucket else WholeGradients
        sent_as = torch.bfloat16 if parallel.gradient_dtype == "bf16" else None
        return make_gradients(self.parameters, self.layout, self.reductions, self.master, sent_as)

    @property
    def grad(self) -> Tensor:
        """The whole gradients of this rank; only if they are not sharded."""
        assert isinstance(self.gradients, WholeGradients)
        return self.gradients.grad

    def own_shard(self, flat: Tensor) -> Tensor:
        """A copy of this rank's shard of a buffer that is laid out as `flat`."""
        slices = self.layout.slices(self._shard_ranks)
        if not slices:
            # torch.cat refuses an empty list; the buffer of a rank without parameters is empty too.
            return flat.clone()
        return torch.cat([flat[start:stop] for start, stop in slices])

    @cached_property
    def part_segments(self) -> tuple[Segment, ...]:
        """`segments`, cut where one logical part ends and the next one begins."""
        return cut_at_parts(self.segments, self.specs)

    @cached_property
    def counted_segments(self) -> tuple[Segment, ...]:
        """The segments of parameters for which this rank is primary.

        A sum over the mesh then counts each element once, although several ranks may hold it.
        """
        primary_segments = []
        for segment in self.segments:
            if self.specs[segment.name].is_primary(segment.name, self.context):
                primary_segments.append(segment)
        return tuple(primary_segments)

    @cached_property
    def counted_parts(self) -> tuple[Segment, ...]:
        """`counted_segments`, cut at logical parts."""
        return cut_at_parts(self.counted_segments, self.specs)

    # The tables are built lazily: construction never reads tensor values, so fake tensors work.
    @cached_property
    def counted_table(self) -> Tensor:
        """int64 [n, 3]: start in the shard, length, and number of the parameter in `parameters`.

        It has the parameters for which this rank is primary. On a GPU long segments are split, so
        that all programs of a kernel have about equal work.

        Only kernels should use it: on a GPU its segments are split into short ones, and a loop over
        them on the host would launch an operator for each. `counted_segments` is for the host.
        """
        return self._table(self.counted_segments)

    @cached_property
    def grad_norm_table(self) -> Tensor:
        """`counted_table` with consecutive segments joined: one row per run of them.

        The norm does not ask which parameter an element belongs to, and on a CPU every row costs
        a dozen operators. Between two segments of a run there is only padding, which is zero.
        """
        runs: list[Segment] = []
        previous_counts = False
        for segment in self.segments:
            counts = self.specs[segment.name].is_primary(segment.name, self.context)
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
        """The segments whose gradient on this rank is a partial sum over tensor ranks."""
        return [s for s in self.segments if self.specs[s.name].partial_gradient]

    @cached_property
    def tied_buckets(self) -> list[int]:
        """The buckets of parameters that both ends of the pipeline hold."""
        tied = [p for p in self.layout.pieces if self.specs[p.name].tied_to is not None]
        return [piece.bucket for piece in tied]

    def _attach(self) -> None:
        """Register the callbacks for completed gradients and the pre-forward hooks."""
        self._bucket_of: dict[Parameter, int] = {}
        for piece in self.layout.pieces:
            self._bucket_of[self.parameters[piece.name]] = piece.bucket
        self._bucket_sizes = Counter(self._bucket_of.values())  # in parameters

        # Kept, because a walk over all modules costs host time in every step.
        self._parameters_of_chunks = [list(chunk.parameters()) for chunk in self.chunks]
        for chunk, parameters, queue in zip(
            self.chunks, self._parameters_of_chunks, self.queues, strict=True
        ):
            queue.on_complete = self._on_complete
            if isinstance(self.gradients, BucketGradients):
                queue.allocate = self.gradients.allocate
            for parameter in parameters:
                # A weak reference, as the garbage collector cannot see a cycle that runs through
                # the hooks of a tensor, and would never free the optimizer.
                hook: Hook = partial(push_autograd_grad, weakref.ref(queue))
                parameter.register_post_accumulate_grad_hook(hook)
            if self._sharded or self.updates is not None:
                self._wait_in_forward(chunk)

    def _wait_in_forward(self, chunk: nn.Module) -> None:
        """Make each module wait, before it runs, for the buckets of its own parameters, and of its
        `modules_read`, if it has that attribute.
        """
        for module in chunk.modules():
            parameters = list(module.parameters(recurse=False))
            # A fused operation reads the parameters of modules that are then never called.
            for read in getattr(module, "modules_read", ()):
                parameters += read.parameters(recurse=False)
            buckets = sorted({self._bucket_of[p] for p in parameters})
            # self may be strong: hooks of a module lie in a dict, which the collector sees.
            if buckets:
                hook = partial(self._await_before_forward, tuple(buckets))
                module.register_forward_pre_hook(hook)

    # --- gradients -----------------------------------------------------------------------------

    def begin_step(self, micro_batches: int) -> None:
        """Expect the gradients of `micro_batches` forward-backward passes.

        If gradients are sharded, `next_micro_batch` must be called between two of them.
        """
        self._start_order = self._starting_order()
        # Activations may use this memory until the first reduction starts. Updates that are under
        # way still read it: then it is freed behind the last of them.
        if not self._arriving or self.updates is None:
            self._free_grad_shard()
        if isinstance(self.gradients, BucketGradients):
            self.gradients.begin_step()
            micro_batches = 1
        self._expect(micro_batches)

    def _expect(self, micro_batches: int) -> None:
        """Expect the gradients that the next reductions are to hold."""
        self._missing = Counter(self._bucket_sizes)
        self.started = []
        for parameters, queue in zip(self._parameters_of_chunks, self.queues, strict=True):
            queue.begin_step(parameters, micro_batches)

    def next_micro_batch(self) -> None:
        """Begin the next micro-batch of a step whose gradients are sharded; else nothing.

        What got no gradient in the micro-batch before is reduced as zeros, so that every rank makes
        the same calls.
        """
        if isinstance(self.gradients, BucketGradients):
            for queue in self.queues:
                queue.finish_step()
            self._expect(1)

    def _starting_order(self) -> list[int]:
        """The numbers of all buckets, in the order in which their reductions start.

        Ranks that reduce together must start their collectives in the same order, or they hang.
        Gradients may complete in a data-dependent order, so the reductions must start in a fixed
        one. The buckets that backward completes come first, in the order of the buffer. Those with
        a parameter that is not trained come last, as its gradient is complete only after backward.

        Tied parameters need not come last: their own gradients complete in backward, and the other
        stage's contribution is added separately after it (`_add_other_end`).
        """
        completed_late = set()
        for parameter, bucket in self._bucket_of.items():
            if not parameter.requires_grad:
                completed_late.add(bucket)
        numbers = range(len(self.layout.buckets))
        completed_by_backward = [bucket for bucket in numbers if bucket not in completed_late]
        return completed_by_backward + sorted(completed_late)

    def _on_complete(self, parameter: Parameter) -> None:
        """Called when the last gradient of a parameter has arrived; starts ready reductions."""
        self._missing[self._bucket_of[parameter]] -= 1
        # Several buckets may start now: later buckets that were already complete had to wait for
        # this one. They start in order, so the next one is at index len(self.started).
        while len(self.started) < len(self._start_order):
            bucket = self._start_order[len(self.started)]
            if self._missing[bucket]:
                break
            self.started.append(bucket)
            self._start_reduction(bucket)

    def _start_reduction(self, number: int) -> None:
        """Start the reduce-scatter of a complete bucket into this rank's shard."""
        if not self._reduces:
            return
        self.allocate_grad_shard()
        target = _slice(self.grad_shard, self.layout.buckets[number])
        self.gradients.reduce(number, target)

    def _free_grad_shard(self) -> None:
        if self._sharded:
            self.grad_shard = self.master.new_empty(0)

    def allocate_grad_shard(self) -> None:
        """Allocate the buffer of reduced gradients if this step has none yet."""
        if self.updates is not None:
            # No module may have waited for a bucket whose parameters the forward pass did not use.
            self.wait_for_parameters()
        if self.grad_shard.numel() == 0:
            self.grad_shard = torch.zeros_like(self.master)

    def finish_gradients(self) -> None:
        """Wait until `grad_shard` holds this rank's shard of the summed gradients.

        The sum is over data ranks, and for some parameters over tensor ranks or both ends of the
        pipeline. Communicates over the shard, replica, tensor and pipeline axes.
        """
        # Mark parameters that received no gradient as complete; afterwards every reduction has
        # started.
        for queue in self.queues:
            queue.finish_step()

        if self._reduces:
            self.gradients.finish([_slice(self.grad_shard, b) for b in self.layout.buckets])

        for bucket in self.tied_buckets:
            self._add_other_end(bucket)
        if self.partial_segments:
            self._sum_partial_gradients()

    def _add_other_end(self, bucket: int) -> None:
        """Exchange the gradient of a tied embedding, so that first and last stage hold the sum.

        This is the last of all sums. Addition of two numbers commutes exactly, so both ends get
        identical bits even if their data-parallel sums were ordered differently.
        """
        pipeline = self.context.pipeline
        other_end = pipeline.size - 1 - pipeline.rank
        gradients = _slice(self.grad_shard, self.layout.buckets[bucket])
        gradients.add_(exchange(gradients, pipeline, other_end))

    def _sum_partial_gradients(self) -> None:
        """All-reduce partial gradients over tensor ranks.

        One case is the gain of a norm under sequence parallelism.
        """
        segments = self.partial_segments
        views = [self.grad_shard[s.shard_start : s.shard_start + s.size] for s in segments]
        # One all-reduce for all of them, as most are single vectors.
        summed = all_reduce(torch.cat(views), self.context.tensor)
        sizes = [segment.size for segment in segments]
        for view, total in zip(views, torch.split(summed, sizes), strict=True):
            view.copy_(total)

    def sum_of_squares(self) -> Tensor:
        """Sum of squares of the gradients for which this rank is primary: a float64 scalar.

        Summed over the mesh, these give the square of the gradient norm.
        """
        return kernels.sum_of_squares(self.grad_shard, self.grad_norm_table)

    # --- parameters ----------------------------------------------------------------------------

    def start_gathering(self, kinds: Collection[str] | None = None) -> None:
        """Start all-gathers of the new parameters, in the order in which forward needs them.

        Communicates over the shard axis of each bucket.

        kinds: of the buckets that are gathered; None: of all whose gathers have not started yet,
            which ends the step.
        """
        for call in self.on_new_parameters if kinds is None else ():
            call()
        if not self._sharded:
            return
        for number in self._forward_order():
            kind = self.layout.buckets[number].kind
            left_out = kinds is not None and kind not in kinds
            if left_out or number in self._sent:
                continue
            self._sent.add(number)
            self._arriving[number] = self._start_gathering_bucket(number)
        if kinds is None:
            self._sent.clear()

    def start_updates(self, update: Callable[[int], None]) -> None:
        """Start the update of every bucket, and its all-gather behind it, on the update stream.

        Nothing here waits. Communicates as `start_gathering` does.

        update: changes the masters of the bucket of a number.
        """
        assert self.updates is not None
        self.updates.begin()
        for number in self._forward_order():
            work = partial(self._update_bucket, update, number)
            self._arriving[number] = self.updates.run(work)

    def _update_bucket(self, update: Callable[[int], None], number: int) -> Pending:
        update(number)
        return self._start_gathering_bucket(number)

    def _forward_order(self) -> Iterable[int]:
        """Buckets lie in backward order, so the last one holds what forward needs first."""
        return reversed(range(len(self.layout.buckets)))

    def _start_gathering_bucket(self, number: int) -> Pending:
        bucket = self.layout.buckets[number]
        parameters = self.flat[bucket.start : bucket.stop]
        if not self._sharded:
            return Pending(parameters)  # the shard is the buffer itself
        updated = _slice(self.master if self.flat_shard is None else self.flat_shard, bucket)
        shard = self.reductions[bucket.axis].shard
        # With one shard on this axis there is nothing to gather. But if another axis is sharded,
        # `updated` is a separate buffer and must be copied back.
        if shard.size == 1:
            return Pending(parameters.copy_(updated))
        return start_all_gather(updated, shard, parameters)

    def _await_before_forward(self, buckets: Sequence[int], *_: object) -> None:
        """Pre-forward hook of a module whose parameters lie in these buckets."""
        self._await_buckets(buckets)

    def _await_buckets(self, buckets: Iterable[int]) -> None:
        """Wait for the new parameters of these buckets, where nothing has waited for them yet."""
        for bucket in buckets:
            arrival = self._arriving.pop(bucket, None)
            if arrival is None:
                continue
            arrival.wait()
            if self.updates is not None and not self._arriving:
                self._free_grad_shard()  # the last update has read it

    def load_from_masters(self) -> None:
        """Set all parameters from the masters, which were replaced by those of a checkpoint.

        Communicates over the shard axis.
        """
        if self.flat_shard is not None:
            self.flat_shard.copy_(self.master)
        self.start_gathering()
        self.wait_for_parameters()

    def wait_for_parameters(self) -> None:
        """Wait for all buckets that no module has waited for: updated, and gathered."""
        self._await_buckets(list(self._arriving))


def _view(flat: Tensor, piece: Piece, shape: torch.Size) -> Tensor:
    """One parameter's elements of a buffer that is laid out as `Shards.flat`."""
    return flat[piece.start : piece.start + piece.size].view(shape)


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

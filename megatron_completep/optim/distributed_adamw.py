"""AdamW over flat buffers whose state is sharded over data-parallel ranks (ZeRO-1).

Gradients of a bucket are reduce-scattered as soon as the last one in it arrives, while backward goes on; each rank then updates
its shard with one launch over all groups; the new parameters are all-gathered bucket by bucket while the next forward runs.
Averaging is by tokens that count: gradients are sums, and 1 / tokens joins the clip coefficient.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from megatron_completep import kernels
from megatron_completep.completep import Table
from megatron_completep.config.schema import OptimizerConfig, ParallelConfig
from megatron_completep.optim.groups import Group, build_groups
from megatron_completep.optim.layout import Layout, Segment, lay_out
from megatron_completep.parallel.collectives import Pending, all_reduce, exchange, start_all_gather, start_all_reduce, start_reduce_scatter
from megatron_completep.parallel.context import ParallelContext
from megatron_completep.parallel.gradients import GradientQueue, accumulate_tensor
from megatron_completep.parallel.placement import placement_of

# Positions in `control`; see kernels/adamw.py.
LEARNING_RATE, STEP, CLIP, SKIP, GRAD_NORM = 0, 1, 2, 3, 6


@dataclass(frozen=True)
class StepResult:
    """Device tensors of one step; reading one waits for the device."""

    grad_norm: Tensor  # before clipping, of the token average, over the whole model
    loss: Tensor  # mean over the tokens that count, over all data ranks
    tokens: Tensor  # tokens that counted
    skipped: Tensor  # 1.0 when a gradient was not finite and nothing was updated
    terms: Tensor  # float64 [n]: means of what was handed in as terms of the loss


class DistributedAdamW:
    """Owns the flat buffers that the chunks' parameters become views of.

    chunks: this rank's model chunks, float32 or float64, already initialized; each has a `queue`. precision: what the
    parameters are stored and computed in; float32 masters are kept in the shard under bf16.
    """

    def __init__(
        self,
        chunks: Sequence[nn.Module],
        table: Table,
        optimizer: OptimizerConfig,
        context: ParallelContext,
        parallel: ParallelConfig | None = None,
        precision: torch.dtype = torch.float32,
    ):
        self.context, self.config = context, optimizer
        self.betas = table.betas(optimizer.betas)
        named = [pair for chunk in reversed(chunks) for pair in reversed(list(chunk.named_parameters()))]
        self.parameters: dict[str, Parameter] = dict(named)
        self.groups: dict[str, Group] = build_groups(named, table, optimizer)
        self.chunks = list(chunks)
        self.queues = [getattr(chunk, "queue", None) or GradientQueue() for chunk in chunks]
        parallel = parallel or ParallelConfig()
        self.layout: Layout = lay_out(
            [(name, p.numel()) for name, p in named],
            context.shard.size,
            int(parallel.bucket_megabytes * 2**20 / 4),
            alone=frozenset(name for name, p in named if placement_of(p).tied_to is not None),
        )
        self._communication_dtype = torch.bfloat16 if parallel.gradient_dtype == "bf16" else None
        self._make_buffers(precision)
        self._make_tables()
        self._attach()

    # --- construction -----------------------------------------------------------------------------------------------------

    def _make_buffers(self, precision: torch.dtype) -> None:
        """Move the parameters into one buffer, and keep this rank's shard of master weights and moments."""
        layout, device = self.layout, self.context.device
        wide = torch.float64 if precision == torch.float64 else torch.float32
        whole = torch.zeros(layout.size, dtype=wide, device=device)
        self.grad = torch.zeros(layout.size, dtype=wide, device=device)
        for piece in layout.pieces:
            parameter = self.parameters[piece.name]
            whole[piece.start : piece.start + piece.size] = parameter.detach().flatten()
        sharded = self.context.shard.size > 1
        self.flat = whole if precision == wide else whole.to(precision)
        self.master = self._own_shard(whole) if sharded else whole
        self.exp_avg, self.exp_avg_sq = torch.zeros_like(self.master), torch.zeros_like(self.master)
        self.grad_shard = self.grad.new_empty(0) if sharded else self.grad
        if precision == wide:
            self.flat_shard: Tensor | None = None  # the master is the parameter (or what is gathered into it)
        else:
            self.flat_shard = self._own_shard(self.flat) if sharded else self.flat
        for piece in layout.pieces:
            parameter, end = self.parameters[piece.name], piece.start + piece.size
            parameter.data = self.flat[piece.start : end].view(parameter.shape)
            parameter.main_grad = self.grad[piece.start : end].view(parameter.shape)  # type: ignore[attr-defined]

    def _own_shard(self, flat: Tensor) -> Tensor:
        rank = self.context.shard.rank
        slices = (self.layout.bucket_slice(b, rank) for b in range(len(self.layout.buckets)))
        return torch.cat([flat[start:stop] for start, stop in slices]) if self.layout.buckets else flat.clone()

    def _make_tables(self) -> None:
        """What this shard holds, and the groups' learning-rate factors, weight decays and epsilons."""
        device = self.context.device
        self.segments: tuple[Segment, ...] = self.layout.segments(self.context.shard.rank)
        values = [(g.lr_factor, g.weight_decay, g.eps) for g in self.groups.values()]
        self.group_table = torch.tensor(values, dtype=torch.float64).view(-1, 3).to(device)
        self.control = torch.zeros(8, dtype=torch.float64, device=device)
        self._partial = [s for s in self.segments if placement_of(self.parameters[s.name]).partial_gradient]

    # Made at the first step, not at construction, which never reads a tensor's value and so runs on fake tensors too.
    @cached_property
    def segment_table(self) -> Tensor:
        """int64 [n, 3]: start in the shard, length, group."""
        return self._table(self.segments)

    @cached_property
    def counted_table(self) -> Tensor:
        """The segments that count in the gradient norm."""
        return self._table([s for s in self.segments if self._counts(s.name)])

    def _table(self, segments: Sequence[Segment]) -> Tensor:
        index = {name: i for i, name in enumerate(self.groups)}
        rows = torch.tensor([(s.shard_start, s.size, index[s.name]) for s in segments], dtype=torch.int64)
        return kernels.device_segments(rows.view(-1, 3), self.context.device)

    def _counts(self, name: str) -> bool:
        """Each logical element counts once in the norm: what is replicated, on the first rank that holds it."""
        placement, context = placement_of(self.parameters[name]), self.context
        copy = placement.tied_to not in (None, name) or (placement.replicated and context.tensor.rank > 0)
        return not copy and context.replica.rank == 0

    def _attach(self) -> None:
        """Hear of every completed gradient, and of those that autograd makes itself (modules that know no queue)."""
        self._bucket_of = {self.parameters[piece.name]: piece.bucket for piece in self.layout.pieces}
        self._bucket_sizes = Counter(self._bucket_of.values())
        self._tied_buckets = [bucket for p, bucket in self._bucket_of.items() if placement_of(p).tied_to is not None]
        self._missing: Counter[int] = Counter()
        self._reducing: list[tuple[Pending, Tensor]] = []
        self._gathering: dict[int, Pending] = {}
        for chunk, queue in zip(self.chunks, self.queues, strict=True):
            queue.on_complete = self._on_complete
            for parameter in chunk.parameters():
                # By weak reference: Python's collector cannot see through a tensor's hooks, and would keep all of this for ever.
                parameter.register_post_accumulate_grad_hook(partial(adopt_grad, weakref.ref(queue)))
            if self.context.shard.size > 1:
                self._wait_in_forward(chunk)

    def _wait_in_forward(self, chunk: nn.Module) -> None:
        """A module that owns parameters waits, before it runs, for the buckets that bring their new values."""
        for module in chunk.modules():
            buckets = sorted({self._bucket_of[p] for p in module.parameters(recurse=False)})
            if buckets:
                module.register_forward_pre_hook(lambda _module, _args, buckets=tuple(buckets): self._await_buckets(buckets))

    def _await_buckets(self, buckets: Iterable[int]) -> None:
        for bucket in buckets:
            pending = self._gathering.pop(bucket, None)
            if pending is not None:
                pending.wait()

    # --- one step ---------------------------------------------------------------------------------------------------------

    def begin_step(self, micro_batches: int) -> None:
        """Before the first forward of a step of `micro_batches` forward-backward passes."""
        self._missing = Counter(self._bucket_sizes)
        if self.context.shard.size > 1:
            self.grad_shard = self.grad.new_empty(0)  # activations may have the memory until the first bucket is complete
        for chunk, queue in zip(self.chunks, self.queues, strict=True):
            queue.begin_step(chunk.parameters(), micro_batches)

    def step(self, learning_rate: float, loss_sum: Tensor, tokens: Tensor, term_sums: Tensor | None = None) -> StepResult:
        """Update the parameters. loss_sum, tokens: this data rank's sums over the step (zero where this rank has no loss); term_sums
        [n]: of terms of the loss that are reported apart.

        Communicates over data (gradients, parameters), tensor (partial gradients) and the whole mesh (norm, loss, tokens).
        Nothing here waits for the device.
        """
        self.wait_for_parameters()  # whatever no forward waited for: the buffers they are sent from change below
        for queue in self.queues:
            queue.finish_step()
        self._finish_reductions()
        speaks = self.context.tensor.rank == 0
        sums = [
            kernels.sum_of_squares(self.grad_shard, self.counted_table),
            loss_sum.detach().double() * speaks,
            tokens.to(self.context.device).double() * speaks,
            *(() if term_sums is None else (term_sums.double() * speaks).unbind()),
        ]
        sum_sq, loss_total, token_total, *term_totals = all_reduce(torch.stack(sums), self.context.world).unbind()
        self.control[LEARNING_RATE] = learning_rate
        kernels.begin_step_(self.control, sum_sq / token_total.square(), self.config.grad_clip, *self.betas)
        self.control[CLIP] /= token_total
        kernels.adamw_(
            self.flat_shard,
            self.master,
            self.exp_avg,
            self.exp_avg_sq,
            self.grad_shard,
            self.segment_table,
            self.group_table,
            self.control,
            *self.betas,
        )
        self._start_gathering()
        control = self.control.clone()
        terms = torch.stack(term_totals) / token_total if term_totals else loss_total.new_empty(0)
        return StepResult(control[GRAD_NORM], loss_total / token_total, token_total, control[SKIP], terms)

    def _on_complete(self, parameter: Parameter) -> None:
        bucket = self._bucket_of[parameter]
        self._missing[bucket] -= 1
        if self._missing[bucket] == 0:
            self._reduce(bucket)

    def _reduce(self, bucket: int) -> None:
        """Start the reduce-scatter of a complete bucket into this rank's shard."""
        context, (start, stop) = self.context, self.layout.buckets[bucket]
        if context.data.size == 1:
            return
        self.hold_grad_shard()
        gradients, own = self.grad[start:stop], self.grad_shard[slice(*self.layout.shard_slice(bucket))]
        if self._communication_dtype is not None:
            self._reducing.append((start_reduce_scatter(gradients.to(self._communication_dtype), context.shard), own))
        else:
            self._reducing.append((start_reduce_scatter(gradients, context.shard, own), own))

    def hold_grad_shard(self) -> None:
        """Make the buffer of reduced gradients where there is none yet in this step."""
        if self.grad_shard.numel() == 0:
            self.grad_shard = torch.zeros_like(self.master)

    def _finish_reductions(self) -> None:
        """After this the shard holds the sum over all data ranks, and over tensor ranks and pipeline ends where that is due."""
        across = []
        for pending, own in self._reducing:
            reduced = pending.wait()
            across.append((start_all_reduce(reduced, self.context.replica), own))
        for pending, own in across:
            reduced = pending.wait()
            if reduced.data_ptr() != own.data_ptr():
                own.copy_(reduced)
        self._reducing.clear()
        for bucket in self._tied_buckets:
            self._add_other_end(bucket)
        if self._partial:
            self._sum_partial_gradients()

    def _add_other_end(self, bucket: int) -> None:
        """Tied embeddings: the first and the last stage exchange their gradients, and both hold the sum.

        Last of all sums: a + b is b + a, so both ends hold the same bits, whatever order each end's data ranks are summed in.
        """
        pipeline, own = self.context.pipeline, self.grad_shard[slice(*self.layout.shard_slice(bucket))]
        own.add_(exchange(own, pipeline, pipeline.size - 1 - pipeline.rank))

    def _sum_partial_gradients(self) -> None:
        """Norms and biases under sequence parallelism, QK-norm gains: one small sum over tensor ranks, on the shard."""
        views = [self.grad_shard[s.shard_start : s.shard_start + s.size] for s in self._partial]
        whole = all_reduce(torch.cat(views), self.context.tensor)
        for view, summed in zip(views, whole.split([s.size for s in self._partial]), strict=True):
            view.copy_(summed)

    def _start_gathering(self) -> None:
        """Send the new parameters round in the order in which the next forward needs them."""
        if self.context.shard.size == 1:
            return
        updated = self.master if self.flat_shard is None else self.flat_shard
        for bucket in reversed(range(len(self.layout.buckets))):
            start, stop = self.layout.buckets[bucket]
            own_start, own_stop = self.layout.shard_slice(bucket)
            self._gathering[bucket] = start_all_gather(updated[own_start:own_stop], self.context.shard, self.flat[start:stop])

    def adopt_masters(self) -> None:
        """The masters were replaced (a checkpoint was read): every parameter follows. Communicates over the shard axis."""
        if self.flat_shard is not None:
            self.flat_shard.copy_(self.master)
        self._start_gathering()
        self.wait_for_parameters()

    def wait_for_parameters(self) -> None:
        """Every parameter is the new one from here on."""
        self._await_buckets(list(self._gathering))


def adopt_grad(owner: weakref.ref[GradientQueue], parameter: Parameter) -> None:
    """Hand a gradient that autograd made itself (by a module that knows no queue) to the queue; others leave None here.

    Held weakly: the garbage collector cannot see a cycle that runs through a tensor's hooks, and would never free the optimizer.
    """
    gradient, parameter.grad = parameter.grad, None
    queue = owner()
    if gradient is not None and queue is not None:
        queue.push(parameter, accumulate_tensor(gradient))

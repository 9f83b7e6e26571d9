"""AdamW over flat buffers whose state is sharded over data-parallel ranks (ZeRO-1).

Gradients of a bucket are reduce-scattered as soon as the last one in it arrives, while backward goes on; each rank then updates
its shard with one launch over all groups; the new parameters are all-gathered bucket by bucket while the next forward runs.
Averaging is by tokens that count: gradients are sums, and 1 / tokens joins the clip coefficient.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from megatron_completep import kernels
from megatron_completep.completep import Table
from megatron_completep.config.schema import OptimizerConfig, ParallelConfig
from megatron_completep.optim.groups import Group, build_groups
from megatron_completep.optim.layout import Layout, Segment, lay_out
from megatron_completep.parallel.collectives import Pending, all_reduce, start_all_gather, start_reduce_scatter
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
        all_names: Sequence[str] | None = None,
    ):
        self.context, self.config = context, optimizer
        self.betas = table.betas(optimizer.betas)
        named = [pair for chunk in reversed(chunks) for pair in reversed(list(chunk.named_parameters()))]
        self.parameters: dict[str, Parameter] = dict(named)
        self.groups: dict[str, Group] = build_groups(named, table, optimizer, all_names)
        self.chunks = list(chunks)
        self.queues = [getattr(chunk, "queue", None) or GradientQueue() for chunk in chunks]
        parallel = parallel or ParallelConfig()
        self.layout: Layout = lay_out(
            [(name, p.numel()) for name, p in named], context.data.size, int(parallel.bucket_megabytes * 2**20 / 4)
        )
        self._communication_dtype = torch.bfloat16 if parallel.gradient_dtype == "bf16" else None
        self._make_buffers(precision)
        self._make_tables()
        self._attach()

    # --- construction -----------------------------------------------------------------------------------------------------

    def _make_buffers(self, precision: torch.dtype) -> None:
        """Move the parameters into one buffer, and keep this rank's shard of master weights and moments."""
        layout, device, data = self.layout, self.context.device, self.context.data
        wide = torch.float64 if precision == torch.float64 else torch.float32
        whole = torch.zeros(layout.size, dtype=wide, device=device)
        self.grad = torch.zeros(layout.size, dtype=wide, device=device)
        for piece in layout.pieces:
            parameter = self.parameters[piece.name]
            whole[piece.start : piece.start + piece.size] = parameter.detach().flatten()
        sharded = data.size > 1
        self.flat = whole if precision == wide else whole.to(precision)
        self.master = self._own_shard(whole) if sharded else whole
        self.exp_avg, self.exp_avg_sq = torch.zeros_like(self.master), torch.zeros_like(self.master)
        self.grad_shard = torch.zeros_like(self.master) if sharded else self.grad
        if precision == wide:
            self.flat_shard: Tensor | None = None  # the master is the parameter (or what is gathered into it)
        else:
            self.flat_shard = self._own_shard(self.flat) if sharded else self.flat
        for piece in layout.pieces:
            parameter, end = self.parameters[piece.name], piece.start + piece.size
            parameter.data = self.flat[piece.start : end].view(parameter.shape)
            parameter.main_grad = self.grad[piece.start : end].view(parameter.shape)  # type: ignore[attr-defined]

    def _own_shard(self, flat: Tensor) -> Tensor:
        rank = self.context.data.rank
        slices = (self.layout.bucket_slice(b, rank) for b in range(len(self.layout.buckets)))
        return torch.cat([flat[start:stop] for start, stop in slices]) if self.layout.buckets else flat.clone()

    def _make_tables(self) -> None:
        """The segment table (start, length, group) of this shard, the group table, and which segments the norm counts."""
        device = self.context.device
        index = {name: i for i, name in enumerate(self.groups)}
        self.segments: tuple[Segment, ...] = self.layout.segments(self.context.data.rank)
        rows = [(s.shard_start, s.size, index[s.name]) for s in self.segments]
        counted = [row for s, row in zip(self.segments, rows, strict=True) if self._counts(s.name)]
        self.segment_table = torch.tensor(rows, dtype=torch.int64).view(-1, 3).to(device)
        self.counted_table = torch.tensor(counted, dtype=torch.int64).view(-1, 3).to(device)
        values = [(g.lr_factor, g.weight_decay, g.eps) for g in self.groups.values()]
        self.group_table = torch.tensor(values, dtype=torch.float64).view(-1, 3).to(device)
        self.control = torch.zeros(8, dtype=torch.float64, device=device)
        self._partial = [s for s in self.segments if placement_of(self.parameters[s.name]).partial_gradient]

    def _counts(self, name: str) -> bool:
        """Each logical element counts once in the norm: replicated parameters on the first tensor rank, tied copies nowhere."""
        placement = placement_of(self.parameters[name])
        return placement.tied_to is None and not (placement.replicated and self.context.tensor.rank > 0)

    def _attach(self) -> None:
        """Hear of every completed gradient, and of those that autograd makes itself (modules that know no queue)."""
        self._bucket_of = {self.parameters[piece.name]: piece.bucket for piece in self.layout.pieces}
        self._bucket_sizes = Counter(self._bucket_of.values())
        self._missing: Counter[int] = Counter()
        self._reducing: list[tuple[Pending, int]] = []
        self._gathering: dict[int, Pending] = {}
        for chunk, queue in zip(self.chunks, self.queues, strict=True):
            queue.on_complete = self._on_complete
            for parameter in chunk.parameters():
                parameter.register_post_accumulate_grad_hook(partial(adopt_grad, queue))

    # --- one step ---------------------------------------------------------------------------------------------------------

    def begin_step(self, micro_batches: int) -> None:
        """Before the first forward of a step of `micro_batches` forward-backward passes."""
        self._missing = Counter(self._bucket_sizes)
        for chunk, queue in zip(self.chunks, self.queues, strict=True):
            queue.begin_step(chunk.parameters(), micro_batches)

    def step(self, learning_rate: float, loss_sum: Tensor, tokens: Tensor) -> StepResult:
        """Update the parameters. loss_sum, tokens: this data rank's sums over the step (zero where this rank has no loss).

        Communicates over data (gradients, parameters), tensor (partial gradients) and the whole mesh (norm, loss, tokens).
        Nothing here waits for the device.
        """
        for queue in self.queues:
            queue.finish_step()
        self._finish_reductions()
        speaks = self.context.tensor.rank == 0
        sums = torch.stack(
            [
                kernels.sum_of_squares(self.grad_shard, self.counted_table),
                loss_sum.detach().double() * speaks,
                tokens.to(self.context.device).double() * speaks,
            ]
        )
        sum_sq, loss_total, token_total = all_reduce(sums, self.context.world).unbind()
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
        return StepResult(control[GRAD_NORM], loss_total / token_total, token_total, control[SKIP])

    def _on_complete(self, parameter: Parameter) -> None:
        bucket = self._bucket_of[parameter]
        self._missing[bucket] -= 1
        if self._missing[bucket] == 0 and self.context.data.size > 1:
            self._reducing.append((self._reduce(bucket), bucket))

    def _reduce(self, bucket: int) -> Pending:
        start, stop = self.layout.buckets[bucket]
        gradients = self.grad[start:stop]
        if self._communication_dtype is not None:
            return start_reduce_scatter(gradients.to(self._communication_dtype), self.context.data)
        own_start, own_stop = self.layout.shard_slice(bucket)
        return start_reduce_scatter(gradients, self.context.data, self.grad_shard[own_start:own_stop])

    def _finish_reductions(self) -> None:
        for pending, bucket in self._reducing:
            reduced = pending.wait()
            if self._communication_dtype is not None:
                start, stop = self.layout.shard_slice(bucket)
                self.grad_shard[start:stop] = reduced
        self._reducing.clear()
        if self._partial:
            self._sum_partial_gradients()

    def _sum_partial_gradients(self) -> None:
        """Norms and biases under sequence parallelism, QK-norm gains: one small sum over tensor ranks, on the shard."""
        views = [self.grad_shard[s.shard_start : s.shard_start + s.size] for s in self._partial]
        whole = all_reduce(torch.cat(views), self.context.tensor)
        for view, summed in zip(views, whole.split([s.size for s in self._partial]), strict=True):
            view.copy_(summed)

    def _start_gathering(self) -> None:
        """Send the new parameters round in the order in which the next forward needs them."""
        if self.context.data.size == 1:
            return
        updated = self.master if self.flat_shard is None else self.flat_shard
        for bucket in reversed(range(len(self.layout.buckets))):
            start, stop = self.layout.buckets[bucket]
            own_start, own_stop = self.layout.shard_slice(bucket)
            self._gathering[bucket] = start_all_gather(updated[own_start:own_stop], self.context.data, self.flat[start:stop])

    def wait_for_parameters(self) -> None:
        """Every parameter is the new one from here on."""
        for pending in self._gathering.values():
            pending.wait()
        self._gathering.clear()


def adopt_grad(queue: GradientQueue, parameter: Parameter) -> None:
    """Hand a gradient that autograd made itself (by a module that knows no queue) to the queue; others leave None here."""
    gradient, parameter.grad = parameter.grad, None
    if gradient is not None:
        queue.push(parameter, accumulate_tensor(gradient))

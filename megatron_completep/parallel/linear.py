"""Linear layers whose weight is split over tensor ranks.

Column-parallel: each rank holds rows of the weight (output features); the input is whole (or gathered along the sequence).
Row-parallel: each rank holds columns (input features); the outputs are partial sums, summed (or reduce-scattered) over ranks.
Shapes: S sequence, B micro-batch; `s` is S, or S / tensor ranks under sequence parallelism.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_completep.parallel.collectives import all_gather, start_all_gather, start_all_reduce, start_reduce_scatter, sum_over
from megatron_completep.parallel.context import ParallelContext
from megatron_completep.parallel.gradients import GradientQueue, accumulate_matrix, accumulate_sum
from megatron_completep.parallel.parameter import Site, Spec, make_parameter
from megatron_completep.roles import Role


class ColumnParallelLinear(nn.Module):
    """[s, B, in] -> [S, B, local out].

    parts: name -> features of the stacked logical outputs (q, k, v or gate, up), each split evenly over tensor ranks.
    query_part: the one behind which the attention scale acts, where no norm stands between.
    """

    def __init__(
        self,
        in_features: int,
        parts: Mapping[str, int],
        base_in_features: int,
        bias: bool,
        context: ParallelContext,
        queue: GradientQueue,
        query_part: str | None = None,
    ):
        super().__init__()
        self.context = context
        self.queue = queue
        out_features = sum(parts.values())
        site = None if query_part is None else Site.QUERY
        weight = Spec(
            Role.HIDDEN_WEIGHT,
            (out_features, in_features),
            fan_in=in_features,
            base_fan_in=base_in_features,
            parts=parts,
            split={0: context.tensor.share},
            site=site,
            site_part=query_part,
        )
        self.weight = make_parameter(weight, context)
        self.bias: nn.Parameter | None = None
        if bias:
            vector = Spec(
                Role.HIDDEN_BIAS,
                (out_features,),
                parts=parts,
                split={0: context.tensor.share},
                constant=0.0,
                site=site,
                site_part=query_part,
            )
            self.bias = make_parameter(vector, context)

    def forward(self, x: Tensor) -> Tensor:
        return _ColumnParallel.apply(x, self.weight, self.bias, self.context, self.queue)


class RowParallelLinear(nn.Module):
    """[S, B, local in] -> [s, B, out], the output of a branch, summed over tensor ranks.

    The bias is not added here: the kernel of the residual sum adds it once.
    """

    def __init__(
        self, in_features: int, out_features: int, base_in_features: int, bias: bool, context: ParallelContext, queue: GradientQueue
    ):
        super().__init__()
        self.context = context
        self.queue = queue
        weight = Spec(
            Role.HIDDEN_WEIGHT,
            (out_features, in_features),
            fan_in=in_features,
            base_fan_in=base_in_features,
            split={1: context.tensor.share},
            site=Site.STREAM,
        )
        self.weight = make_parameter(weight, context)
        self.bias: nn.Parameter | None = None
        if bias:
            vector = Spec(
                Role.HIDDEN_BIAS,
                (out_features,),
                partial_over=context.sequence_axis,
                constant=0.0,
                site=Site.STREAM,
            )
            self.bias = make_parameter(vector, context)

    def forward(self, x: Tensor) -> Tensor:
        partial = _Linear.apply(x, self.weight, self.queue)
        return sum_over(partial, self.context.tensor, scatter=self.context.sequence_parallel)


class _Linear(torch.autograd.Function):
    """x W^T on what this rank holds; the weight gradient goes to the queue."""

    @staticmethod
    def forward(ctx, x, weight, queue):
        ctx.save_for_backward(x, weight)
        ctx.weight, ctx.queue = weight, queue  # the parameter itself: what is saved may come back as another object
        return F.linear(x, weight)

    @staticmethod
    def backward(ctx, d_out):
        x, weight = ctx.saved_tensors
        d_x = d_out @ weight if ctx.needs_input_grad[0] else None
        ctx.queue.push(ctx.weight, accumulate_matrix(d_out.flatten(0, -2), x.flatten(0, -2), ctx.queue.fused))
        return d_x, None, None


class _ColumnParallel(torch.autograd.Function):
    """Gathers its input along the sequence where that is split; in backward the reduction of d_x overlaps the weight gradient."""

    @staticmethod
    def forward(ctx, x, weight, bias, context: ParallelContext, queue):
        ctx.save_for_backward(x, weight)
        ctx.weight, ctx.bias, ctx.context, ctx.queue = weight, bias, context, queue
        whole = all_gather(x, context.tensor) if context.sequence_parallel else x
        return F.linear(whole, weight, bias)

    @staticmethod
    def backward(ctx, d_out):
        x, weight = ctx.saved_tensors
        context, queue = ctx.context, ctx.queue
        gathering = start_all_gather(x, context.tensor) if context.sequence_parallel else None
        d_x = d_out @ weight
        reducing = (start_reduce_scatter if context.sequence_parallel else start_all_reduce)(d_x, context.tensor)
        whole = gathering.wait() if gathering is not None else x
        rows = d_out.flatten(0, -2)
        queue.push(ctx.weight, accumulate_matrix(rows, whole.flatten(0, -2), queue.fused))
        if ctx.bias is not None:
            queue.push(ctx.bias, accumulate_sum(rows))
        return reducing.wait(), None, None, None, None

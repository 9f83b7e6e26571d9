"""Linear layers whose weight is split over tensor ranks.

Column-parallel: each rank holds rows of the weight (output features); the input is whole (or gathered along the sequence).
Row-parallel: each rank holds columns (input features); the outputs are partial sums, summed (or reduce-scattered) over ranks.
Shapes: S sequence, B micro-batch; `s` is S, or S / tensor ranks under sequence parallelism.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from megatron_completep.parallel.gradients import Accumulate, accumulate_sum
from megatron_completep.parallel.layer_context import LayerContext
from megatron_completep.parallel.micro_batch import MicroBatchSizes
from megatron_completep.parallel.parameter import Site, Spec, make_parameter, spec_of
from megatron_completep.parallel.products import Products
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
        context: LayerContext,
        query_part: str | None = None,
    ):
        super().__init__()
        self.context = context
        ranks = context.ranks
        out_features = sum(parts.values())
        site = None if query_part is None else Site.QUERY
        weight = Spec(
            Role.HIDDEN_WEIGHT,
            (out_features, in_features),
            fan_in=in_features,
            base_fan_in=base_in_features,
            parts=parts,
            split={0: ranks.tensor.share},
            site=site,
            site_part=query_part,
        )
        self.weight = make_parameter(weight, ranks)
        self.bias: nn.Parameter | None = None
        if bias:
            vector = Spec(
                Role.HIDDEN_BIAS,
                (out_features,),
                parts=parts,
                split={0: ranks.tensor.share},
                constant=0.0,
                site=site,
                site_part=query_part,
            )
            self.bias = make_parameter(vector, ranks)

    def forward(self, x: Tensor) -> Tensor:
        return _ColumnParallel.apply(x, self.weight, self.bias, self.context)

    def flops(self) -> float:
        """Matrix FLOPs of the forward pass a token, of the logical matrix."""
        return 2.0 * spec_of(self.weight).size

    def activation_bytes(self, sizes: MicroBatchSizes) -> int:
        """Bytes kept for backward: this rank's part of the input, which backward gathers again."""
        return sizes.local_tokens * self.weight.shape[1] * sizes.element_bytes


class RowParallelLinear(nn.Module):
    """[S, B, local in] -> [s, B, out], the output of a branch, summed over tensor ranks.

    The bias is not added here: the kernel of the residual sum adds it once.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        base_in_features: int,
        bias: bool,
        context: LayerContext,
    ):
        super().__init__()
        self.context = context
        ranks = context.ranks
        weight = Spec(
            Role.HIDDEN_WEIGHT,
            (out_features, in_features),
            fan_in=in_features,
            base_fan_in=base_in_features,
            split={1: ranks.tensor.share},
            site=Site.STREAM,
        )
        self.weight = make_parameter(weight, ranks)
        self.bias: nn.Parameter | None = None
        if bias:
            vector = Spec(
                Role.HIDDEN_BIAS,
                (out_features,),
                partial_over=ranks.sequence.partial_over,
                constant=0.0,
                site=Site.STREAM,
            )
            self.bias = make_parameter(vector, ranks)

    def forward(self, x: Tensor) -> Tensor:
        partial = _Linear.apply(x, self.weight, self.context)
        return self.context.ranks.sequence.sum_with_gradient(partial)

    def flops(self) -> float:
        """Matrix FLOPs of the forward pass a token, of the logical matrix."""
        return 2.0 * spec_of(self.weight).size

    def activation_bytes(self, sizes: MicroBatchSizes) -> int:
        """Bytes kept for backward: this rank's features of the input."""
        return sizes.tokens * self.weight.shape[1] * sizes.element_bytes


class _Linear(torch.autograd.Function):
    """x W^T on what this rank holds; the weight gradient goes to the queue."""

    @staticmethod
    def forward(ctx, x, weight, context: LayerContext):
        ctx.save_for_backward(x, weight)
        ctx.weight = weight  # the parameter itself: what is saved may come back as another object
        ctx.context = context
        return context.products.forward(x, weight)

    @staticmethod
    def backward(ctx, d_out):
        x, weight = ctx.saved_tensors
        products, queue = ctx.context.products, ctx.context.queue
        d_x = products.input_gradient(d_out, weight) if ctx.needs_input_grad[0] else None
        queue.push(ctx.weight, accumulate_matrix(products, d_out.flatten(0, -2), x.flatten(0, -2)))
        return d_x, None, None


class _ColumnParallel(torch.autograd.Function):
    """Gathers its input along the sequence where that is split; in backward the reduction of d_x overlaps the weight gradient."""

    @staticmethod
    def forward(ctx, x, weight, bias, context: LayerContext):
        ctx.save_for_backward(x, weight)
        ctx.weight, ctx.bias, ctx.context = weight, bias, context
        return context.products.forward(context.ranks.sequence.gather(x), weight, bias)

    @staticmethod
    def backward(ctx, d_out):
        x, weight = ctx.saved_tensors
        sequence, products, queue = (
            ctx.context.ranks.sequence,
            ctx.context.products,
            ctx.context.queue,
        )
        gathering = sequence.start_gather(x)
        d_x = products.input_gradient(d_out, weight)
        reducing = sequence.start_sum(d_x)
        # The weight gradient runs while d_x is under way.
        rows = d_out.flatten(0, -2)
        inputs = gathering.wait().flatten(0, -2)
        queue.push(ctx.weight, accumulate_matrix(products, rows, inputs))
        if ctx.bias is not None:
            queue.push(ctx.bias, accumulate_sum(rows))
        return reducing.wait(), None, None, None


def accumulate_matrix(products: Products, d_out: Tensor, x: Tensor) -> Accumulate:
    """main_grad (+)= d_out^T x for d_out [T, out], x [T, in]."""

    def accumulate(main_grad: Tensor, first: bool) -> None:
        products.add_weight_gradient(main_grad, d_out, x, first)

    return accumulate

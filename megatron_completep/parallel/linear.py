"""Linear layers whose weight is split over tensor ranks.

Column-parallel: each rank holds rows of the weight (output features). The input is whole, or under
sequence parallelism gathered along the sequence.
Row-parallel: each rank holds columns (input features). The outputs are partial sums, which are
summed (or reduce-scattered) over the ranks.

S sequence, B micro-batch; s is S, or S / tensor ranks under sequence parallelism.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from megatron_completep.parallel.gradients import Accumulate, accumulate_sum
from megatron_completep.parallel.layer_context import LayerContext
from megatron_completep.parallel.micro_batch import MicroBatchSizes
from megatron_completep.parallel.parameter import ForwardMultiplier, Spec, make_parameter, spec_of
from megatron_completep.parallel.products import Products
from megatron_completep.roles import Role


class ColumnParallelLinear(nn.Module):
    """[s, B, in] -> [S, B, local out].

    parts: name -> features of the logical matrices that are stacked (q, k, v or gate, up); each is
        split evenly over tensor ranks.
    query_part: the part whose output the attention scale multiplies; None if a norm is between.
    heads: name of a part -> heads that it stacks.
    """

    def __init__(
        self,
        in_features: int,
        parts: Mapping[str, int],
        base_in_features: int,
        bias: bool,
        context: LayerContext,
        query_part: str | None = None,
        heads: Mapping[str, int] | None = None,
    ):
        super().__init__()
        ranks = context.ranks
        out_features = sum(parts.values())
        # The scale multiplies q with its bias, so what rescales the weight rescales the bias.
        forward_multiplier = None if query_part is None else ForwardMultiplier.QUERY
        # Each part is split separately, so that a rank has whole heads of q, k and v, and the same
        # features of gate and up.
        weight = Spec(
            Role.HIDDEN_WEIGHT,
            (out_features, in_features),
            fan_in=in_features,
            base_fan_in=base_in_features,
            parts=parts,
            heads=heads or {},
            split={0: ranks.tensor.share},
            forward_multiplier=forward_multiplier,
            multiplied_part=query_part,
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
                forward_multiplier=forward_multiplier,
                multiplied_part=query_part,
            )
            self.bias = make_parameter(vector, ranks)
        self.context = replace(context, products=context.products.of(self.weight))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = _ColumnParallel.apply(  # type: ignore[no-untyped-call]
            x, self.weight, self.bias, self.context
        )
        return out

    def flops(self) -> float:
        """Matrix FLOPs of the forward pass per token, of the logical matrix."""
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
        ranks = context.ranks
        # Input features are split; fan_in is still that of the logical matrix, on which learning
        # rate and initialization depend.
        weight = Spec(
            Role.HIDDEN_WEIGHT,
            (out_features, in_features),
            fan_in=in_features,
            base_fan_in=base_in_features,
            split={1: ranks.tensor.share},
            forward_multiplier=ForwardMultiplier.STREAM,
        )
        self.weight = make_parameter(weight, ranks)
        self.bias: nn.Parameter | None = None
        if bias:
            vector = Spec(
                Role.HIDDEN_BIAS,
                (out_features,),
                # Under sequence parallelism a rank adds the bias to its own tokens only.
                partial_over=ranks.sequence.partial_over,
                constant=0.0,
                forward_multiplier=ForwardMultiplier.STREAM,
            )
            self.bias = make_parameter(vector, ranks)
        self.context = replace(context, products=context.products.of(self.weight))

    def forward(self, x: Tensor) -> Tensor:
        partial_sum: Tensor = _Linear.apply(  # type: ignore[no-untyped-call]
            x, self.weight, self.context
        )
        return self.context.ranks.sequence.sum_with_gradient(partial_sum)

    def flops(self) -> float:
        """Matrix FLOPs of the forward pass per token, of the logical matrix."""
        return 2.0 * spec_of(self.weight).size

    def activation_bytes(self, sizes: MicroBatchSizes) -> int:
        """Bytes kept for backward: this rank's features of the input."""
        return sizes.tokens * self.weight.shape[1] * sizes.element_bytes


class _Linear(torch.autograd.Function):
    """x W^T of this rank's input features; the weight gradient goes to the queue."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, context: LayerContext) -> Tensor:
        ctx.save_for_backward(x, weight)
        # The queue wants the parameter itself: what is saved may come back as another object.
        ctx.weight = weight
        ctx.context = context
        return context.products.forward(x, weight)

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, None, None]:
        x, weight = ctx.saved_tensors
        products: Products = ctx.context.products
        d_x = products.input_gradient(d_out, weight) if ctx.needs_input_grad[0] else None
        contribution = accumulate_matrix(products, d_out.flatten(0, -2), x.flatten(0, -2))
        ctx.context.queue.push(ctx.weight, contribution)
        return d_x, None, None


class _ColumnParallel(torch.autograd.Function):
    """Gathers its input along the sequence if that is split, then computes x W^T + b.

    In the backward pass the reduction of d_x overlaps the weight gradient.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, context: LayerContext
    ) -> Tensor:
        # Only this rank's part of the input is saved; backward gathers it again.
        ctx.save_for_backward(x, weight)
        ctx.weight = weight
        ctx.bias = bias
        ctx.context = context
        return context.products.forward_of_part(x, weight, bias, context.ranks.sequence)

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor, None, None, None]:
        x, weight = ctx.saved_tensors
        context: LayerContext = ctx.context
        products = context.products
        sequence = context.ranks.sequence
        # The gather of the input runs under the product for d_x, which does not read it.
        gathering = sequence.start_gather(x)
        d_x = products.input_gradient(d_out, weight)
        reducing = sequence.start_sum(d_x)
        # The weight gradient is computed while d_x is being summed.
        rows = d_out.flatten(0, -2)
        inputs = gathering.wait().flatten(0, -2)
        context.queue.push(ctx.weight, accumulate_matrix(products, rows, inputs))
        if ctx.bias is not None:
            context.queue.push(ctx.bias, accumulate_sum(rows))
        return reducing.wait(), None, None, None


def accumulate_matrix(products: Products, d_out: Tensor, x: Tensor) -> Accumulate:
    """main_grad (+)= d_out^T x for d_out [T, out], x [T, in]."""

    def accumulate(main_grad: Tensor, first: bool) -> None:
        products.add_weight_gradient(main_grad, d_out, x, first)

    return accumulate

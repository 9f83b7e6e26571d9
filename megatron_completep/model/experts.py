"""A mixture of experts in the place of the MLP: router, experts, and an MLP that all tokens share.

The output is sum over the k chosen experts of weight * expert(x), plus shared(x). The depth
multiplier joins it to the stream as for any branch. s sequence (this rank's part of it), B
micro-batch, H hidden, E experts, F their inner width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from megatron_completep.completep import Table
from megatron_completep.config.derived import expert_ffn_hidden_size, has_experts
from megatron_completep.config.schema import ModelConfig
from megatron_completep.model.attention import AttentionInputs
from megatron_completep.model.mlp import ACTIVATIONS, GATED, MLP, without_keeping
from megatron_completep.model.routing import Router
from megatron_completep.model.stream import Branch
from megatron_completep.parallel.dispatch import Dispatch
from megatron_completep.parallel.expert_load import ExpertLoad
from megatron_completep.parallel.grouped import grouped_linear
from megatron_completep.parallel.layer_context import LayerContext
from megatron_completep.parallel.micro_batch import MicroBatchSizes
from megatron_completep.parallel.parameter import (
    ForwardMultiplier,
    Spec,
    make_parameter,
    spec_of,
)
from megatron_completep.roles import Role


class Experts(nn.Module):
    """The experts that this rank holds: rows [R, H], sorted by expert, -> [R, H].

    up: [E / ranks, F (gate and up: 2 F), H]; down: [E / ranks, H, F]. Their gradients are summed
    over the ranks that hold the same experts; those that share the experts of a layer have sent
    their tokens here.
    """

    def __init__(
        self, model: ModelConfig, table: Table, context: LayerContext, recompute_selectively: bool
    ):
        super().__init__()
        moe = model.moe
        assert moe is not None
        self.context = context
        # Not compiled: the number of rows is another one every time.
        self.activation = ACTIVATIONS[model.activation]
        self.recompute_selectively = recompute_selectively
        ffn = expert_ffn_hidden_size(model)
        matrices = {"gate": ffn, "up": ffn} if model.activation in GATED else {"up": ffn}
        ranks = context.ranks
        split = {0: ranks.expert.share}
        up = Spec(
            Role.EXPERT_UP,
            (moe.num_experts, sum(matrices.values()), model.hidden_size),
            fan_in=model.hidden_size,
            base_fan_in=table.base_hidden_size,
            parts=matrices,
            part_dim=1,
            split=split,
            summed_over=ranks.expert_data.name,
        )
        down = Spec(
            Role.EXPERT_DOWN,
            (moe.num_experts, model.hidden_size, ffn),
            fan_in=ffn,
            base_fan_in=table.base_expert_ffn_hidden_size,
            split=split,
            summed_over=ranks.expert_data.name,
            forward_multiplier=ForwardMultiplier.STREAM,
        )
        self.up = make_parameter(up, ranks)
        self.down = make_parameter(down, ranks)

    def forward(self, rows: Tensor, sizes: Sequence[int], load: ExpertLoad | None = None) -> Tensor:
        """sizes: rows of each local expert, in order. load: for messages."""
        products = self.context.products
        queue = self.context.queue
        up = grouped_linear(rows, self.up, sizes, products, queue, load)

        def down(activated: Tensor) -> Tensor:
            return grouped_linear(activated, self.down, sizes, products, queue, load)

        if self.recompute_selectively and torch.is_grad_enabled():
            return without_keeping(self.activation, up, down)
        return down(self.activation(up))


class MixtureOfExperts(nn.Module):
    """The branch: x [s, B, H] -> [s, B, H]."""

    def __init__(
        self,
        model: ModelConfig,
        table: Table,
        context: LayerContext,
        layer: int,
        recompute_selectively: bool = False,
    ):
        super().__init__()
        moe = model.moe
        assert moe is not None
        self.context = context
        self.layer = layer
        self.num_experts = moe.num_experts
        self.top_k = moe.top_k
        self.router = Router(model, table, context, layer)
        self.experts = Experts(model, table, context, recompute_selectively)
        self.shared: MLP | None = None
        if moe.shared_ffn_hidden_size is not None:
            width = moe.shared_ffn_hidden_size
            self.shared = MLP(model, table, context, layer, recompute_selectively, width)

    def forward(self, x: Tensor, inputs: AttentionInputs | None = None) -> Branch:
        """Communicates over the expert axis, and the shared MLP over the tensor axis.

        A balance loss communicates over the axes that divide a sequence.
        """
        inputs = inputs or AttentionInputs()
        tokens = x.flatten(0, 1)
        counted = None if inputs.counted is None else inputs.counted.flatten()
        routing = self.router(tokens, counted, inputs.kept_routing, sequences=x.shape[1])
        ranks = self.context.ranks
        dispatch = Dispatch(routing.experts, self.num_experts, ranks.expert, self.layer)
        # Computed while the counts are on their way.
        shared = None if self.shared is None else self.shared(x).out
        with dispatch.load.naming():
            rows = dispatch.to_experts(tokens)
            rows = self.experts(rows, dispatch.sizes, dispatch.load)
            out = dispatch.combine(rows, routing.weights).view_as(x)
        return Branch(out if shared is None else out + shared)

    def flops(self, seq_length: int) -> float:
        """Matrix FLOPs of the forward pass a token: of the router and of the k chosen experts."""
        experts = spec_of(self.experts.up).size + spec_of(self.experts.down).size
        total = 2.0 * spec_of(self.router.weight).size
        total += 2.0 * experts * self.top_k / self.num_experts
        return total if self.shared is None else total + self.shared.flops(seq_length)

    def activation_bytes(self, sizes: MicroBatchSizes) -> int:
        """Bytes kept for backward if every expert gets its share of the tokens."""
        return self.activation_bytes_at(sizes, 1.0)

    def activation_bytes_at(self, sizes: MicroBatchSizes, load: float) -> int:
        """The same where the experts of this rank get `load` times their share."""
        hidden = self.router.weight.shape[1]
        slots = sizes.local_tokens * self.top_k
        rows = int(slots * load)
        up_features = self.experts.up.shape[1]
        ffn = self.experts.down.shape[2]
        # Of the experts: the inputs of both products and of the activation; of the sum their
        # outputs, which are this rank's slots again.
        down_features = 0 if self.experts.recompute_selectively else ffn
        elements = rows * (hidden + up_features + down_features) + slots * hidden
        tokens = sizes.local_tokens
        # Of the router: scores or logits and the weights in a wide type, and the numbers of the
        # chosen. Then the places of this rank's slots, and of the rows that came.
        routing = tokens * (self.num_experts + self.top_k) * sizes.wide_bytes + slots * 8
        places = 2 * 8 * (slots + (rows if self.context.ranks.expert.size > 1 else 0))
        losses = self.router.losses.activation_bytes(sizes, self.num_experts)
        total = elements * sizes.element_bytes + routing + places + losses
        if self.shared is not None:
            return total + self.shared.activation_bytes(sizes)  # its input is the router's
        return total + tokens * hidden * sizes.element_bytes


def mlp_or_experts(
    model: ModelConfig,
    table: Table,
    context: LayerContext,
    layer: int,
    recompute_selectively: bool = False,
) -> nn.Module:
    """The second branch of a layer, as `model.moe` has it."""
    if has_experts(model, layer):
        return MixtureOfExperts(model, table, context, layer, recompute_selectively)
    return MLP(model, table, context, layer, recompute_selectively)

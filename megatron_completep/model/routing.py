"""Which experts a token goes to, and with what weights.

T tokens of this rank, E experts of the layer, k of them a token. What is chosen depends on the
token alone, so that no layout and no micro-batch size changes it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_completep.completep import Table
from megatron_completep.config.schema import ModelConfig
from megatron_completep.model.loads import load_of, shares_of
from megatron_completep.model.router_losses import RouterLosses
from megatron_completep.parallel.gradients import GradientQueue, accumulate_tensor
from megatron_completep.parallel.layer_context import LayerContext
from megatron_completep.parallel.linear import accumulate_matrix
from megatron_completep.parallel.parameter import Balance, Spec, make_parameter
from megatron_completep.roles import Role


class Routing(NamedTuple):
    """The routing of this rank's tokens in one layer and micro-batch.

    scores: [T, E], sigmoid or softmax of the logits, as the gate is; without the balance bias.
        Differentiable for sigmoid.
    experts: int64 [T, k], the chosen, in ascending order.
    weights: [T, k], of the chosen; differentiable. float32, or float64.
    """

    scores: Tensor
    experts: Tensor
    weights: Tensor

    def load(self, counted: Tensor | None = None) -> Tensor:
        """int64 [E]: tokens of this rank by expert.

        counted: bool [T], of the tokens that count; None: all do.
        """
        return load_of(self.experts, self.scores.shape[1], counted)

    def entropy(self) -> Tensor:
        """[T]: entropy of each token's scores, scaled to a sum of 1, in nats; at most log E."""
        entropy: Tensor = torch.special.entr(shares_of(self.scores)).sum(-1)
        return entropy


class Router(nn.Module):
    """tokens [T, H] -> Routing. The product and all that follows are in float32, or float64.

    Attributes:
        layer: the number of the layer in the whole model, from 0.
        losses: those of the router's own.
        observers: called with the routing of every forward pass; see `observing`.
        fixed: the experts [T, k] to take in place of those with the highest scores; see `fixing`.
    """

    def __init__(self, model: ModelConfig, table: Table, context: LayerContext, layer: int):
        super().__init__()
        moe = model.moe
        assert moe is not None
        self.context = context
        self.layer = layer
        self.top_k = moe.top_k
        self.num_experts = moe.num_experts
        self.gate = moe.gate
        self.observers: list[Callable[[Routing], None]] = []
        self.fixed: Tensor | None = None
        self.losses = RouterLosses(model, table, context)
        # Every rank has its own tokens: what tensor ranks see is a part, as of a norm's gain.
        partial_over = context.ranks.sequence.partial_over
        weight = Spec(
            Role.ROUTER,
            (moe.num_experts, model.hidden_size),
            fan_in=model.hidden_size,
            base_fan_in=table.base_hidden_size,
            partial_over=partial_over,
        )
        self.weight = make_parameter(weight, context.ranks)
        self.bias: nn.Parameter | None = None
        if moe.balance == "bias":
            vector = Spec(
                Role.BALANCE_BIAS,
                (moe.num_experts,),
                partial_over=partial_over,
                constant=0.0,
                balance=Balance(moe.bias_rate, moe.top_k / moe.num_experts),
            )
            self.bias = make_parameter(vector, context.ranks)

    def forward(
        self,
        tokens: Tensor,
        counted: Tensor | None = None,
        kept: dict[int, Tensor] | None = None,
        sequences: int = 1,
    ) -> Routing:
        """The routing of tokens [T, H]. Only a balance loss communicates (`RouterLosses`).

        counted: bool [T], of the tokens that count as load and in losses; None: all do.
        kept: what was chosen, by layer. A choice that is there is taken, one that is not is added:
            so a recomputed forward pass keeps the routing of the first.
        sequences: of the micro-batch; their tokens at one place lie side by side.
        """
        logits: Tensor = _RouterProduct.apply(  # type: ignore[no-untyped-call]
            tokens, self.weight, self.context
        )
        # Of softmax only the chosen are weights, so that no gradient needs the scores.
        sigmoid = self.gate == "sigmoid"
        scores = logits.sigmoid() if sigmoid else logits.detach().softmax(-1)
        experts = self._choose(logits, scores, kept)
        if sigmoid:
            weights = scores.gather(1, experts) / self.top_k
        else:
            # The same as the softmax over all, scaled to a sum of 1 over the chosen.
            weights = logits.gather(1, experts).softmax(-1)
        weights = self.losses.inject(weights, logits, scores, experts, counted, sequences)
        if self.bias is not None:
            load = load_of(experts, self.num_experts, counted)
            weights = _CountLoad.apply(  # type: ignore[no-untyped-call]
                weights, load, self.bias, self.context.queue
            )
        routing = Routing(scores, experts, weights)
        for observe in self.observers:
            observe(routing)
        return routing

    @torch.no_grad()
    def _choose(self, logits: Tensor, scores: Tensor, kept: dict[int, Tensor] | None) -> Tensor:
        if kept is not None and self.layer in kept:
            return kept[self.layer]
        if self.fixed is not None:
            experts = self.fixed
        else:
            # Softmax keeps the order of logits, of which fewer are equal.
            ranked = logits if self.gate == "softmax" else scores
            if self.bias is not None:
                ranked = scores + self.bias.to(scores.dtype)
            # Stable: among equal scores the lowest numbers, on every device.
            by_score = ranked.argsort(dim=-1, descending=True, stable=True)
            experts, _ = by_score[:, : self.top_k].sort(dim=-1)
        if kept is not None:
            kept[self.layer] = experts
        return experts


class _RouterProduct(torch.autograd.Function):
    """tokens W^T in float32, or float64; the weight gradient goes to the queue."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, weight: Tensor, context: LayerContext) -> Tensor:
        ctx.save_for_backward(tokens, weight)
        ctx.weight = weight
        ctx.context = context
        dtype = torch.promote_types(tokens.dtype, torch.float32)
        return F.linear(tokens.to(dtype), weight.to(dtype))

    @staticmethod
    def backward(ctx: Any, d_logits: Tensor) -> tuple[Tensor, None, None]:
        tokens, weight = ctx.saved_tensors
        wide_tokens = tokens.to(d_logits.dtype)
        d_tokens = (d_logits @ weight.to(d_logits.dtype)).to(tokens.dtype)
        products = ctx.context.products
        contribution = accumulate_matrix(products, d_logits.contiguous(), wide_tokens)
        ctx.context.queue.push(ctx.weight, contribution)
        return d_tokens, None, None


class _CountLoad(torch.autograd.Function):
    """Returns the weights unchanged; its backward pass adds the load to what came for the bias.

    Counted in backward, which comes once a micro-batch, and not in validation.
    """

    @staticmethod
    def forward(
        ctx: Any, weights: Tensor, load: Tensor, bias: nn.Parameter, queue: GradientQueue
    ) -> Tensor:
        ctx.load = load
        ctx.bias = bias
        ctx.queue = queue
        return weights.view_as(weights)

    @staticmethod
    def backward(ctx: Any, d_weights: Tensor) -> tuple[Tensor, None, None, None]:
        ctx.queue.push(ctx.bias, accumulate_tensor(ctx.load))
        return d_weights, None, None, None


def routers(model: nn.Module) -> list[Router]:
    """The routers of a model or of a stage, in the order of the layers."""
    return [module for module in model.modules() if isinstance(module, Router)]


@contextmanager
def observing(model: nn.Module, observe: Callable[[int, Routing], None]) -> Iterator[None]:
    """Call `observe(layer, routing)` in every forward pass inside the block, layer by layer.

    A recomputed forward pass is seen twice. The routing is of this rank's tokens.
    """
    observed_routers = routers(model)

    def observer(layer: int) -> Callable[[Routing], None]:
        return lambda routing: observe(layer, routing)

    observers = [observer(router.layer) for router in observed_routers]
    for router, added in zip(observed_routers, observers, strict=True):
        router.observers.append(added)
    try:
        yield
    finally:
        for router, added in zip(observed_routers, observers, strict=True):
            router.observers.remove(added)


@contextmanager
def fixing(model: nn.Module, choices: Mapping[int, Tensor]) -> Iterator[None]:
    """Send tokens to given experts inside the block, whatever their scores; weights stay theirs.

    choices: layer -> int64 [T, k], as `Routing.experts` of the same micro-batch has them.
    """
    fixed_routers = [router for router in routers(model) if router.layer in choices]
    for router in fixed_routers:
        router.fixed = choices[router.layer]
    try:
        yield
    finally:
        for router in fixed_routers:
            router.fixed = None

"""The losses that a router has of its own: one for equal loads, one for small logits.

T tokens of this rank, E experts of the layer, k of them a token. Both losses are sums over the
counted tokens, as the tokens' loss is, so that the one division by the tokens of the step makes
means of all: no size of a micro-batch and no layout enters. They are sums over layers, too. A layer
without experts adds nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_completep.completep import Table
from megatron_completep.config.schema import ModelConfig
from megatron_completep.model.loads import loads_of_sequences, shares_of
from megatron_completep.parallel.axis import Axis
from megatron_completep.parallel.layer_context import LayerContext
from megatron_completep.parallel.micro_batch import MicroBatchSizes
from megatron_completep.parallel.own_losses import with_own_loss

# Names in the ledger and in the metrics.
BALANCE_LOSS = "balance_loss"
ROUTER_Z_LOSS = "router_z_loss"


class RouterLosses:
    """What the router of one layer adds to the objective.

    Attributes:
        axes: whose ranks hold parts of one sequence.
    """

    def __init__(self, model: ModelConfig, table: Table, context: LayerContext):
        moe = model.moe
        assert moe is not None
        self._softmax = moe.gate == "softmax"
        self._seq_length = model.seq_length
        self._balance = moe.balance_loss * table.router_loss_multiplier
        self._z = moe.router_z_loss * table.router_loss_multiplier
        self._ledger = context.own_losses
        ranks = context.ranks
        self.axes: list[Axis] = []
        if ranks.sequence.split:
            self.axes.append(ranks.tensor)
        if ranks.context_part.split:
            self.axes.append(ranks.context)
        for name, coefficient in ((BALANCE_LOSS, self._balance), (ROUTER_Z_LOSS, self._z)):
            if coefficient:
                self._ledger.declare(name)

    @property
    def balances(self) -> bool:
        """Whether there is a balance loss, whose loads communicate."""
        return self._balance > 0

    def inject(
        self,
        weights: Tensor,
        logits: Tensor,
        scores: Tensor,
        experts: Tensor,
        counted: Tensor | None,
        sequences: int,
    ) -> Tensor:
        """The weights [T, k] unchanged; their backward pass starts those of the losses.

        Does nothing, and does not communicate, where no gradient is taken: the losses train and are
        no part of a validation.

        logits: [T, E]. scores: [T, E], of sigmoid gates with their gradient. experts: [T, k], the
        chosen. counted: bool [T]; None: all count. sequences: of the micro-batch. Communicates over
        `axes` if there is a balance loss.
        """
        if not torch.is_grad_enabled():
            return weights
        if self._balance:
            shares = logits.softmax(-1) if self._softmax else shares_of(scores)
            loads = loads_of_sequences(experts, logits.shape[1], counted, sequences, self.axes)
            loss = self._balance * balance_loss(shares, loads, counted)
            weights = with_own_loss(weights, loss, BALANCE_LOSS, self._ledger)
        if self._z:
            loss = self._z * router_z_loss(logits, counted)
            weights = with_own_loss(weights, loss, ROUTER_Z_LOSS, self._ledger)
        return weights

    def activation_bytes(self, sizes: MicroBatchSizes, num_experts: int) -> int:
        """Bytes that a micro-batch's forward pass keeps on this rank, beside those of the router.

        Of these the losses find the scores of sigmoids, or else the logits.
        """
        of_tokens = sizes.local_tokens * sizes.wide_bytes
        of_experts = of_tokens * num_experts
        total = 0
        if self._balance:
            sequences = sizes.whole_tokens // self._seq_length
            # The loads over their mean, the loss itself; the shares, or the sums of the sigmoids.
            total += (sequences * num_experts + 1) * sizes.wide_bytes
            total += of_experts if self._softmax else of_tokens
        if self._z:
            # The logsumexp, the loss itself, and the logits.
            total += of_tokens + sizes.wide_bytes
            total += 0 if self._softmax else of_experts
        # Which tokens count, in a byte each.
        return total + sizes.local_tokens if total else 0


def balance_loss(shares: Tensor, loads: Tensor, counted: Tensor | None = None) -> Tensor:
    """[]: sum over sequences of (counted tokens) * sum over experts of f * P.

    f is an expert's load in the sequence over the mean load, and P the mean of its shares over the
    sequence's counted tokens; the inner sum is 1 if loads or shares are equal (arXiv 2412.19437).
    The gradient goes to the shares alone, so that of the other ranks the loads are enough.

    shares: [T, E], of this rank's tokens, those of all sequences at one place side by side.
    loads: int64 [sequences, E], of the whole sequences. counted: bool [T]; None: all count.
    """
    sequences, num_experts = loads.shape
    # A sequence of which no token counts has no load, and no shares below.
    of_sequence = loads.sum(-1, keepdim=True).clamp(min=1)
    over_mean = loads.to(shares.dtype) * num_experts / of_sequence
    if counted is not None:
        shares = shares * counted[:, None]
    # The tokens of a sequence times P is the sum over its tokens: linear, each rank has its part.
    sums = shares.view(-1, sequences, num_experts).sum(0)
    return (over_mean * sums).sum()


def router_z_loss(logits: Tensor, counted: Tensor | None = None) -> Tensor:
    """[]: sum over counted tokens of logsumexp(logits)^2 (arXiv 2202.08906). logits: [T, E]."""
    squares = logits.logsumexp(-1).square()
    return (squares if counted is None else squares * counted).sum()

"""The unembedding and the cross-entropy as one operation that owns its logits.

The vocabulary is split over tensor ranks. The logits [T, V] exist once: their gradient is written
over them. T tokens (S * B), V local vocabulary rows, H hidden.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import ceil
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_completep import kernels
from megatron_completep.config.schema import TrainingConfig
from megatron_completep.parallel.axis import Axis
from megatron_completep.parallel.collectives import all_gather, all_reduce
from megatron_completep.parallel.embedding import VocabShard
from megatron_completep.parallel.gradients import (
    Accumulate,
    accumulate_tensor,
    added_already,
    new_gradient,
)
from megatron_completep.parallel.layer_context import LayerContext
from megatron_completep.parallel.linear import accumulate_matrix
from megatron_completep.parallel.micro_batch import MicroBatchSizes
from megatron_completep.parallel.parameter import ForwardMultiplier, spec_of
from megatron_completep.parallel.products import Products
from megatron_completep.roles import Role

IGNORED = -100  # label of a position that does not count
TOKEN_MULTIPLE = 256  # of a chunk of tokens: the rows of whole tiles of any matrix product


@dataclass(frozen=True)
class LossConfig:
    """Options of the loss. `chunk_bytes` bounds the logits that are held at once."""

    z_loss: float = 0.0
    label_smoothing: float = 0.0
    chunk_bytes: int = 1 << 30

    @classmethod
    def of(cls, training: TrainingConfig) -> LossConfig:
        """The objective that a run is configured with."""
        return cls(training.z_loss, training.label_smoothing)

    @property
    def terms(self) -> tuple[str, ...]:
        """Names of the terms whose sum is the objective, where it is more than the cross-entropy.

        The cross-entropy comes first; an objective without further terms has no names.
        """
        added = [name for name in ("z_loss", "label_smoothing") if getattr(self, name)]
        return ("cross_entropy", *added) if added else ()

    @property
    def without_terms(self) -> LossConfig:
        """The cross-entropy alone."""
        return replace(self, z_loss=0.0, label_smoothing=0.0)


class Unembedding(VocabShard):
    """x [s, B, H] -> logits [B, S, vocab_size], or with labels [B, S] the sum of the token losses.

    Both are the same on every tensor rank. The losses are the training objective; without gradients
    (validation) they are the cross-entropy alone, because z-loss and label smoothing exist for
    their gradients. `multiplier` (1/m_N) applies in every path.
    """

    def __init__(
        self,
        vocab_size: int,
        multiple: int,
        hidden_size: int,
        role: Role,
        context: LayerContext,
        multiplier: float,
        loss: LossConfig,
        tied: VocabShard | None = None,
        tied_to: str | None = None,
    ):
        """tied: the embedding whose weight this is, where it is on the same stage."""
        # A tied weight stands where the embedding does, and takes over the input's multiplier.
        forward_multiplier = (
            ForwardMultiplier.LOGITS if role is Role.UNEMBEDDING else ForwardMultiplier.INPUT
        )
        super().__init__(
            vocab_size, multiple, hidden_size, role, forward_multiplier, context, tied_to=tied_to
        )
        if tied is not None:
            self.weight = tied.weight
        self.multiplier = multiplier
        self.loss = loss
        self._term_sums: Tensor | None = None  # over the passes since they were last taken
        self._token_losses: list[Tensor] | None = None  # of the passes that are recorded

    @contextmanager
    def recording_token_losses(self) -> Iterator[list[Tensor]]:
        """Within, every pass with labels adds its token losses to the list, in order.

        A micro-batch adds S * B of them, the sequence before the batch, in one tensor or several; a
        label that does not count adds 0.
        """
        self._token_losses = []
        try:
            yield self._token_losses
        finally:
            self._token_losses = None

    def take_terms(self) -> Tensor:
        """Sums of `loss.terms` [n] over the tokens of all training passes since the last call."""
        sums = self._term_sums
        self._term_sums = None
        if sums is None:
            return torch.zeros(len(self.loss.terms), device=self.weight.device)
        return sums

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        if labels is None:
            return self._logits(x)
        # Asked here: within the function below no gradients are recorded, whoever calls it.
        trains = torch.is_grad_enabled()
        loss = self.loss if trains else self.loss.without_terms
        total: Tensor
        flat_labels = labels.t().flatten()
        total, terms = _UnembeddingLoss.apply(  # type: ignore[no-untyped-call]
            x, self.weight, flat_labels, self, loss, trains
        )
        if terms.numel():
            self._term_sums = terms if self._term_sums is None else self._term_sums + terms
        return total

    def _logits(self, x: Tensor) -> Tensor:
        ranks = self.context.ranks
        whole_x = ranks.sequence.gather(x)
        local = self.context.products.forward(whole_x, self.weight) * self.multiplier
        # [V, B, S]: the ranks' rows follow one another along the first dimension.
        vocabulary_first = all_gather(local.permute(2, 1, 0).contiguous(), ranks.tensor)
        return vocabulary_first[: self.vocab_size].permute(1, 2, 0)

    def chunk_tokens(self, tokens: int, element_bytes: int) -> int:
        """How many of a micro-batch's `tokens` have logits at once; it is all where they fit.

        Otherwise the chunks are as equal as multiples of 256 tokens allow.
        """
        row_bytes = self.weight.shape[0] * element_bytes
        largest = max(1, self.loss.chunk_bytes // row_bytes)
        if tokens <= largest:
            return tokens
        multiple = TOKEN_MULTIPLE if largest >= TOKEN_MULTIPLE else 1
        largest = largest // multiple * multiple
        chunks = ceil(tokens / largest)
        return ceil(tokens / chunks / multiple) * multiple

    def flops(self) -> float:
        """Matrix FLOPs of the forward pass a token, of the logical matrix, without padding."""
        return 2.0 * spec_of(self.weight).size

    def activation_bytes(self, sizes: MicroBatchSizes) -> int:
        """Bytes kept for backward, loss included."""
        rows, hidden = self.weight.shape
        inputs = sizes.tokens * hidden * sizes.element_bytes
        if sizes.tokens <= self.chunk_tokens(sizes.tokens, sizes.element_bytes):
            logits = sizes.tokens * rows * sizes.element_bytes
            labels_and_logsumexp = sizes.tokens * (8 + sizes.wide_bytes)
            return inputs + logits + labels_and_logsumexp
        # The gradient of the inputs is made in the forward pass; that of the weight has its place.
        return inputs


class _UnembeddingLoss(torch.autograd.Function):
    """(sum [] of the losses, sums [n] of their terms).

    For few tokens the logits are kept for the backward pass. For many, the forward pass computes
    both gradients chunk by chunk, and no logits are kept. In a training step the weight's gradient
    goes straight into the main gradient. The pass of a test or an instrument keeps it until
    backward, which may never come.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        labels: Tensor,
        head: Unembedding,
        loss: LossConfig,
        trains: bool,
    ) -> tuple[Tensor, Tensor]:
        ranks = head.context.ranks
        products = head.context.products
        rows = ranks.sequence.gather(x).flatten(0, 1)
        chunk_tokens = head.chunk_tokens(rows.shape[0], weight.element_size())
        token_loss = _TokenLoss(
            head, head.multiplier, ranks.tensor, loss, head.context.compiled, head._token_losses
        )
        ctx.head = head
        ctx.shape = x.shape
        ctx.keeps_logits = rows.shape[0] <= chunk_tokens
        if ctx.keeps_logits:
            logits = products.forward(rows, weight)
            total, terms, lse = token_loss.forward(logits, labels)
            ctx.save_for_backward(rows, weight, logits, labels, lse)
            ctx.mark_non_differentiable(terms)
            ctx.token_loss = token_loss
            return total, terms
        if not trains or not any(ctx.needs_input_grad):
            return token_loss.forward_in_chunks(products, rows, weight, labels, chunk_tokens)
        main_grad = head.context.queue.main_grad_for_forward(head.weight)
        d_weight, stale = main_grad or (new_gradient(weight), True)
        total, terms, d_rows = token_loss.gradients_in_chunks(
            products, rows, weight, labels, chunk_tokens, d_weight, stale
        )
        ctx.save_for_backward(d_rows, None if main_grad else d_weight)
        ctx.mark_non_differentiable(terms)
        return total, terms

    @staticmethod
    def backward(
        ctx: Any, d_total: Tensor, _d_terms: Tensor
    ) -> tuple[Tensor, None, None, None, None, None]:
        head: Unembedding = ctx.head
        ranks = head.context.ranks
        products = head.context.products
        contribution: Accumulate
        if ctx.keeps_logits:
            rows, weight, logits, labels, lse = ctx.saved_tensors
            ctx.token_loss.backward_(logits, labels, lse, d_total)  # logits are their gradient now
            d_rows = products.input_gradient(logits, weight)
            contribution = accumulate_matrix(products, logits, rows)
        else:
            d_rows, d_weight = ctx.saved_tensors
            if d_weight is None:
                # What forward added to the main gradient cannot be scaled any more.
                torch._assert_async(d_total == 1, "in a training step the loss has the gradient 1")
                contribution = added_already
            else:
                d_rows = d_rows * d_total
                contribution = accumulate_tensor(d_weight, d_total)
        head.context.queue.push(head.weight, contribution)
        d_x = d_rows.view(-1, ctx.shape[1], d_rows.shape[-1])
        return ranks.sequence.sum(d_x), None, None, None, None, None


@dataclass(frozen=True)
class _TokenLoss:
    """Cross-entropy of local logits [T, V].

    Between the kernels stand two reductions over tensor ranks: of the maximum, then of the sums.
    """

    head: VocabShard
    multiplier: float
    axis: Axis
    loss: LossConfig
    compiled: kernels.CompiledDefinitions | None
    record: list[Tensor] | None = None  # where the losses of single tokens are kept

    def forward(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(sum [] of the losses, sums [n] of their terms, logsumexp [T]); logits stay."""
        smoothing = self.loss.label_smoothing
        stats = kernels.cross_entropy_forward(
            logits,
            labels,
            self.head.start,
            self.head.vocab_size,
            self.multiplier,
            smoothing > 0,
            self.compiled,
        )
        maximum = stats[0]
        # Rows: sum of exp(x - maximum), the target's logit, and with smoothing the logits' sum.
        sums = stats[1:]
        if self.axis.group is not None:
            # Sums of exponentials are relative to each rank's maximum; now to the global one.
            global_maximum = all_reduce(maximum.clone(), self.axis, dist.ReduceOp.MAX)
            sums[0] *= (maximum - global_maximum).exp()
            sums = all_reduce(sums, self.axis)
            maximum = global_maximum

        lse = maximum + sums[0].log()
        squares = self.loss.z_loss * lse.square()
        # Smoothing moves a share of the target's probability evenly to all words.
        losses = lse - (1 - smoothing) * sums[1] + squares
        term_losses = {"cross_entropy": lse - sums[1], "z_loss": squares}
        if smoothing > 0:
            vocab_size = self.head.vocab_size
            losses = losses - (smoothing / vocab_size) * sums[2]
            term_losses["label_smoothing"] = smoothing * (sums[1] - sums[2] / vocab_size)

        # `where` and not a product: a loss that is not finite, times 0, would stay so.
        ignored = labels == IGNORED
        counted_losses = torch.where(ignored, 0.0, losses)
        if self.record is not None:
            self.record.append(counted_losses)
        total = counted_losses.sum()
        terms = [torch.where(ignored, 0.0, term_losses[name]).sum() for name in self.loss.terms]
        return total, torch.stack(terms) if terms else total.new_empty(0), lse

    def backward_(self, logits: Tensor, labels: Tensor, lse: Tensor, d_total: Tensor) -> None:
        """Write the gradient of the sum, times d_total [], over the logits."""
        kernels.cross_entropy_backward_(
            logits,
            labels,
            self.head.start,
            lse,
            d_total,
            IGNORED,
            self.loss.z_loss,
            self.loss.label_smoothing,
            self.head.vocab_size,
            self.multiplier,
            self.compiled,
        )

    def forward_in_chunks(
        self, products: Products, rows: Tensor, weight: Tensor, labels: Tensor, chunk_tokens: int
    ) -> tuple[Tensor, Tensor]:
        """(sum [] of the losses, sums [n] of their terms), without gradients."""
        totals = []
        terms = []
        for start in range(0, rows.shape[0], chunk_tokens):
            chunk = slice(start, start + chunk_tokens)
            logits = products.forward(rows[chunk], weight)
            chunk_total, chunk_terms, _ = self.forward(logits, labels[chunk])
            totals.append(chunk_total)
            terms.append(chunk_terms)
        return torch.stack(totals).sum(), torch.stack(terms).sum(0)

    def gradients_in_chunks(
        self,
        products: Products,
        rows: Tensor,
        weight: Tensor,
        labels: Tensor,
        chunk_tokens: int,
        d_weight: Tensor,
        overwrite: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(sum [] of the losses, sums [n] of their terms, d_rows [T, H]).

        The logits of `chunk_tokens` tokens are held at a time.

        d_weight: [V, H], float32 or float64, to which the weight's gradient is added.
        overwrite: what it holds is stale.
        """
        d_rows = torch.empty_like(rows)
        one = torch.ones((), dtype=d_weight.dtype, device=weight.device)
        total = torch.zeros_like(one)
        terms = one.new_zeros(len(self.loss.terms))
        for start in range(0, rows.shape[0], chunk_tokens):
            chunk = slice(start, start + chunk_tokens)
            logits = products.forward(rows[chunk], weight)
            chunk_total, chunk_terms, lse = self.forward(logits, labels[chunk])
            total += chunk_total
            terms += chunk_terms
            self.backward_(logits, labels[chunk], lse, one)
            products.input_gradient(logits, weight, out=d_rows[chunk])
            first = overwrite and start == 0
            products.add_weight_gradient(d_weight, logits, rows[chunk], first)
        return total, terms, d_rows

"""The unembedding and the cross-entropy as one operation that owns its logits; the vocabulary is split over tensor ranks.

T tokens (S * B), V local vocabulary rows, H hidden. The logits [T, V] exist once: the gradient is written over them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_completep import kernels
from megatron_completep.config.schema import TrainingConfig
from megatron_completep.parallel.axis import Axis
from megatron_completep.parallel.collectives import all_gather, all_reduce
from megatron_completep.parallel.embedding import VocabShard
from megatron_completep.parallel.gradients import accumulate_tensor
from megatron_completep.parallel.layer_context import LayerContext
from megatron_completep.parallel.linear import accumulate_matrix
from megatron_completep.parallel.micro_batch import MicroBatchSizes
from megatron_completep.parallel.parameter import Site, spec_of
from megatron_completep.parallel.products import Products
from megatron_completep.roles import Role

IGNORED = -100  # label of a position that does not count


@dataclass(frozen=True)
class LossConfig:
    """Options of the loss; `chunk_bytes` bounds the logits held at once."""

    z_loss: float = 0.0
    label_smoothing: float = 0.0
    chunk_bytes: int = 1 << 28

    @classmethod
    def of(cls, training: TrainingConfig) -> LossConfig:
        """The objective that a run is configured with."""
        return cls(training.z_loss, training.label_smoothing)

    @property
    def terms(self) -> tuple[str, ...]:
        """What the objective is the sum of, where it is more than the cross-entropy: that, and each term that is added."""
        added = [name for name in ("z_loss", "label_smoothing") if getattr(self, name)]
        return ("cross_entropy", *added) if added else ()

    @property
    def without_terms(self) -> LossConfig:
        """The pure cross-entropy."""
        return replace(self, z_loss=0.0, label_smoothing=0.0)


class Unembedding(VocabShard):
    """x [s, B, H] -> logits [B, S, vocab_size], or with labels [B, S] the sum of the token losses; alike on every tensor rank.

    The losses are the training objective; without gradients (validation) they are the pure cross-entropy, since z-loss and label
    smoothing are there for their gradients alone. `multiplier` (1/m_N) applies in every path. `tied`: the embedding whose weight this
    is, when it is on the same stage.
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
        # A tied weight stands where the embedding does, and takes the input's multiplier over.
        site = Site.LOGITS if role is Role.UNEMBEDDING else Site.INPUT
        super().__init__(vocab_size, multiple, hidden_size, role, site, context, tied_to=tied_to)
        if tied is not None:
            self.weight = tied.weight
        self.multiplier = multiplier
        self.loss = loss
        self._term_sums: Tensor | None = None  # of the passes since they were taken

    def take_terms(self) -> Tensor:
        """Sums of `loss.terms` [n] over the tokens of all training passes since the last call."""
        sums, self._term_sums = self._term_sums, None
        return (
            torch.zeros(len(self.loss.terms), device=self.weight.device) if sums is None else sums
        )

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        if labels is not None:
            loss = self.loss if torch.is_grad_enabled() else self.loss.without_terms
            total, terms = _UnembeddingLoss.apply(x, self.weight, labels.t().flatten(), self, loss)
            if terms.numel():
                self._term_sums = terms if self._term_sums is None else self._term_sums + terms
            return total
        ranks, products = self.context.ranks, self.context.products
        local = products.forward(ranks.sequence.gather(x), self.weight) * self.multiplier
        vocabulary_first = all_gather(local.permute(2, 1, 0).contiguous(), ranks.tensor)
        return vocabulary_first[: self.vocab_size].permute(1, 2, 0)

    def tokens_at_once(self, element_bytes: int) -> int:
        """How many tokens' logits are held at once; a larger micro-batch is taken in chunks."""
        return max(1, self.loss.chunk_bytes // (self.weight.shape[0] * element_bytes))

    def flops(self) -> float:
        """Matrix FLOPs of the forward pass a token, of the logical matrix, without padding."""
        return 2.0 * spec_of(self.weight).size

    def activation_bytes(self, sizes: MicroBatchSizes) -> int:
        """Bytes kept for backward, loss included."""
        rows, hidden = self.weight.shape
        inputs = sizes.tokens * hidden * sizes.element_bytes
        if sizes.tokens <= self.tokens_at_once(sizes.element_bytes):
            logits = sizes.tokens * rows * sizes.element_bytes
            labels_and_logsumexp = sizes.tokens * (8 + sizes.wide_bytes)
            return inputs + logits + labels_and_logsumexp
        # Both gradients are made in the forward pass: of the inputs, and of the weight.
        return inputs + rows * hidden * sizes.wide_bytes


class _UnembeddingLoss(torch.autograd.Function):
    """(sum of the losses, sums of its terms [n]). Few tokens: the logits are kept for backward. Many: both gradients are made chunk by
    chunk in forward, and no logits are kept."""

    @staticmethod
    def forward(ctx, x, weight, labels, head: Unembedding, loss: LossConfig):
        ctx.head, ctx.shape = head, x.shape
        ranks, products = head.context.ranks, head.context.products
        rows = ranks.sequence.gather(x).flatten(0, 1)
        step = max(1, loss.chunk_bytes // (weight.shape[0] * weight.element_size()))
        tokens = _TokenLoss(head, head.multiplier, ranks.tensor, loss)
        ctx.kept = rows.shape[0] <= step
        if ctx.kept:
            logits = products.forward(rows, weight)
            total, terms, lse = tokens.forward(logits, labels)
            ctx.save_for_backward(rows, weight, logits, labels, lse)
            ctx.mark_non_differentiable(terms)
            ctx.tokens = tokens
            return total, terms
        if not any(ctx.needs_input_grad):
            sums = []
            for chunk, chunk_labels in zip(rows.split(step), labels.split(step), strict=True):
                sums.append(tokens.forward(products.forward(chunk, weight), chunk_labels)[:2])
            totals, terms = (torch.stack(column) for column in zip(*sums, strict=True))
            return totals.sum(), terms.sum(0)
        total, terms, d_rows, d_weight = tokens.chunked(products, rows, weight, labels, step)
        ctx.save_for_backward(d_rows, d_weight)
        ctx.mark_non_differentiable(terms)
        return total, terms

    @staticmethod
    def backward(ctx, d_total, _):
        head = ctx.head
        ranks, products, queue = head.context.ranks, head.context.products, head.context.queue
        if ctx.kept:
            rows, weight, logits, labels, lse = ctx.saved_tensors
            ctx.tokens.backward_(logits, labels, lse, d_total)
            d_rows = products.input_gradient(logits, weight)
            queue.push(head.weight, accumulate_matrix(products, logits, rows))
        else:
            d_rows, d_weight = ctx.saved_tensors
            d_rows = d_rows * d_total
            queue.push(head.weight, accumulate_tensor(d_weight, d_total))
        d_x = d_rows.view(-1, ctx.shape[1], d_rows.shape[-1])
        return ranks.sequence.sum(d_x), None, None, None, None


@dataclass(frozen=True)
class _TokenLoss:
    """Cross-entropy of local logits [T, V]; the two reductions over tensor ranks stand between the kernels."""

    head: VocabShard
    multiplier: float
    axis: Axis
    loss: LossConfig

    def forward(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(sum of the losses, sums of their terms [n], logsumexp [T]); logits stay as they are."""
        smoothing, head = self.loss.label_smoothing, self.head
        stats = kernels.cross_entropy_forward(
            logits, labels, head.start, head.vocab_size, self.multiplier, smoothing > 0
        )
        maximum, sums = (
            stats[0],
            stats[1:],
        )  # sums: of exp(x - maximum), the target's logit, and with smoothing of the logits
        if self.axis.group is not None:
            whole = all_reduce(maximum.clone(), self.axis, dist.ReduceOp.MAX)
            sums[0] *= (maximum - whole).exp()
            maximum, sums = whole, all_reduce(sums, self.axis)
        lse = maximum + sums[0].log()
        squares = self.loss.z_loss * lse.square()
        losses = lse - (1 - smoothing) * sums[1] + squares
        by_name = {"cross_entropy": lse - sums[1], "z_loss": squares}
        if smoothing > 0:
            losses = losses - (smoothing / head.vocab_size) * sums[2]
            by_name["label_smoothing"] = smoothing * (sums[1] - sums[2] / head.vocab_size)
        terms = [by_name[name] for name in self.loss.terms]
        columns = [torch.where(labels == IGNORED, 0.0, values).sum() for values in (losses, *terms)]
        return columns[0], torch.stack(columns[1:]) if terms else columns[0].new_empty(0), lse

    def backward_(self, logits: Tensor, labels: Tensor, lse: Tensor, d_total: Tensor) -> None:
        """Write the gradient of the sum, times d_total, over the logits."""
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
        )

    def chunked(
        self, products: Products, rows: Tensor, weight: Tensor, labels: Tensor, step: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(sum of the losses, sums of their terms [n], d_rows [T, H], d_weight [V, H] in fp32 or fp64), holding the logits of `step`
        tokens at a time."""
        wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
        d_rows, d_weight = (
            torch.empty_like(rows),
            torch.zeros(weight.shape, dtype=wide, device=weight.device),
        )
        one = torch.ones((), dtype=wide, device=weight.device)
        total, terms = torch.zeros_like(one), one.new_zeros(len(self.loss.terms))
        for start in range(0, rows.shape[0], step):
            part = slice(start, start + step)
            logits = products.forward(rows[part], weight)
            chunk_total, chunk_terms, lse = self.forward(logits, labels[part])
            total += chunk_total
            terms += chunk_terms
            self.backward_(logits, labels[part], lse, one)
            products.input_gradient(logits, weight, out=d_rows[part])
            products.add_weight_gradient(d_weight, logits, rows[part], start == 0)
        return total, terms, d_rows, d_weight

"""The unembedding and the cross-entropy as one operation that owns its logits; the vocabulary is split over tensor ranks.

T tokens (S * B), V local vocabulary rows, H hidden. The logits [T, V] exist once: the gradient is written over them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_completep import kernels
from megatron_completep.parallel.axis import Axis
from megatron_completep.parallel.collectives import all_gather, all_reduce
from megatron_completep.parallel.embedding import VocabShard
from megatron_completep.parallel.gradients import accumulate_tensor
from megatron_completep.parallel.layer_context import LayerContext
from megatron_completep.parallel.linear import accumulate_matrix
from megatron_completep.parallel.parameter import Site
from megatron_completep.parallel.products import Products
from megatron_completep.roles import Role

IGNORED = -100  # label of a position that does not count


@dataclass(frozen=True)
class LossConfig:
    """Options of the loss; `chunk_bytes` bounds the logits held at once."""

    z_loss: float = 0.0
    label_smoothing: float = 0.0
    chunk_bytes: int = 1 << 28


class Unembedding(VocabShard):
    """x [s, B, H] -> logits [B, S, vocab_size], or with labels [B, S] the sum of the token losses; alike on every tensor rank.

    `multiplier` (1/m_N) applies in every path. `tied`: the embedding whose weight this is, when it is on the same stage.
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

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        if labels is not None:
            return _UnembeddingLoss.apply(x, self.weight, labels.t().flatten(), self)
        ranks, products = self.context.ranks, self.context.products
        local = products.forward(ranks.sequence.gather(x), self.weight) * self.multiplier
        vocabulary_first = all_gather(local.permute(2, 1, 0).contiguous(), ranks.tensor)
        return vocabulary_first[: self.vocab_size].permute(1, 2, 0)


class _UnembeddingLoss(torch.autograd.Function):
    """Few tokens: the logits are kept for backward. Many: both gradients are made chunk by chunk in forward, and no logits are kept."""

    @staticmethod
    def forward(ctx, x, weight, labels, head: Unembedding):
        ctx.head, ctx.shape = head, x.shape
        ranks, products = head.context.ranks, head.context.products
        rows = ranks.sequence.gather(x).flatten(0, 1)
        step = max(1, head.loss.chunk_bytes // (weight.shape[0] * weight.element_size()))
        tokens = _TokenLoss(head, head.multiplier, ranks.tensor, head.loss)
        ctx.kept = rows.shape[0] <= step
        if ctx.kept:
            logits = products.forward(rows, weight)
            total, lse = tokens.forward(logits, labels)
            ctx.save_for_backward(rows, weight, logits, labels, lse)
            ctx.tokens = tokens
            return total
        if not any(ctx.needs_input_grad):
            totals = []
            for chunk, chunk_labels in zip(rows.split(step), labels.split(step), strict=True):
                totals.append(tokens.forward(products.forward(chunk, weight), chunk_labels)[0])
            return torch.stack(totals).sum()
        total, d_rows, d_weight = tokens.chunked(products, rows, weight, labels, step)
        ctx.save_for_backward(d_rows, d_weight)
        return total

    @staticmethod
    def backward(ctx, d_total):
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
        return ranks.sequence.sum(d_x), None, None, None


@dataclass(frozen=True)
class _TokenLoss:
    """Cross-entropy of local logits [T, V]; the two reductions over tensor ranks stand between the kernels."""

    head: VocabShard
    multiplier: float
    axis: Axis
    loss: LossConfig

    def forward(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """(sum of the losses, logsumexp [T]); logits stay as they are."""
        smoothing, head = self.loss.label_smoothing, self.head
        stats = kernels.cross_entropy_forward(logits, labels, head.start, head.vocab_size, self.multiplier, smoothing > 0)
        maximum, sums = stats[0], stats[1:]  # sums: of exp(x - maximum), the target's logit, and with smoothing of the logits
        if self.axis.group is not None:
            whole = all_reduce(maximum.clone(), self.axis, dist.ReduceOp.MAX)
            sums[0] *= (maximum - whole).exp()
            maximum, sums = whole, all_reduce(sums, self.axis)
        lse = maximum + sums[0].log()
        losses = lse - (1 - smoothing) * sums[1] + self.loss.z_loss * lse.square()
        if smoothing > 0:
            losses = losses - (smoothing / head.vocab_size) * sums[2]
        return torch.where(labels == IGNORED, 0.0, losses).sum(), lse

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

    def chunked(self, products: Products, rows: Tensor, weight: Tensor, labels: Tensor, step: int) -> tuple[Tensor, Tensor, Tensor]:
        """(sum of the losses, d_rows [T, H], d_weight [V, H] in fp32 or fp64), holding the logits of `step` tokens at a time."""
        wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
        d_rows, d_weight = torch.empty_like(rows), torch.zeros(weight.shape, dtype=wide, device=weight.device)
        one = torch.ones((), dtype=wide, device=weight.device)
        total = torch.zeros_like(one)
        for start in range(0, rows.shape[0], step):
            part = slice(start, start + step)
            logits = products.forward(rows[part], weight)
            chunk_total, lse = self.forward(logits, labels[part])
            total += chunk_total
            self.backward_(logits, labels[part], lse, one)
            products.input_gradient(logits, weight, out=d_rows[part])
            products.add_weight_gradient(d_weight, logits, rows[part], start == 0)
        return total, d_rows, d_weight

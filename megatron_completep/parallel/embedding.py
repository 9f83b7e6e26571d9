"""Token and position embeddings. The token table is split by vocabulary rows over tensor ranks."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_completep.parallel.gradients import Accumulate
from megatron_completep.parallel.layer_context import LayerContext
from megatron_completep.parallel.micro_batch import MicroBatchSizes
from megatron_completep.parallel.parameter import Site, Spec, make_parameter
from megatron_completep.roles import Role


class VocabShard(nn.Module):
    """The rows of a [vocabulary, H] table that this tensor rank holds: the embedding, the unembedding, or both when tied."""

    def __init__(
        self,
        vocab_size: int,
        multiple: int,
        hidden_size: int,
        role: Role,
        site: Site,
        context: LayerContext,
        uses: int = 1,
        tied_to: str | None = None,
    ):
        super().__init__()
        self.context = context
        self.vocab_size = vocab_size
        spec = Spec(
            role,
            (vocab_size, hidden_size),
            split={0: context.ranks.tensor.share},
            multiple=multiple,
            uses=uses,
            tied_to=tied_to,
            site=site,
        )
        self.weight = make_parameter(spec, context.ranks)
        ((self.start, stop),) = spec.local_ranges(0)
        self.local_size = stop - self.start


class VocabParallelEmbedding(VocabShard):
    """tokens [B, S] -> [s, B, H]: each rank looks up its own rows, the sum over ranks is the whole."""

    def __init__(
        self,
        vocab_size: int,
        multiple: int,
        hidden_size: int,
        context: LayerContext,
        uses: int = 1,
        tied_to: str | None = None,
    ):
        super().__init__(
            vocab_size, multiple, hidden_size, Role.EMBEDDING, Site.INPUT, context, uses, tied_to
        )

    def forward(self, tokens: Tensor) -> Tensor:
        local = tokens.t() - self.start
        ranks, queue = self.context.ranks, self.context.queue
        if ranks.tensor.size == 1:
            return _Lookup.apply(local, self.weight, None, queue)
        here = (local >= 0) & (local < self.local_size)
        partial = _Lookup.apply(local.clamp(0, self.local_size - 1), self.weight, here, queue)
        return ranks.sequence.sum_with_gradient(partial)

    def activation_bytes(self, sizes: MicroBatchSizes) -> int:
        """Bytes kept for backward: the ids, int64, and which of them are this tensor rank's."""
        mask_bytes = 1 if self.context.ranks.tensor.size > 1 else 0
        return sizes.tokens * (8 + mask_bytes)


class PositionEmbedding(nn.Module):
    """positions [B, S] -> [s, B, H]; every rank holds the whole table and, under sequence parallelism, looks up its part of S."""

    def __init__(self, seq_length: int, hidden_size: int, context: LayerContext):
        super().__init__()
        self.context = context
        spec = Spec(
            Role.EMBEDDING,
            (seq_length, hidden_size),
            partial_over=context.ranks.sequence.partial_over,
            site=Site.INPUT,
        )
        self.weight = make_parameter(spec, context.ranks)

    def forward(self, positions: Tensor) -> Tensor:
        ids = positions.t()
        ids = self.context.ranks.sequence.cut(ids)
        return _Lookup.apply(ids, self.weight, None, self.context.queue)


class _Lookup(torch.autograd.Function):
    """Rows of weight by id, zero where `here` is False; the gradient is added row by row into main_grad, in a fixed order."""

    @staticmethod
    def forward(ctx, ids, weight, here, queue):
        ctx.save_for_backward(ids, here)
        ctx.weight, ctx.queue = weight, queue
        rows = F.embedding(ids, weight)
        return rows if here is None else rows.masked_fill_(~here.unsqueeze(-1), 0.0)

    @staticmethod
    def backward(ctx, d_out):
        ids, here = ctx.saved_tensors
        if here is not None:
            d_out = d_out.masked_fill(~here.unsqueeze(-1), 0.0)
        ctx.queue.push(ctx.weight, _accumulate_rows(ids.flatten(), d_out.flatten(0, 1)))
        return None, None, None, None


def _accumulate_rows(ids: Tensor, d_rows: Tensor) -> Accumulate:
    def accumulate(main_grad: Tensor, first: bool) -> None:
        if first:
            main_grad.zero_()
        d_wide = d_rows.to(main_grad.dtype)
        if main_grad.is_cuda:
            main_grad.index_put_(
                (ids,), d_wide, accumulate=True
            )  # sorts first: repeatable, unlike index_add_ on CUDA
        else:
            main_grad.index_add_(0, ids, d_wide)

    return accumulate

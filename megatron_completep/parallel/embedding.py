"""Token and position embeddings. The rows of the vocabulary are split over tensor ranks."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_completep.parallel.gradients import Accumulate, GradientQueue
from megatron_completep.parallel.layer_context import LayerContext
from megatron_completep.parallel.micro_batch import MicroBatchSizes
from megatron_completep.parallel.parameter import ForwardMultiplier, Spec, make_parameter
from megatron_completep.roles import Role


class VocabShard(nn.Module):
    """The rows of a [vocabulary, H] matrix that this tensor rank holds.

    The matrix is the embedding, the unembedding, or both when they are tied.
    """

    def __init__(
        self,
        vocab_size: int,
        multiple: int,
        hidden_size: int,
        role: Role,
        forward_multiplier: ForwardMultiplier,
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
            forward_multiplier=forward_multiplier,
        )
        self.weight = make_parameter(spec, context.ranks)
        # Only the rows are split, and into one range for each rank. A range may reach past the
        # vocabulary into padding, which no id names.
        ((self.start, stop),) = spec.local_ranges(0)
        self.local_size = stop - self.start


class VocabParallelEmbedding(VocabShard):
    """tokens [B, S] -> [s, B, H].

    Each tensor rank looks up the tokens whose rows it holds; the results are summed over the ranks.
    """

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
            vocab_size,
            multiple,
            hidden_size,
            Role.EMBEDDING,
            ForwardMultiplier.INPUT,
            context,
            uses,
            tied_to,
        )

    def forward(self, tokens: Tensor) -> Tensor:
        ranks = self.context.ranks
        queue = self.context.queue
        local_ids = tokens.t() - self.start
        if ranks.tensor.size == 1:
            return look_up(local_ids, self.weight, None, queue)
        # Ids of other ranks' rows look up any valid row here, and the result is masked.
        is_local = (local_ids >= 0) & (local_ids < self.local_size)
        ids_in_range = local_ids.clamp(0, self.local_size - 1)
        partial_sum = look_up(ids_in_range, self.weight, is_local, queue)
        # Every token has its row on one rank and zeros on the others. Under sequence parallelism
        # each rank keeps only its part of S.
        return ranks.sequence.sum_with_gradient(partial_sum)

    def activation_bytes(self, sizes: MicroBatchSizes) -> int:
        """Bytes kept for backward: the ids, int64, and which of them are this tensor rank's."""
        mask_bytes = 1 if self.context.ranks.tensor.size > 1 else 0
        return sizes.tokens * (8 + mask_bytes)


class PositionEmbedding(nn.Module):
    """positions [B, S] -> [s, B, H].

    Every rank holds the whole matrix; under sequence parallelism it looks up its part of S.
    """

    def __init__(self, seq_length: int, hidden_size: int, context: LayerContext):
        super().__init__()
        self.context = context
        spec = Spec(
            Role.EMBEDDING,
            (seq_length, hidden_size),
            partial_over=context.ranks.sequence.partial_over,
            forward_multiplier=ForwardMultiplier.INPUT,
        )
        self.weight = make_parameter(spec, context.ranks)

    def forward(self, positions: Tensor) -> Tensor:
        ids = self.context.ranks.sequence.cut(positions.t())
        return look_up(ids, self.weight, None, self.context.queue)


def look_up(
    ids: Tensor, weight: nn.Parameter, is_local: Tensor | None, queue: GradientQueue
) -> Tensor:
    """Rows [s, B, H] of `weight` by ids [s, B], zero where `is_local` [s, B] is False.

    The gradient of the weight goes to the queue.
    """
    rows: Tensor = _Lookup.apply(ids, weight, is_local, queue)  # type: ignore[no-untyped-call]
    return rows


class _Lookup(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, ids: Tensor, weight: Tensor, is_local: Tensor | None, queue: GradientQueue
    ) -> Tensor:
        ctx.save_for_backward(ids, is_local)
        # The queue wants the parameter itself: what is saved may come back as another object.
        ctx.weight = weight
        ctx.queue = queue
        rows = F.embedding(ids, weight)
        if is_local is None:
            return rows
        return rows.masked_fill_(~is_local.unsqueeze(-1), 0.0)

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> tuple[None, None, None, None]:
        ids, is_local = ctx.saved_tensors
        if is_local is not None:
            # This makes a copy, as autograd may hand d_out to others, too. Tokens of other ranks
            # then add 0 to the row that was looked up in their place.
            d_out = d_out.masked_fill(~is_local.unsqueeze(-1), 0.0)
        ctx.queue.push(ctx.weight, _accumulate_rows(ids.flatten(), d_out.flatten(0, 1)))
        return None, None, None, None


def _accumulate_rows(ids: Tensor, d_rows: Tensor) -> Accumulate:
    """main_grad[ids] (+)= d_rows [T, H], in a fixed order, so that a repeated step is bit-equal."""

    def accumulate(main_grad: Tensor, first: bool) -> None:
        if first:
            # Rows that no token named would keep the gradient of the step before.
            main_grad.zero_()
        # Converted before the sum: a frequent token has many addends, which bf16 would round away.
        d_rows_accumulated = d_rows.to(main_grad.dtype)
        if main_grad.is_cuda:
            # On CUDA index_add_ adds in any order; this sorts the ids first.
            main_grad.index_put_((ids,), d_rows_accumulated, accumulate=True)
        else:
            main_grad.index_add_(0, ids, d_rows_accumulated)

    return accumulate

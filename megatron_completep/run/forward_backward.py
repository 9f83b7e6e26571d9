"""Micro-batches through the model and back, with or without a pipeline; gradients land in the queues."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_completep.config.schema import ModelConfig, ParallelConfig
from megatron_completep.model.gpt import GPT
from megatron_completep.model.stages import stage_indices
from megatron_completep.parallel.context import ParallelContext
from megatron_completep.parallel.cross_entropy import LossConfig
from megatron_completep.parallel.pipeline import Pipeline


@dataclass(frozen=True)
class MicroBatch:
    """What the model reads, on its device; labels -100 do not count."""

    tokens: Tensor  # [B, S]
    labels: Tensor  # [B, S]
    positions: Tensor | None = None  # [B, S]; None: 0 .. S-1
    document_ids: Tensor | None = None  # [B, S]; None: one document a sample
    dropout_seed: Tensor | None = None  # [1]

    def side(self) -> dict[str, Tensor]:
        """Everything but the tokens, as far as it is there."""
        named = ((f.name, getattr(self, f.name)) for f in fields(self) if f.name != "tokens")
        return {name: value for name, value in named if value is not None}


class ForwardBackward:
    """Runs the micro-batches of one step over this rank's chunks.

    Attributes:
        terms: names of what `take_terms` returns: the terms of the objective where it is more than
            the cross-entropy, then the own losses of layers. The same on every rank.
    """

    def __init__(
        self,
        chunks: Sequence[GPT],
        model: ModelConfig,
        parallel: ParallelConfig,
        context: ParallelContext,
        micro_batch_size: int,
        loss: LossConfig | None = None,
    ):
        """loss: the objective. Communicates over the pipeline, to learn of other stages' losses."""
        self.chunks = chunks
        self.context = context
        # A chunk may be a caller's own module, which reports neither terms nor own losses.
        is_gpt = isinstance(chunks[-1], GPT)
        self._loss_terms = (loss or LossConfig()).terms if is_gpt else ()
        self._own_losses = _names_of_own_losses(chunks, context) if is_gpt else ()
        self.terms = (*self._loss_terms, *self._own_losses)
        self.pipeline = None
        if context.pipeline.size > 1:
            weight = next(chunks[0].parameters())
            length = context.sequence.length(model.seq_length)
            boundary_dtype = torch.float32 if model.fp32_residual else weight.dtype
            self.pipeline = Pipeline(
                chunks,
                stage_indices(parallel, context),
                parallel.pipeline_parallel_size * parallel.virtual_pipeline_size,
                parallel.schedule,
                context,
                tokens=torch.empty(
                    micro_batch_size, model.seq_length, dtype=torch.int64, device="meta"
                ),
                boundary=torch.empty(
                    length, micro_batch_size, model.hidden_size, dtype=boundary_dtype, device="meta"
                ),
                loss_dtype=torch.float64 if weight.dtype == torch.float64 else torch.float32,
            )

    def __call__(self, micro_batches: Sequence[MicroBatch]) -> Tensor:
        """Sum of the token losses of this data rank (0 on pipeline ranks without the last stage)."""
        if self.pipeline is not None:
            tokens, side = stack(micro_batches)
            return self.pipeline.forward_backward(len(micro_batches), tokens, **side)
        total = torch.zeros((), device=self.context.device)
        for batch in micro_batches:
            loss = self.chunks[0](batch.tokens, **batch.side())
            loss.backward()
            total = total + loss.detach()
        return total

    def take_terms(self) -> Tensor:
        """This rank's share [n] of the sums of `terms` over the tokens since the last call.

        The shares of all ranks of the mesh add up to the sums: 0 where another rank counts a value.
        """
        device = self.context.device
        shares = torch.zeros(len(self._loss_terms), dtype=torch.float64, device=device)
        if self._loss_terms and self.chunks[-1].stage.last:
            sums = self.chunks[-1].unembedding.take_terms().double()
            # Every tensor rank has the whole of these sums; the first one counts them.
            shares = sums * (self.context.tensor.rank == 0)
        if not self._own_losses:
            return shares
        return torch.cat([shares, self._take_own_losses()])

    def _take_own_losses(self) -> Tensor:
        totals = dict.fromkeys(
            self._own_losses, torch.zeros((), dtype=torch.float64, device=self.context.device)
        )
        for chunk in self.chunks:
            for name, value in chunk.own_losses.take().items():
                totals[name] = totals[name] + value
        return torch.stack(list(totals.values()))

    @torch.no_grad()
    def evaluate(self, micro_batches: Sequence[MicroBatch]) -> Tensor:
        """Sum of the tokens' pure cross-entropies, without gradients."""
        if self.pipeline is not None:
            tokens, side = stack(micro_batches)
            return self.pipeline.evaluate(len(micro_batches), tokens, **side)
        return torch.stack(
            [self.chunks[0](batch.tokens, **batch.side()) for batch in micro_batches]
        ).sum()


def _names_of_own_losses(chunks: Sequence[GPT], context: ParallelContext) -> tuple[str, ...]:
    """The names that layers of any stage declared, sorted alike on every rank of the pipeline."""
    names = {name for chunk in chunks for name in chunk.own_losses.names}
    if context.pipeline.group is not None:
        names_of_stages: list[set[str]] = [set() for _ in range(context.pipeline.size)]
        dist.all_gather_object(names_of_stages, names, group=context.pipeline.group)
        names = set().union(*names_of_stages)
    return tuple(sorted(names))


def stack(micro_batches: Sequence[MicroBatch]) -> tuple[Tensor, dict[str, Tensor]]:
    """All micro-batches along the first dimension, as the pipeline library cuts them."""
    sides = [batch.side() for batch in micro_batches]
    return torch.cat([b.tokens for b in micro_batches]), {
        name: torch.cat([side[name] for side in sides]) for name in sides[0]
    }

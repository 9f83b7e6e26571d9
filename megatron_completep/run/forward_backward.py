"""The forward and backward passes of a step's micro-batches, with or without a pipeline.

Gradients of the weights go to the queues of the chunks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from megatron_completep.config.schema import ModelConfig, ParallelConfig
from megatron_completep.model.gpt import GPT
from megatron_completep.model.stages import stage_indices, whole_model
from megatron_completep.parallel.context import ParallelContext
from megatron_completep.parallel.context_part import ContextPart
from megatron_completep.parallel.cross_entropy import LossConfig
from megatron_completep.parallel.pipeline import Pipeline


@dataclass(frozen=True)
class MicroBatch:
    """What the model reads, on its device. Labels of -100 do not count.

    S tokens of each sequence, W of the whole sequence: context ranks divide it.
    """

    tokens: Tensor  # [B, S]
    labels: Tensor  # [B, S]
    positions: Tensor | None = None  # [B, S]; None: the places of the tokens in the sequence
    document_ids: Tensor | None = None  # [B, W]; None: one document a sample
    dropout_seeds: Tensor | None = None  # [1, branches + 1, 7]

    def part(self, part: ContextPart) -> MicroBatch:
        """What a context rank reads of a micro-batch of whole sequences [B, W].

        Labels were shifted before, so that the label of a chunk's last token is the first token of
        the next chunk.
        """
        if not part.split:
            return self
        return replace(
            self,
            tokens=part.cut(self.tokens),
            labels=part.cut(self.labels),
            positions=None if self.positions is None else part.cut(self.positions),
        )

    def keywords(self) -> dict[str, Tensor]:
        """What a chunk takes besides the tokens, without what is None."""
        tensors: dict[str, Tensor | None] = {
            field.name: getattr(self, field.name) for field in fields(self)
        }
        del tensors["tokens"]
        return {name: tensor for name, tensor in tensors.items() if tensor is not None}


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
        """loss: the objective."""
        self.chunks = chunks
        self.context = context
        # A chunk may be a caller's own module, which reports neither terms nor own losses.
        is_gpt = isinstance(chunks[-1], GPT)
        self._loss_terms = (loss or LossConfig()).terms if is_gpt else ()
        self._own_losses = _names_of_own_losses(chunks, context) if is_gpt else ()
        self.terms = (*self._loss_terms, *self._own_losses)
        self.pipeline: Pipeline | None = None
        if context.pipeline.size > 1:
            self.pipeline = _pipeline(chunks, model, parallel, context, micro_batch_size)

    def __call__(
        self,
        micro_batches: Sequence[MicroBatch],
        next_micro_batch: Callable[[], None] = lambda: None,
    ) -> Tensor:
        """Run forward and backward; return the sum [] of the losses of this rank's tokens.

        It is 0 on pipeline ranks that do not hold the last stage.

        next_micro_batch: called between two micro-batches; not by a pipeline, which has several
            under way.
        """
        if self.pipeline is not None:
            tokens, keywords = stack(micro_batches)
            return self.pipeline.forward_backward(len(micro_batches), tokens, **keywords)
        total = torch.zeros((), device=self.context.device)
        for number, batch in enumerate(micro_batches):
            if number > 0:
                next_micro_batch()
            loss = self.chunks[0](batch.tokens, **batch.keywords())
            loss.backward()
            total = total + loss.detach()
        return total

    def take_terms(self) -> Tensor:
        """This rank's share [n] of the sums of `terms` over the tokens since the last call.

        The shares of all ranks of the mesh add up to the sums: 0 where another rank counts a value.
        """
        device = self.context.device
        shares = torch.zeros(len(self._loss_terms), dtype=torch.float64, device=device)
        if self._loss_terms and self.chunks[-1].chunk_range.has_unembedding:
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
        """Sum [] of the tokens' cross-entropies alone, without gradients."""
        if self.pipeline is not None:
            tokens, keywords = stack(micro_batches)
            return self.pipeline.evaluate(len(micro_batches), tokens, **keywords)
        losses = [self.chunks[0](batch.tokens, **batch.keywords()) for batch in micro_batches]
        return torch.stack(losses).sum()

    def evaluate_tokens(self, micro_batches: Sequence[MicroBatch]) -> tuple[Tensor, Tensor | None]:
        """(what `evaluate` returns, the losses [n, S, B] of the single tokens in float64).

        A context rank has those of its own tokens. None on pipeline ranks that do not hold the last
        stage.
        """
        if not self.chunks[-1].chunk_range.has_unembedding:
            return self.evaluate(micro_batches), None
        with self.chunks[-1].unembedding.recording_token_losses() as token_losses:
            total = self.evaluate(micro_batches)
        batch_size, seq_length = micro_batches[0].labels.shape
        return total, torch.cat(token_losses).double().view(-1, seq_length, batch_size)


def stack(micro_batches: Sequence[MicroBatch]) -> tuple[Tensor, dict[str, Tensor]]:
    """The tokens and the keywords of all micro-batches along the first dimension.

    The pipeline library cuts them into micro-batches again.
    """
    tokens = torch.cat([batch.tokens for batch in micro_batches])
    keywords_of_all = [batch.keywords() for batch in micro_batches]
    stacked: dict[str, Tensor] = {}
    # All micro-batches of a step have the same keywords.
    for name in keywords_of_all[0]:
        stacked[name] = torch.cat([keywords[name] for keywords in keywords_of_all])
    return tokens, stacked


def _pipeline(
    chunks: Sequence[GPT],
    model: ModelConfig,
    parallel: ParallelConfig,
    context: ParallelContext,
    micro_batch_size: int,
) -> Pipeline:
    """What runs this rank's stages; meta tensors tell it the shapes that stages exchange."""
    weight = next(chunks[0].parameters())
    own_length = context.context_part.length(model.seq_length)
    length = context.sequence.length(own_length)
    boundary_dtype = torch.float32 if model.fp32_residual else weight.dtype
    return Pipeline(
        chunks,
        stage_indices(parallel, context),
        parallel.pipeline_parallel_size * parallel.virtual_pipeline_size,
        parallel.schedule,
        context,
        tokens=torch.empty(micro_batch_size, own_length, dtype=torch.int64, device="meta"),
        boundary=torch.empty(
            length, micro_batch_size, model.hidden_size, dtype=boundary_dtype, device="meta"
        ),
        loss_dtype=torch.float64 if weight.dtype == torch.float64 else torch.float32,
    )


def _names_of_own_losses(chunks: Sequence[GPT], context: ParallelContext) -> tuple[str, ...]:
    """The names that layers of any stage declare, sorted alike on every rank of the pipeline."""
    if context.pipeline.size == 1:
        return chunks[0].own_losses.names
    # Other stages may have layers with other losses: a model without memory has them all.
    chunk = chunks[0]
    return whole_model(chunk.config, chunk.table, chunk.branch_makers).own_losses.names

"""The decoder, or the part of it that one pipeline stage holds.

S sequence, s this tensor rank's share of it (S without sequence parallelism), B micro-batch, H hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megatron_completep.completep import Table
from megatron_completep.config.derived import head_dim
from megatron_completep.config.schema import ModelConfig
from megatron_completep.model.attention import AttentionInputs, KeyValueCache, causal_bias
from megatron_completep.model.block import BRANCHES, Block, BranchMaker
from megatron_completep.model.norm import StreamNorm, join_of
from megatron_completep.model.rotary import alibi_slopes, rotary_table
from megatron_completep.model.stream import Branch, Stream
from megatron_completep.parallel.context import ParallelContext
from megatron_completep.parallel.cross_entropy import LossConfig, Unembedding
from megatron_completep.parallel.embedding import PositionEmbedding, VocabParallelEmbedding
from megatron_completep.parallel.gradients import GradientQueue
from megatron_completep.parallel.layer_context import LayerContext
from megatron_completep.parallel.micro_batch import MicroBatchSizes
from megatron_completep.parallel.own_losses import LossLedger
from megatron_completep.parallel.parameter import Site
from megatron_completep.parallel.products import Products
from megatron_completep.roles import Role


@dataclass(frozen=True)
class Stage:
    """Which part of the model a chunk holds: layers [start, stop), and the ends."""

    start: int
    stop: int
    first: bool = True
    last: bool = True


class GPT(nn.Module):
    """Pre-norm decoder. Parameter names carry global layer numbers, whatever the stage."""

    def __init__(
        self,
        model: ModelConfig,
        table: Table,
        context: ParallelContext,
        stage: Stage | None = None,
        loss: LossConfig | None = None,
        recompute: str = "none",
        products: Products | None = None,
        branches: Mapping[str, BranchMaker] = BRANCHES,
    ):
        super().__init__()
        stage = stage or Stage(0, model.num_layers)
        self.config, self.table, self.context, self.stage = model, table, context, stage
        self.recompute = recompute
        self.queue = GradientQueue()
        self.own_losses = LossLedger()
        layer_context = LayerContext(context, self.queue, products or Products(), self.own_losses)
        vocabulary = model.vocab_size, model.vocab_multiple, model.hidden_size
        tied_here = model.tied_embeddings and stage.first and stage.last
        tied_to = "embedding.weight" if model.tied_embeddings and not tied_here else None
        if stage.first:
            self.embedding = VocabParallelEmbedding(
                *vocabulary, layer_context, 2 if tied_here else 1, tied_to
            )
            if model.position == "learned":
                self.positions = PositionEmbedding(
                    model.seq_length, model.hidden_size, layer_context
                )
        self.layers = nn.ModuleDict()
        for layer in range(stage.start, stage.stop):
            self.layers[str(layer)] = Block(model, table, layer_context, layer, recompute, branches)
        self.first_site = stage.start * len(branches)
        self.join = join_of(model, table)
        if stage.last:
            site = Site.TIED_LOGITS if model.tied_embeddings else None
            self.final_norm = StreamNorm(model, table, Role.FINAL_NORM, layer_context, site)
            role = Role.EMBEDDING if model.tied_embeddings else Role.UNEMBEDDING
            tied = self.embedding if tied_here else None
            multiplier = table.logit_multiplier
            self.unembedding = Unembedding(
                *vocabulary, role, layer_context, multiplier, loss or LossConfig(), tied, tied_to
            )
        self._rotary: tuple[Tensor, Tensor] | None = None

    def forward(
        self,
        x: Tensor,
        positions: Tensor | None = None,
        document_ids: Tensor | None = None,
        labels: Tensor | None = None,
        dropout_seed: Tensor | None = None,
        caches: list[KeyValueCache] | None = None,
    ) -> Tensor:
        """One micro-batch through this stage.

        x: token ids [B, S] on the first stage, else the residual stream [s, B, H] of the stage before.
        positions [B, S]: None for 0..S-1 (after what `caches` hold). document_ids [B, S]: attention stays inside a document.
        dropout_seed: int64, one element, for this micro-batch; None (validation, generation): no dropout.
        labels [B, S], -100 not counted: the last stage then returns the **sum** of the token losses (the objective; without
        gradients the pure cross-entropy), else logits [B, S, V].
        """
        residual = self._embed(x, positions, caches) if self.stage.first else x
        inputs = self._attention_inputs(residual, x, positions, document_ids, caches)
        stream = Stream(residual, self.first_site, dropout_seed)
        for _, block in self.blocks():
            if self.recompute == "full" and torch.is_grad_enabled():
                stream = self._recomputed(block, stream, inputs)
            else:
                stream = block(stream, inputs)
        if not self.stage.last:
            return stream.settle(self.join, self.queue)
        _, x = self.final_norm(stream)
        return self.unembedding(x, labels)

    @staticmethod
    def _recomputed(block: Block, stream: Stream, inputs: AttentionInputs) -> Stream:
        """What the block makes of the stream, of which backward keeps only what entered."""

        # The tensors are arguments of their own: hooks on saved tensors (counting, moving them elsewhere) see those alone.
        def run(residual: Tensor, out: Tensor | None, bias: Tensor | None) -> Stream:
            pending = None if out is None else Branch(out, bias)
            return block(stream._replace(residual=residual, pending=pending), inputs)

        out, bias = (None, None) if stream.pending is None else stream.pending
        recomputed: Stream = checkpoint(
            run, stream.residual, out, bias, use_reentrant=False, preserve_rng_state=False
        )
        return recomputed

    def blocks(self) -> list[tuple[int, Block]]:
        """(global layer number, block) of this stage, in order."""
        return [(int(index), cast(Block, block)) for index, block in self.layers.items()]

    def _embed(
        self, tokens: Tensor, positions: Tensor | None, caches: list[KeyValueCache] | None
    ) -> Tensor:
        hidden = self.embedding(tokens)
        if self.config.position == "learned":
            if positions is None:
                past = caches[0].length if caches else 0
                positions = torch.arange(
                    past, past + tokens.shape[1], device=tokens.device
                ).expand_as(tokens)
            hidden = hidden + self.positions(positions)
        if self.config.input_multiplier != 1.0:
            hidden = hidden * self.config.input_multiplier
        return hidden.float() if self.config.fp32_residual else hidden

    def _attention_inputs(self, residual, x, positions, document_ids, caches) -> AttentionInputs:
        """Angles, biases and document boundaries, once for all layers."""
        model, tensor = self.config, self.context.tensor
        seq_length = (
            x.shape[1] if self.stage.first else self.context.sequence.whole_length(x.shape[0])
        )
        past = caches[0].length if caches else 0
        cos = sin = bias = starts = None
        if model.position == "rope":
            cos, sin = self._angles(residual, positions, past, seq_length)
        flash = model.attention_backend == "flash_attention" and caches is None
        if document_ids is not None and flash:
            starts = document_starts(document_ids)
        elif document_ids is not None or model.position == "alibi" or (past and seq_length > 1):
            slopes = None
            if model.position == "alibi":
                slopes = alibi_slopes(model.num_attention_heads, residual.device).chunk(
                    tensor.size
                )[tensor.rank]
            keys = torch.arange(past + seq_length, device=residual.device)
            dtype = next(iter(self.parameters())).dtype
            bias = causal_bias(keys[past:], keys, document_ids, slopes, dtype)
        return AttentionInputs(cos, sin, bias, starts, caches)

    def _angles(
        self, residual: Tensor, positions: Tensor | None, past: int, seq_length: int
    ) -> tuple[Tensor, Tensor]:
        model, wide = self.config, residual.dtype == torch.float64
        kept = self._rotary
        if (
            kept is None
            or kept[0].device != residual.device
            or kept[0].shape[0] < past + seq_length
            or wide != (kept[0].dtype == torch.float64)
        ):
            length = max(model.seq_length, past + seq_length)
            kept = self._rotary = rotary_table(
                length, head_dim(model), model.rope_base, residual.dtype, residual.device
            )
        cos, sin = kept
        if positions is not None:
            return cos[positions.t()], sin[positions.t()]
        return cos[past : past + seq_length, None], sin[past : past + seq_length, None]

    def flops(self, seq_length: int) -> float:
        """Matrix FLOPs of this stage's forward pass, per token of a sequence of this length.

        Of the logical model, whatever tensor ranks share it: norms, rotations, softmax and the embeddings' look-ups have none.
        """
        layers = sum(block.flops(seq_length) for _, block in self.blocks())
        return layers + (self.unembedding.flops() if self.stage.last else 0.0)

    def activation_bytes(self, sizes: MicroBatchSizes) -> int:
        """Bytes that the forward pass of a micro-batch keeps on this rank for the backward pass, parameters apart."""
        total = self._bytes_of_layers(sizes)
        if self.stage.first:
            total += self.embedding.activation_bytes(sizes)
        if self.stage.last:
            total += self.final_norm.activation_bytes(sizes)
            total += self.unembedding.activation_bytes(sizes)
        return total

    def _bytes_of_layers(self, sizes: MicroBatchSizes) -> int:
        if self.recompute == "full":
            # What enters a layer is kept: the stream, and the branch that waits to join it, except before the stage's first.
            streams = len(self.layers) * sizes.stream_bytes
            pending = max(0, len(self.layers) - 1) * sizes.element_bytes
            return sizes.local_tokens * self.config.hidden_size * (streams + pending)
        total = sum(block.activation_bytes(sizes) for _, block in self.blocks())
        if (
            self.config.position == "rope"
        ):  # cos and sin, [S, D/2] each, are the same for all layers
            total += self.config.seq_length * head_dim(self.config) * sizes.wide_bytes
        return total

    def new_caches(self, batch: int, capacity: int) -> list[KeyValueCache]:
        """Empty key/value caches for `capacity` positions, one a layer."""
        attention = self.blocks()[0][1].attention
        weight = attention.qkv.weight
        shape = batch, attention.num_groups, capacity, attention.head_dim
        return [
            KeyValueCache(weight.new_empty(shape), weight.new_empty(shape)) for _ in self.layers
        ]


def document_starts(document_ids: Tensor) -> Tensor:
    """[documents + 1] int32: where each document begins in the flattened [B * S] tokens; samples never share a document."""
    change = torch.ones_like(document_ids, dtype=torch.bool)
    change[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    starts = change.flatten().nonzero().flatten()
    return torch.cat((starts, starts.new_tensor([document_ids.numel()]))).to(torch.int32)

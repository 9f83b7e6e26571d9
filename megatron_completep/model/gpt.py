"""The decoder, or the part of it that one pipeline stage holds.

Dimensions: W length of the whole sequence; S this rank's tokens of it, W / context ranks; s its
part of S under sequence parallelism, else S; B micro-batch size; H hidden size; V vocabulary size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megatron_completep import kernels
from megatron_completep.completep import Table
from megatron_completep.config.derived import PACKED_BACKENDS, head_dim
from megatron_completep.config.schema import ModelConfig
from megatron_completep.model.attention import AttentionInputs, KeyValueCache, causal_bias
from megatron_completep.model.block import BRANCHES, Block, BranchMaker
from megatron_completep.model.flash import document_parts
from megatron_completep.model.layer_graph import LayerGraphs, idle_reason
from megatron_completep.model.norm import StreamNorm, join_of
from megatron_completep.model.rotary import alibi_slopes, rotary_angles
from megatron_completep.model.stream import Branch, Stream
from megatron_completep.parallel.context import ParallelContext
from megatron_completep.parallel.cross_entropy import IGNORED, LossConfig, Unembedding
from megatron_completep.parallel.embedding import PositionEmbedding, VocabParallelEmbedding
from megatron_completep.parallel.gradients import GradientQueue
from megatron_completep.parallel.layer_context import LayerContext
from megatron_completep.parallel.micro_batch import MicroBatchSizes
from megatron_completep.parallel.own_losses import LossLedger
from megatron_completep.parallel.parameter import ForwardMultiplier
from megatron_completep.parallel.products import Products
from megatron_completep.roles import Role


@dataclass(frozen=True)
class ChunkRange:
    """The layers [start, stop) of a model chunk, and whether it holds embedding or unembedding.

    A chunk is what Megatron-LM calls a virtual stage; without interleaving a rank has one.
    """

    start: int
    stop: int
    has_embedding: bool = True
    has_unembedding: bool = True  # with the final norm


class GPT(nn.Module):
    """Pre-norm decoder. Parameter names carry global layer indices on every stage."""

    def __init__(
        self,
        model: ModelConfig,
        table: Table,
        context: ParallelContext,
        chunk_range: ChunkRange | None = None,
        loss: LossConfig | None = None,
        recompute: str = "none",
        products: Products | None = None,
        compiled: kernels.CompiledDefinitions | None = None,
        branches: Mapping[str, BranchMaker] = BRANCHES,
    ):
        super().__init__()
        chunk_range = chunk_range or ChunkRange(0, model.num_layers)
        self.config = model
        self.table = table
        self.context = context
        self.chunk_range = chunk_range
        self.recompute = recompute
        self.queue = GradientQueue()
        self.own_losses = LossLedger()
        self.join = join_of(model, table)
        self.branch_makers = branches
        # Index of this chunk's first branch in the whole model; dropout is seeded per branch.
        self.first_branch = chunk_range.start * len(branches)
        self._rotary: tuple[Tensor, Tensor] | None = None

        if model.moe is not None:
            context.make_expert_groups()
        products = products or Products()
        layer_context = LayerContext(context, self.queue, products, self.own_losses, compiled)
        if chunk_range.has_embedding:
            self._add_embeddings(layer_context)
        # The optimizer lays out parameters in reverse order of registration, which is backward
        # order, so the order here matters.
        self.layers = nn.ModuleDict()
        for layer in range(chunk_range.start, chunk_range.stop):
            self.layers[str(layer)] = Block(model, table, layer_context, layer, recompute, branches)
        self._add_layer_graphs(layer_context)
        if chunk_range.has_unembedding:
            self._add_unembedding(layer_context, loss or LossConfig())

    def _add_embeddings(self, context: LayerContext) -> None:
        model = self.config
        vocabulary = model.vocab_size, model.vocab_multiple, model.hidden_size
        # A tied weight gets two gradients per micro-batch: of the lookup and of the logits.
        uses = 2 if self._ties_here else 1
        self.embedding = VocabParallelEmbedding(*vocabulary, context, uses, self._tied_to)
        if model.position == "learned":
            self.positions = PositionEmbedding(model.seq_length, model.hidden_size, context)

    def _add_layer_graphs(self, context: LayerContext) -> None:
        """Have layers run as graphs where that is asked for and serves the model."""
        own_branches = self.branch_makers is not BRANCHES
        # Why they do not; None where they do.
        self.graphs_idle: str | None = "nothing is compiled"
        if context.compiled is not None:
            self.graphs_idle = idle_reason(self.config, context, self.recompute, own_branches)
        self.layer_graphs: LayerGraphs | None = None
        if self.graphs_idle is None:
            blocks = [block for _, block in self.blocks()]
            self.layer_graphs = LayerGraphs(self.config, blocks, context)

    def _add_unembedding(self, context: LayerContext, loss: LossConfig) -> None:
        model = self.config
        vocabulary = model.vocab_size, model.vocab_multiple, model.hidden_size
        tied = model.tied_embeddings
        multiplier = ForwardMultiplier.TIED_LOGITS if tied else None
        self.final_norm = StreamNorm(model, self.table, Role.FINAL_NORM, context, multiplier)
        self.unembedding = Unembedding(
            *vocabulary,
            Role.EMBEDDING if tied else Role.UNEMBEDDING,
            context,
            self.table.logit_multiplier,
            loss,
            self.embedding if self._ties_here else None,
            self._tied_to,
        )

    @property
    def _ties_here(self) -> bool:
        """Whether embedding and unembedding are one parameter of this chunk."""
        has_both = self.chunk_range.has_embedding and self.chunk_range.has_unembedding
        return self.config.tied_embeddings and has_both

    @property
    def _tied_to(self) -> str | None:
        """Shared name of a tied embedding held on two stages; None if it is not."""
        on_two_stages = self.config.tied_embeddings and not self._ties_here
        return "embedding.weight" if on_two_stages else None

    def forward(
        self,
        x: Tensor,
        positions: Tensor | None = None,
        document_ids: Tensor | None = None,
        labels: Tensor | None = None,
        dropout_seeds: Tensor | None = None,
        caches: list[KeyValueCache] | None = None,
    ) -> Tensor:
        """One micro-batch through this stage.

        x: token ids [B, S] on the first stage, else the residual stream [s, B, H] of the stage
            before.
        positions [S] or [B, S]: of the tokens in their documents, below model.seq_length; default:
            their places in the sequence, offset by the number of cached tokens.
        document_ids [B, W]: attention stays inside a document. Of the whole sequence: queries of a
            context rank see keys of the others.
        labels [B, S]; -100 is ignored. With labels, the last stage returns the **sum** of the token
            losses: the training objective, or under no_grad only the cross-entropy. Without, it
            returns logits [B, S, V].
        dropout_seeds: int64 [1, branches + 1, 7] of this micro-batch (`stream.dropout_seeds`); None
            disables dropout (validation, generation).
        """
        if self.chunk_range.has_embedding:
            residual = self._embed(x, positions, caches)
            seq_length = x.shape[1]
        else:
            residual = x
            seq_length = self.context.sequence.whole_length(x.shape[0])
        inputs = self._attention_inputs(residual, seq_length, positions, document_ids, caches)
        if self.config.moe is not None and labels is not None:
            counted = self.context.sequence.cut((labels != IGNORED).t())
            inputs = replace(inputs, counted=counted)
        seeds = None if dropout_seeds is None else dropout_seeds[0]
        stream = Stream(residual, self.first_branch, seeds)
        stream = self._through_layers(stream, inputs)
        if not self.chunk_range.has_unembedding:
            # The next stage receives one tensor, so the pending branch is added here, without a
            # norm.
            return stream.add_pending(self.join, self.queue)
        _, normed = self.final_norm(stream)
        result: Tensor = self.unembedding(normed, labels)
        return result

    def blocks(self) -> list[tuple[int, Block]]:
        """(global layer number, block) of this stage, in order."""
        return [(int(index), cast(Block, block)) for index, block in self.layers.items()]

    def flops(self, seq_length: int) -> float:
        """Matmul FLOPs of this stage's forward pass, per token of a sequence of this length.

        Counts the model before any tensor-parallel split. Norms, rotary embeddings, softmax and
        embedding lookups are not matmuls and are left out.
        """
        layers = sum(block.flops(seq_length) for _, block in self.blocks())
        return layers + (self.unembedding.flops() if self.chunk_range.has_unembedding else 0.0)

    def activation_bytes(self, sizes: MicroBatchSizes) -> int:
        """Bytes that a micro-batch's forward pass keeps on this rank for backward.

        Excludes parameters, and position ids, which take the memory of a single sequence.
        """
        total = self._bytes_of_layers(sizes)
        if self.chunk_range.has_embedding:
            total += self.embedding.activation_bytes(sizes)
        if self.chunk_range.has_unembedding:
            total += self.final_norm.activation_bytes(sizes)
            total += self.unembedding.activation_bytes(sizes)
        return total

    def new_caches(self, batch: int, capacity: int) -> list[KeyValueCache]:
        """One empty key/value cache per layer, each with room for `capacity` positions."""
        # With the dtype and device of the weights; a tensor rank holds only its own heads.
        attention = self.blocks()[0][1].attention
        weight = attention.qkv.weight
        shape = batch, attention.num_groups, capacity, attention.head_dim
        return [
            KeyValueCache(weight.new_empty(shape), weight.new_empty(shape)) for _ in self.layers
        ]

    def _through_layers(self, stream: Stream, inputs: AttentionInputs) -> Stream:
        if self.layer_graphs is not None and self.layer_graphs.serves(stream, inputs):
            for run in self.layer_graphs.runs:
                stream = run(stream, inputs)
            return stream
        for _, block in self.blocks():
            if self.recompute == "full" and torch.is_grad_enabled():
                stream = self._recomputed(block, stream, inputs)
            else:
                stream = block(stream, inputs)
        return stream

    @staticmethod
    def _recomputed(block: Block, stream: Stream, inputs: AttentionInputs) -> Stream:
        """Run the block under activation checkpointing: only its inputs are kept for backward."""

        # The routing is kept: choices of experts that are nearly equal could fall otherwise.
        inputs = replace(inputs, kept_routing={})

        # Pass the tensors as separate arguments: saved_tensors_hooks (offloading, byte counting)
        # see only tensor arguments, not tensors inside a Stream.
        def run(residual: Tensor, out: Tensor | None, bias: Tensor | None) -> Stream:
            pending = None if out is None else Branch(out, bias)
            entering = stream._replace(residual=residual, pending=pending)
            result: Stream = block(entering, inputs)
            return result

        out, bias = (None, None) if stream.pending is None else stream.pending
        # Dropout takes its seed from the stream: torch's random state need not be kept.
        recomputed: Stream = checkpoint(
            run, stream.residual, out, bias, use_reentrant=False, preserve_rng_state=False
        )
        return recomputed

    def _bytes_of_layers(self, sizes: MicroBatchSizes) -> int:
        if self.recompute == "full":
            # Only each layer's inputs are kept: the stream and, except for the stage's first layer,
            # the pending branch output.
            streams = len(self.layers) * sizes.stream_bytes
            pending = max(0, len(self.layers) - 1) * sizes.element_bytes
            return sizes.local_tokens * self.config.hidden_size * (streams + pending)
        total = sum(block.activation_bytes(sizes) for _, block in self.blocks())
        if self.config.position == "rope":
            # cos and sin [S, D/2], shared by all layers.
            own_length = self.context.context_part.length(self.config.seq_length)
            total += own_length * head_dim(self.config) * sizes.wide_bytes
        return total

    def _embed(
        self, tokens: Tensor, positions: Tensor | None, caches: list[KeyValueCache] | None
    ) -> Tensor:
        """tokens [B, S] -> the residual stream [s, B, H] before the first layer."""
        hidden: Tensor = self.embedding(tokens)
        if self.config.position == "learned":
            if positions is None:
                past = caches[0].length if caches else 0
                positions = self._places(tokens.shape[1], tokens.device) + past
            hidden = hidden + self.positions(positions.expand_as(tokens))
        if self.config.input_multiplier != 1.0:
            hidden = hidden * self.config.input_multiplier
        return hidden.float() if self.config.fp32_residual else hidden

    def _attention_inputs(
        self,
        residual: Tensor,
        seq_length: int,
        positions: Tensor | None,
        document_ids: Tensor | None,
        caches: list[KeyValueCache] | None,
    ) -> AttentionInputs:
        """Rotary cos and sin, attention bias and document boundaries, once for all layers.

        residual: the stream before the first layer, for its device and dtype.
        seq_length: this rank's tokens of the sequence, S.
        """
        model = self.config
        past = caches[0].length if caches else 0
        cos = None
        sin = None
        if model.position == "rope":
            cos, sin = self._rotary_inputs(residual, positions, past, seq_length)

        # SDPA needs an explicit bias for whatever is_causal cannot express: document masks, ALiBi,
        # and more than one new token after a cache. Some backends take document boundaries instead.
        bias = None
        cu_seqlens = None
        parts = None
        packed = model.attention_backend in PACKED_BACKENDS and caches is None
        alibi = model.position == "alibi"
        context = self.context.context_part
        if document_ids is not None and packed:
            assert not alibi  # refused by config/check.py
            if context.split:
                parts = document_parts(document_ids, context.chunks(document_ids.shape[1]))
            else:
                cu_seqlens = document_starts(document_ids)
        elif document_ids is not None or alibi or (past and seq_length > 1):
            slopes = self._local_slopes(residual.device) if alibi else None
            queries = past + self._places(seq_length, residual.device)
            keys = torch.arange(past + context.whole_length(seq_length), device=residual.device)
            query_documents = None if document_ids is None else context.cut(document_ids)
            dtype = next(iter(self.parameters())).dtype
            bias = causal_bias(queries, keys, query_documents, document_ids, slopes, dtype)
        return AttentionInputs(cos, sin, bias, cu_seqlens, parts, caches)

    def _places(self, seq_length: int, device: torch.device) -> Tensor:
        """int64 [S]: where this rank's tokens lie in the sequence."""
        context = self.context.context_part
        return context.places(context.whole_length(seq_length), device)

    def _local_slopes(self, device: torch.device) -> Tensor:
        """[N] ALiBi slopes of this tensor rank's heads."""
        tensor = self.context.tensor
        slopes = alibi_slopes(self.config.num_attention_heads, device)
        return slopes.chunk(tensor.size)[tensor.rank]

    def _rotary_inputs(
        self, residual: Tensor, positions: Tensor | None, past: int, seq_length: int
    ) -> tuple[Tensor, Tensor]:
        """Rotary cos and sin [S, 1 or B, D/2] at `positions`; None: at the tokens' places."""
        context = self.context.context_part
        cos, sin = self._rotary_table(residual, past + context.whole_length(seq_length))
        if positions is None and context.split:
            positions = self._places(seq_length, residual.device)
        if positions is not None:
            by_place = positions.t() if positions.dim() == 2 else positions[:, None]
            return cos[by_place], sin[by_place]
        return cos[past : past + seq_length, None], sin[past : past + seq_length, None]

    def _rotary_table(self, residual: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """Rotary cos and sin for at least `length` positions, cached between forward passes."""
        model = self.config
        if self._rotary is not None:
            cos = self._rotary[0]
            same_device = cos.device == residual.device
            table_dtype = torch.float64 if residual.dtype == torch.float64 else torch.float32
            if same_device and cos.dtype == table_dtype and cos.shape[0] >= length:
                return self._rotary
        positions = torch.arange(max(model.seq_length, length), device=residual.device)
        self._rotary = rotary_angles(positions, model, residual.dtype)
        return self._rotary


def document_starts(document_ids: Tensor) -> Tensor:
    """[documents + 1] int32: where each document begins in the flattened [B * S] tokens, and B * S.

    A new document starts at every row, even if neighbouring rows have equal ids. These are the
    cu_seqlens of flash-attn.
    """
    change = torch.ones_like(document_ids, dtype=torch.bool)
    change[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    starts = change.flatten().nonzero().flatten()
    end = starts.new_tensor([document_ids.numel()])
    return torch.cat((starts, end)).to(torch.int32)

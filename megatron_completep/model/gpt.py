"""The decoder, or the part of it that one pipeline stage holds.

S sequence, s this tensor rank's share of it (S without sequence parallelism), B micro-batch, H
hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megatron_completep import kernels
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
    """Which part of the model a chunk holds: layers [start, stop), embedding and unembedding."""

    start: int
    stop: int
    first: bool = True  # whether it holds the embedding
    last: bool = True  # whether it holds the final norm and the unembedding


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
        compiled: kernels.CompiledDefinitions | None = None,
        branches: Mapping[str, BranchMaker] = BRANCHES,
    ):
        super().__init__()
        stage = stage or Stage(0, model.num_layers)
        self.config = model
        self.table = table
        self.context = context
        self.stage = stage
        self.recompute = recompute
        self.queue = GradientQueue()
        self.own_losses = LossLedger()
        self.join = join_of(model, table)
        self.first_site = stage.start * len(branches)  # of dropout, which counts branches
        self._rotary: tuple[Tensor, Tensor] | None = None

        products = products or Products()
        layer_context = LayerContext(context, self.queue, products, self.own_losses, compiled)
        if stage.first:
            self._add_embeddings(layer_context)
        # The order in which modules are made is the order in which the optimizer lays them out.
        self.layers = nn.ModuleDict()
        for layer in range(stage.start, stage.stop):
            self.layers[str(layer)] = Block(model, table, layer_context, layer, recompute, branches)
        if stage.last:
            self._add_unembedding(layer_context, loss or LossConfig())

    def _add_embeddings(self, context: LayerContext) -> None:
        model = self.config
        vocabulary = model.vocab_size, model.vocab_multiple, model.hidden_size
        uses = 2 if self._ties_here else 1
        self.embedding = VocabParallelEmbedding(*vocabulary, context, uses, self._tied_to)
        if model.position == "learned":
            self.positions = PositionEmbedding(model.seq_length, model.hidden_size, context)

    def _add_unembedding(self, context: LayerContext, loss: LossConfig) -> None:
        model = self.config
        vocabulary = model.vocab_size, model.vocab_multiple, model.hidden_size
        tied = model.tied_embeddings
        site = Site.TIED_LOGITS if tied else None
        self.final_norm = StreamNorm(model, self.table, Role.FINAL_NORM, context, site)
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
        """Whether embedding and unembedding are one parameter of this stage."""
        return self.config.tied_embeddings and self.stage.first and self.stage.last

    @property
    def _tied_to(self) -> str | None:
        """The name under which tied embeddings on two stages are one."""
        on_two_stages = self.config.tied_embeddings and not self._ties_here
        return "embedding.weight" if on_two_stages else None

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

        x: token ids [B, S] on the first stage, else the residual stream [s, B, H] of the stage
            before.
        positions [B, S]: None for 0..S-1 (after what `caches` hold).
        document_ids [B, S]: attention stays inside a document.
        labels [B, S], -100 not counted: the last stage then returns the **sum** of the token losses
            (the objective; without gradients the pure cross-entropy), else logits [B, S, V].
        dropout_seed: int64, one element, for this micro-batch; None (validation, generation): no
            dropout.
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
            # One tensor is sent: the pending branch is added here, without a norm.
            return stream.settle(self.join, self.queue)
        _, normed = self.final_norm(stream)
        result: Tensor = self.unembedding(normed, labels)
        return result

    def blocks(self) -> list[tuple[int, Block]]:
        """(global layer number, block) of this stage, in order."""
        return [(int(index), cast(Block, block)) for index, block in self.layers.items()]

    def flops(self, seq_length: int) -> float:
        """Matrix FLOPs of this stage's forward pass, per token of a sequence of this length.

        Of the logical model, whatever tensor ranks share it. Norms, rotations, softmax and the
        embeddings' look-ups are no matrix products.
        """
        layers = sum(block.flops(seq_length) for _, block in self.blocks())
        return layers + (self.unembedding.flops() if self.stage.last else 0.0)

    def activation_bytes(self, sizes: MicroBatchSizes) -> int:
        """Bytes that a micro-batch's forward pass keeps on this rank for backward.

        Without parameters, and without position ids, which are those of one sequence.
        """
        total = self._bytes_of_layers(sizes)
        if self.stage.first:
            total += self.embedding.activation_bytes(sizes)
        if self.stage.last:
            total += self.final_norm.activation_bytes(sizes)
            total += self.unembedding.activation_bytes(sizes)
        return total

    def new_caches(self, batch: int, capacity: int) -> list[KeyValueCache]:
        """Empty key/value caches for `capacity` positions, one a layer."""
        # In the type and on the device of the weights; a tensor rank holds its own heads.
        attention = self.blocks()[0][1].attention
        weight = attention.qkv.weight
        shape = batch, attention.num_groups, capacity, attention.head_dim
        return [
            KeyValueCache(weight.new_empty(shape), weight.new_empty(shape)) for _ in self.layers
        ]

    @staticmethod
    def _recomputed(block: Block, stream: Stream, inputs: AttentionInputs) -> Stream:
        """What the block makes of the stream, of which backward keeps only what entered."""

        # The tensors are arguments of their own: hooks on saved tensors, which count them or move
        # them elsewhere, see those alone.
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
            # Of a layer only what enters is kept: the stream and, except in the stage's first
            # layer, the branch that waits to join it.
            streams = len(self.layers) * sizes.stream_bytes
            pending = max(0, len(self.layers) - 1) * sizes.element_bytes
            return sizes.local_tokens * self.config.hidden_size * (streams + pending)
        total = sum(block.activation_bytes(sizes) for _, block in self.blocks())
        if self.config.position == "rope":
            # cos and sin, [S, D/2] each, which all layers share.
            total += self.config.seq_length * head_dim(self.config) * sizes.wide_bytes
        return total

    def _embed(
        self, tokens: Tensor, positions: Tensor | None, caches: list[KeyValueCache] | None
    ) -> Tensor:
        """tokens [B, S] -> the residual stream [s, B, H] before the first layer."""
        hidden: Tensor = self.embedding(tokens)
        if self.config.position == "learned":
            if positions is None:
                start = caches[0].length if caches else 0
                stop = start + tokens.shape[1]
                positions = torch.arange(start, stop, device=tokens.device).expand_as(tokens)
            hidden = hidden + self.positions(positions)
        if self.config.input_multiplier != 1.0:
            hidden = hidden * self.config.input_multiplier
        return hidden.float() if self.config.fp32_residual else hidden

    def _attention_inputs(
        self,
        residual: Tensor,
        x: Tensor,
        positions: Tensor | None,
        document_ids: Tensor | None,
        caches: list[KeyValueCache] | None,
    ) -> AttentionInputs:
        """Angles, biases and document boundaries, once for all layers.

        x: what the stage was given, for the length of the sequence.
        """
        model = self.config
        if self.stage.first:
            seq_length = x.shape[1]
        else:
            seq_length = self.context.sequence.whole_length(x.shape[0])
        past = caches[0].length if caches else 0
        cos = sin = bias = starts = None
        if model.position == "rope":
            cos, sin = self._angles(residual, positions, past, seq_length)

        # SDPA needs a bias for all that plain causal attention does not say: documents, ALiBi, and
        # several new tokens behind a cache. flash-attn takes the boundaries of documents instead.
        flash = model.attention_backend == "flash_attention" and caches is None
        alibi = model.position == "alibi"
        if document_ids is not None and flash:
            starts = document_starts(document_ids)
        elif document_ids is not None or alibi or (past and seq_length > 1):
            slopes = self._local_slopes(residual.device) if alibi else None
            keys = torch.arange(past + seq_length, device=residual.device)
            dtype = next(iter(self.parameters())).dtype
            bias = causal_bias(keys[past:], keys, document_ids, slopes, dtype)
        return AttentionInputs(cos, sin, bias, starts, caches)

    def _local_slopes(self, device: torch.device) -> Tensor:
        """[N] ALiBi slopes of this tensor rank's heads."""
        tensor = self.context.tensor
        slopes = alibi_slopes(self.config.num_attention_heads, device)
        return slopes.chunk(tensor.size)[tensor.rank]

    def _angles(
        self, residual: Tensor, positions: Tensor | None, past: int, seq_length: int
    ) -> tuple[Tensor, Tensor]:
        """cos and sin, each [S, 1 or B, D/2], of the positions or of `past` and those behind it."""
        cos, sin = self._rotary_table(residual, past + seq_length)
        if positions is not None:
            return cos[positions.t()], sin[positions.t()]
        return cos[past : past + seq_length, None], sin[past : past + seq_length, None]

    def _rotary_table(self, residual: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """cos and sin of at least `length` positions, kept from one forward pass to the next."""
        model = self.config
        if self._rotary is not None:
            cos = self._rotary[0]
            same_device = cos.device == residual.device
            same_width = (cos.dtype == torch.float64) == (residual.dtype == torch.float64)
            if same_device and same_width and cos.shape[0] >= length:
                return self._rotary
        self._rotary = rotary_table(
            max(model.seq_length, length),
            head_dim(model),
            model.rope_base,
            residual.dtype,
            residual.device,
        )
        return self._rotary


def document_starts(document_ids: Tensor) -> Tensor:
    """[documents + 1] int32: where each document begins in the flattened [B * S] tokens.

    Samples never share a document.
    """
    change = torch.ones_like(document_ids, dtype=torch.bool)
    change[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    starts = change.flatten().nonzero().flatten()
    end = starts.new_tensor([document_ids.numel()])
    return torch.cat((starts, end)).to(torch.int32)

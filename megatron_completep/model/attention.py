"""Causal self-attention with grouped queries, by torch's SDPA or by flash-attn.

S sequence, B micro-batch, H hidden, N local query heads, G local query groups, D head dim.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import sdpa_kernel
from torch.nn.attention.bias import CausalBias, causal_lower_right
from torch.utils.checkpoint import checkpoint

from megatron_completep import kernels
from megatron_completep.completep import Table
from megatron_completep.config.derived import has_qkv_bias, head_dim, num_query_groups
from megatron_completep.config.schema import ModelConfig
from megatron_completep.model.attention_kernels import AttentionCall, choose_kernels
from megatron_completep.model.flash import (
    DocumentPart,
    attention_by_document,
    attention_by_part,
    flash_attention,
)
from megatron_completep.model.norm import Norm
from megatron_completep.model.stream import Branch
from megatron_completep.model.wide_attention import float32_attention, pays_in_float32
from megatron_completep.parallel.context_part import ContextPart, Gathering
from megatron_completep.parallel.layer_context import LayerContext
from megatron_completep.parallel.linear import ColumnParallelLinear, RowParallelLinear
from megatron_completep.parallel.micro_batch import MicroBatchSizes
from megatron_completep.parallel.parameter import ForwardMultiplier, spec_of
from megatron_completep.roles import Role


@dataclass
class KeyValueCache:
    """Keys and values of one layer, each [B, G, capacity, D], filled up to `length`."""

    keys: Tensor
    values: Tensor
    length: int = 0

    def extend(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append k and v [B, G, S, D]; returns all keys and values, each [B, G, length, D]."""
        end = self.length + k.shape[2]
        self.keys[:, :, self.length : end] = k
        self.values[:, :, self.length : end] = v
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]


@dataclass(frozen=True)
class AttentionInputs:
    """What all layers of a forward pass share.

    cos, sin: of the rotary angles, [S, 1 or B, D/2]; None without rotary positions.
    bias: added to the attention logits, [1 or B, 1 or N, S, S_keys]; None: plain causal attention.
        Context ranks: of their own queries, and of the keys of the whole sequence in its order.
    document_starts: [documents + 1] int32 over the B * S tokens, for backends that take these.
    document_parts: the same for context ranks, whose queries see keys of other ranks.
    caches: one per layer, in generation.
    counted: bool [s, B], of the tokens of this rank's part of the stream whose loss counts; None:
        all do. Experts count their loads by it.
    kept_routing: what experts were chosen, by layer, where the forward pass is recomputed.
    """

    cos: Tensor | None = None
    sin: Tensor | None = None
    bias: Tensor | None = None
    document_starts: Tensor | None = None
    document_parts: list[DocumentPart] | None = None
    caches: list[KeyValueCache] | None = None
    counted: Tensor | None = None
    kept_routing: dict[int, Tensor] | None = None


class Attention(nn.Module):
    """The attention branch: x [s, B, H] -> [s, B, H].

    layer: its number in the whole model, from 0.
    recompute_selectively: backward recomputes the scores and their product with the values.
    """

    def __init__(
        self,
        model: ModelConfig,
        table: Table,
        context: LayerContext,
        layer: int,
        recompute_selectively: bool = False,
    ):
        super().__init__()
        hidden = model.hidden_size
        size = head_dim(model)
        groups = num_query_groups(model)
        tensor_ranks = context.ranks.tensor.size
        self.layer = layer
        self.recompute_selectively = recompute_selectively
        self.compiled = context.compiled
        self.context_part = context.ranks.context_part
        self.divides_sequence = self.context_part.split  # read in every forward pass
        self.head_dim = size
        self.scale = table.attention_scale
        self.backend = model.attention_backend
        self.num_heads = model.num_attention_heads // tensor_ranks
        self.num_groups = groups // tensor_ranks

        width = model.num_attention_heads * size
        self.qkv = ColumnParallelLinear(
            hidden,
            {"q": width, "k": groups * size, "v": groups * size},
            table.base_hidden_size,
            has_qkv_bias(model),
            context,
            # The attention scale multiplies the output of the query weights, unless a norm is
            # between them.
            query_part=None if model.qk_norm else "q",
            heads={"q": model.num_attention_heads, "k": groups, "v": groups},
        )
        # The proxy's heads have the same share of its hidden size as this model's.
        base_width = max(1, round(width * table.base_hidden_size / hidden))
        self.output = RowParallelLinear(width, hidden, base_width, model.bias, context)
        self.q_norm: Norm | None = None
        self.k_norm: Norm | None = None
        if model.qk_norm:
            self.q_norm = qk_norm(model, context, ForwardMultiplier.QUERY)
            self.k_norm = qk_norm(model, context)

    def forward(self, x: Tensor, inputs: AttentionInputs) -> Branch:
        """x [s, B, H] -> the branch's output [s, B, H] and its bias."""
        q, k, v = self._heads(self.qkv(x), inputs)
        if inputs.caches is not None:
            k, v = inputs.caches[self.layer].extend(k, v)
        if self.divides_sequence:
            mixed = self._attend_over_ranks(q, k, v, inputs)
        else:
            mixed = self._recomputed(attend, q, k, v, inputs, self.scale, self.backend)
        # [B, N, S, D] -> [S, B, N D], the layout of the stream.
        out = self.output(mixed.permute(2, 0, 1, 3).flatten(2))
        return Branch(out, self.output.bias)

    @property
    def modules_read(self) -> tuple[nn.Module, ...]:
        """The modules whose parameters this one reads itself: see `Shards._wait_in_forward`."""
        return tuple(norm for norm in (self.q_norm, self.k_norm) if norm is not None)

    def flops(self, seq_length: int) -> float:
        """Matrix FLOPs of the forward pass per token, of all heads: projections, scores, mixing."""
        width = spec_of(self.output.weight).shape[1]
        keys = (seq_length + 1) / 2  # that a token sees on average: the causal half of the square
        scores_and_mixing = 2 * (2 * width * keys)
        return self.qkv.flops() + scores_and_mixing + self.output.flops()

    def activation_bytes(self, sizes: MicroBatchSizes) -> int:
        """Bytes kept for backward: the projections' inputs, the heads, statistics of their rows."""
        qkv = sizes.tokens * self.qkv.weight.shape[0] * sizes.element_bytes
        total = self.qkv.activation_bytes(sizes) + qkv + self.output.activation_bytes(sizes)
        # The inputs of QK-norm are views of QKV; what it makes of them is new.
        for norm, heads in ((self.q_norm, self.num_heads), (self.k_norm, self.num_groups)):
            if norm is not None:
                rows = sizes.tokens * heads
                total += rows * self.head_dim * sizes.element_bytes
                total += norm.statistics_bytes(rows, sizes)
        if not self.recompute_selectively:
            total += sizes.tokens * self.num_heads * 4  # a logsumexp, float32 in every precision
            if self.context_part.split:
                # Keys and values of the whole sequence, and the output of each chunk before they
                # are put side by side.
                gathered_rows = sizes.whole_tokens * 2 * self.num_groups
                output_rows = sizes.tokens * self.num_heads
                total += (gathered_rows + output_rows) * self.head_dim * sizes.element_bytes
        elif self.context_part.split:
            # This rank's keys and values side by side, which are gathered again.
            own_rows = sizes.tokens * 2 * self.num_groups
            total += own_rows * self.head_dim * sizes.element_bytes
        return total

    def _attend_over_ranks(
        self, q: Tensor, k: Tensor, v: Tensor, inputs: AttentionInputs
    ) -> Tensor:
        """`attend` to the whole sequence, of which this rank has a part: some heads at a time.

        While one lot of heads attends, keys and values of the next are gathered, and in backward
        the gradients of the one before are summed.
        """
        part = self.context_part
        lots = head_lots(self.num_groups, part.heads_at_once)
        copies = self.num_heads // self.num_groups
        mixed = []
        coming = start_gather(k, v, lots[0], part)
        for number, lot in enumerate(lots):
            gathering = coming
            if number + 1 < len(lots):
                coming = start_gather(k, v, lots[number + 1], part)
            heads = slice(lot.start * copies, lot.stop * copies)
            lot_inputs = inputs
            if inputs.bias is not None and inputs.bias.shape[1] > 1:
                lot_inputs = replace(inputs, bias=inputs.bias[:, heads])
            arguments = (q[:, heads], gathering.sent, gathering, lot_inputs)
            mixed.append(
                self._recomputed(attend_to_gathered, *arguments, self.scale, self.backend, part)
            )
        return mixed[0] if len(mixed) == 1 else torch.cat(mixed, dim=1)

    def _recomputed(self, function: Callable[..., Tensor], *arguments: Any) -> Tensor:
        """The function's result; under selective recomputation backward computes it again."""
        if not (self.recompute_selectively and torch.is_grad_enabled()):
            return function(*arguments)
        # Attention proper draws no random numbers, so their state need not be kept.
        result: Tensor = checkpoint(
            function, *arguments, use_reentrant=False, preserve_rng_state=False
        )
        return result

    def _heads(self, qkv: Tensor, inputs: AttentionInputs) -> tuple[Tensor, Tensor, Tensor]:
        """[S, B, (N + 2G) D] -> q [B, N, S, D], k and v [B, G, S, D], normed and rotated."""
        cos = inputs.cos
        sin = inputs.sin
        heads = (self.num_heads, self.num_groups, self.head_dim)
        if self.q_norm is None or self.k_norm is None:
            q, k, v = _SplitHeads.apply(  # type: ignore[no-untyped-call]
                qkv, cos, sin, *heads, self.compiled
            )
        elif cos is not None and sin is not None:
            # One pass reads the projection and writes what attention reads.
            q, k, v = kernels.normed_heads(
                qkv.view(*qkv.shape[:-1], self.num_heads + 2 * self.num_groups, self.head_dim),
                self.q_norm.weight,
                self.k_norm.weight,
                cos,
                sin,
                self.num_heads,
                self.q_norm.norm,
                self.q_norm.queue,
            )
        else:
            q, k, v = _SplitHeads.apply(  # type: ignore[no-untyped-call]
                qkv, None, None, *heads, self.compiled
            )
            q = self.q_norm(q)
            k = self.k_norm(k)
        return q.permute(1, 2, 0, 3), k.permute(1, 2, 0, 3), v.permute(1, 2, 0, 3)


def qk_norm(
    model: ModelConfig, context: LayerContext, forward_multiplier: ForwardMultiplier | None = None
) -> Norm:
    """A norm over the elements of a head, with one gain for all heads.

    A tensor rank sees only its own heads, so its gradient of the gain must be summed over ranks.
    """
    tensor = context.ranks.tensor
    partial_over = tensor.name if tensor.size > 1 else None
    norm = kernels.Norm("rmsnorm", model.norm_eps)
    return Norm(
        head_dim(model), Role.QK_NORM, norm, False, context, partial_over, forward_multiplier
    )


def attend(
    q: Tensor, k: Tensor, v: Tensor, inputs: AttentionInputs, scale: float, backend: str
) -> Tensor:
    """Attention proper: q [B, N, S, D], k and v [B, G, S_keys, D] -> [B, N, S, D].

    Causal; if `inputs` has a bias, that holds the mask and whatever else is added to the logits.
    """
    if inputs.document_starts is not None:
        return attention_by_document(q, k, v, scale, backend, inputs.document_starts)
    if backend == "flash_attention" and inputs.caches is None:
        return flash_attention(q, k, v, scale)
    # One query (the next token of a generation) sees all keys.
    causal = inputs.bias is None and q.shape[2] > 1
    if causal and pays_in_float32(q, k):
        return float32_attention(q, k, v, scale)
    return scaled_dot_product(
        q, k, v, inputs.bias, scale, backend, causal, inputs.caches is not None
    )


def attend_to_gathered(
    q: Tensor,
    sent: Tensor,
    gathering: Gathering,
    inputs: AttentionInputs,
    scale: float,
    backend: str,
    part: ContextPart,
) -> Tensor:
    """The same for a part of a sequence that context ranks share: q [B, N, S, D] -> [B, N, S, D].

    sent: [S, B, 2G, D], this rank's keys and values, which `gathering` brings to all ranks.
    """
    # [W, B, 2G, D]
    k, v = gathering.finish(sent).permute(1, 2, 0, 3).chunk(2, dim=1)
    chunks = part.chunks(k.shape[2])
    if inputs.document_parts is not None:
        return attention_by_part(q, k, v, scale, backend, inputs.document_parts)
    if inputs.bias is None:
        return attend_to_prefixes(q, k, v, scale, backend, chunks)
    return scaled_dot_product(q, k, v, inputs.bias, scale, backend)


def head_lots(groups: int, at_once: int | None) -> list[range]:
    """The groups of keys and values of a rank in lots of `at_once`; None: in one."""
    size = at_once or groups
    return [range(first, first + size) for first in range(0, groups, size)]


def start_gather(k: Tensor, v: Tensor, lot: range, part: ContextPart) -> Gathering:
    """Begin to gather a lot of the groups of k and v [B, G, S, D], both at once.

    Communicates over the context axis.
    """
    heads = slice(lot.start, lot.stop)
    local_heads = [x[:, heads].permute(2, 0, 1, 3) for x in (k, v)]  # [S, B, G of the lot, D]
    return part.start_gather(torch.cat(local_heads, dim=2))


def attend_to_prefixes(
    q: Tensor, k: Tensor, v: Tensor, scale: float, backend: str, chunks: Sequence[range]
) -> Tensor:
    """Causal attention of some chunks of a sequence: q [B, N, S, D] -> [B, N, S, D].

    One call a chunk, which attends to the sequence up to its own end, so that no kernel needs a
    mask in memory.

    k, v: [B, G, W, D], in the order of the sequence. chunks: places in it of the S queries.
    """
    mixed = []
    first = 0
    for chunk in chunks:
        queries = q[:, :, first : first + len(chunk)]
        keys = k[:, :, : chunk.stop]
        values = v[:, :, : chunk.stop]
        if backend == "flash_attention":
            mixed.append(flash_attention(queries, keys, values, scale))
        else:
            mask = prefix_mask(len(chunk), chunk.stop, q.device)
            mixed.append(scaled_dot_product(queries, keys, values, mask, scale, backend))
        first += len(chunk)
    return torch.cat(mixed, dim=2)


def prefix_mask(queries: int, keys: int, device: torch.device) -> Tensor:
    """The causal mask [queries, keys] under which the last query sees every key.

    On a GPU kernels know torch's own value of it without a mask in memory.
    """
    if device.type == "cuda":
        return causal_lower_right(queries, keys)
    every_key = torch.ones(queries, keys, dtype=torch.bool, device=device)
    return every_key.tril(keys - queries)


def scaled_dot_product(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scale: float,
    backend: str,
    causal: bool = False,
    cached: bool = False,
) -> Tensor:
    """torch's attention, by the kernels that `choose_kernels` lets it take.

    mask: a bias, or torch's `CausalBias`, which kernels know without reading it.
    """
    is_bias = mask is not None and not isinstance(mask, CausalBias)
    call = AttentionCall(
        device_type=q.device.type,
        queries=q.shape[2],
        keys=k.shape[2],
        masked=is_bias,
        grouped=q.shape[1] != k.shape[1],
        trains=torch.is_grad_enabled(),
        cached=cached,
    )
    choice = choose_kernels(backend, call)
    if choice.expand:
        copies = q.shape[1] // k.shape[1]
        k = k.repeat_interleave(copies, dim=1)
        v = v.repeat_interleave(copies, dim=1)
    grouped = q.shape[1] != k.shape[1]
    options: dict[str, Any] = {
        "attn_mask": mask,
        "is_causal": causal,
        "scale": scale,
        "enable_gqa": grouped,
    }
    # Entering the context takes host time, which most calls need not pay.
    if not choice.kernels:
        return F.scaled_dot_product_attention(q, k, v, **options)
    with sdpa_kernel(list(choice.kernels), set_priority=True):
        return F.scaled_dot_product_attention(q, k, v, **options)


class _SplitHeads(torch.autograd.Function):
    """Views of one QKV buffer, of which queries and keys are rotated in place.

    Backward writes the three gradients into one buffer and rotates back. cos None: no rotation.
    """

    @staticmethod
    def forward(
        ctx: Any,
        qkv: Tensor,
        cos: Tensor | None,
        sin: Tensor | None,
        num_heads: int,
        num_groups: int,
        head_dim: int,
        compiled: kernels.CompiledDefinitions | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        heads = qkv.detach().view(*qkv.shape[:-1], num_heads + 2 * num_groups, head_dim)
        if cos is not None and sin is not None:
            rotated = heads[:, :, : num_heads + num_groups]
            kernels.rotary_(rotated, cos, sin, False, compiled)
        ctx.compiled = compiled
        ctx.save_for_backward(cos, sin)
        q, k, v = heads.split_with_sizes((num_heads, num_groups, num_groups), dim=2)
        return q, k, v

    @staticmethod
    def backward(ctx: Any, d_q: Tensor, d_k: Tensor, d_v: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        d_heads = kernels.join_heads(d_q, d_k, d_v, cos, sin, ctx.compiled)
        return d_heads.flatten(2), None, None, None, None, None, None


def causal_bias(
    query_positions: Tensor,
    key_positions: Tensor,
    query_documents: Tensor | None,
    key_documents: Tensor | None,
    slopes: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """Additive attention bias [1 or B, 1 or N, Sq, Sk].

    It is -inf for keys of the future or of another document, else ALiBi's penalty on the distance
    (0 without slopes).

    query_documents, key_documents: [B, Sq] and [B, Sk], the document of each token; None: one
        document. slopes [N]: of local heads.
    """
    distance = query_positions[:, None] - key_positions[None, :]
    # [1, 1, Sq, Sk]; documents make the first dimension B, slopes the second N.
    allowed = (distance >= 0)[None, None]
    if query_documents is not None and key_documents is not None:
        same_document = query_documents[:, None, :, None] == key_documents[:, None, None, :]
        allowed = allowed & same_document
    if slopes is None:
        bias = torch.zeros((), dtype=dtype, device=distance.device)
    else:
        bias = (-slopes[:, None, None] * distance).to(dtype)[None]
    return torch.where(allowed, bias, float("-inf"))

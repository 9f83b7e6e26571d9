"""Causal self-attention with grouped queries, dispatched to torch SDPA or, where installed, flash-attn.

S sequence, B micro-batch, H hidden, N local query heads, G local query groups, D head dim.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megatron_completep import kernels
from megatron_completep.completep import Table
from megatron_completep.config.derived import head_dim, num_query_groups
from megatron_completep.config.schema import ModelConfig
from megatron_completep.model.flash import flash_attention
from megatron_completep.model.norm import Norm
from megatron_completep.model.stream import Branch
from megatron_completep.parallel.layer_context import LayerContext
from megatron_completep.parallel.linear import ColumnParallelLinear, RowParallelLinear
from megatron_completep.parallel.micro_batch import MicroBatchSizes
from megatron_completep.parallel.parameter import Site, spec_of
from megatron_completep.roles import Role


@dataclass
class KeyValueCache:
    """Keys and values of one layer, each [B, G, capacity, D], filled up to `length`."""

    keys: Tensor
    values: Tensor
    length: int = 0

    def extend(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append k, v [B, G, S, D]; returns everything held so far."""
        end = self.length + k.shape[2]
        self.keys[:, :, self.length : end], self.values[:, :, self.length : end] = k, v
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]


@dataclass(frozen=True)
class AttentionInputs:
    """What all layers of a forward pass share."""

    cos: Tensor | None = None  # [S, 1 or B, D/2]
    sin: Tensor | None = None
    bias: Tensor | None = (
        None  # added to the attention logits, [1 or B, 1 or N, S, S_keys]; None: plain causal
    )
    document_starts: Tensor | None = (
        None  # [documents + 1] int32 over the B*S tokens: flash-attn's variable lengths
    )
    caches: list[KeyValueCache] | None = None  # one a layer, for generation


class Attention(nn.Module):
    """The attention branch: x [s, B, H] -> [s, B, H]. layer: its number in the whole model, from 0."""

    def __init__(
        self,
        model: ModelConfig,
        table: Table,
        context: LayerContext,
        layer: int,
        recompute: bool = False,
    ):
        super().__init__()
        self.layer = layer
        self.recompute = recompute
        self.attend = attend
        hidden = model.hidden_size
        size = head_dim(model)
        groups = num_query_groups(model)
        width = model.num_attention_heads * size
        self.head_dim = size
        self.scale = table.attention_scale
        self.backend = model.attention_backend
        self.num_heads = model.num_attention_heads // context.ranks.tensor.size
        self.num_groups = groups // context.ranks.tensor.size
        self.qkv = ColumnParallelLinear(
            hidden,
            {"q": width, "k": groups * size, "v": groups * size},
            table.base_hidden_size,
            model.bias,
            context,
            query_part=None if model.qk_norm else "q",
        )
        base_width = max(1, round(width * table.base_hidden_size / hidden))
        self.output = RowParallelLinear(width, hidden, base_width, model.bias, context)
        self.q_norm: Norm | None = None
        self.k_norm: Norm | None = None
        if model.qk_norm:
            self.q_norm = qk_norm(model, context, Site.QUERY)
            self.k_norm = qk_norm(model, context)

    def forward(self, x: Tensor, inputs: AttentionInputs) -> Branch:
        q, k, v = self._heads(self.qkv(x), inputs)
        if inputs.caches is not None:
            k, v = inputs.caches[self.layer].extend(k, v)
        if self.recompute and torch.is_grad_enabled():
            mixed = checkpoint(
                self.attend,
                *(q, k, v, inputs, self.scale, self.backend),
                use_reentrant=False,
                preserve_rng_state=False,
            )
        else:
            mixed = self.attend(q, k, v, inputs, self.scale, self.backend)
        out = self.output(mixed.permute(2, 0, 1, 3).flatten(2))
        return Branch(out, self.output.bias)

    def _heads(self, qkv: Tensor, inputs: AttentionInputs) -> tuple[Tensor, Tensor, Tensor]:
        """[S, B, (N + 2G) D] -> q [B, N, S, D], k and v [B, G, S, D], with QK-norm and rotation applied."""
        normed = self.q_norm is not None
        cos, sin = (None, None) if normed else (inputs.cos, inputs.sin)
        q, k, v = _SplitHeads.apply(qkv, cos, sin, self.num_heads, self.num_groups, self.head_dim)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
            if inputs.cos is not None and inputs.sin is not None:
                q, k = (
                    kernels.rotary(q, inputs.cos, inputs.sin),
                    kernels.rotary(k, inputs.cos, inputs.sin),
                )
        return q.permute(1, 2, 0, 3), k.permute(1, 2, 0, 3), v.permute(1, 2, 0, 3)

    def flops(self, seq_length: int) -> float:
        """Matrix FLOPs of the forward pass a token, of all heads: projections, scores and mixing."""
        width = spec_of(self.output.weight).shape[1]
        keys = (seq_length + 1) / 2  # that a token sees on average: the causal half of the square
        scores_and_mixing = 2 * (2 * width * keys)
        return self.qkv.flops() + scores_and_mixing + self.output.flops()

    def activation_bytes(self, sizes: MicroBatchSizes) -> int:
        """Bytes kept for backward: inputs of the projections, the heads, and statistics of their rows."""
        qkv = sizes.tokens * self.qkv.weight.shape[0] * sizes.element_bytes
        total = self.qkv.activation_bytes(sizes) + qkv + self.output.activation_bytes(sizes)
        # The inputs of QK-norm are views of QKV; what it makes of them is new.
        for norm, heads in ((self.q_norm, self.num_heads), (self.k_norm, self.num_groups)):
            if norm is not None:
                rows = sizes.tokens * heads
                total += rows * self.head_dim * sizes.element_bytes
                total += norm.statistics_bytes(rows, sizes)
        if not self.recompute:
            total += sizes.tokens * self.num_heads * 4  # a logsumexp, float32 in every precision
        return total


def qk_norm(model: ModelConfig, context: LayerContext, site: Site | None = None) -> Norm:
    """A norm over the elements of a head; a tensor rank sees its own heads, and all share the gain."""
    tensor = context.ranks.tensor
    partial_over = tensor.name if tensor.size > 1 else None
    return Norm(
        head_dim(model),
        Role.QK_NORM,
        kernels.Norm("rmsnorm", model.norm_eps),
        False,
        context,
        partial_over,
        site,
    )


def attend(
    q: Tensor, k: Tensor, v: Tensor, inputs: AttentionInputs, scale: float, backend: str
) -> Tensor:
    """Attention proper: q [B, N, S, D], k and v [B, G, S_keys, D] -> [B, N, S, D]; causal unless the bias says more."""
    if backend == "flash_attention" and inputs.caches is None:
        return flash_attention(q, k, v, scale, inputs.document_starts)
    causal = inputs.bias is None and q.shape[2] > 1
    grouped = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=inputs.bias, is_causal=causal, scale=scale, enable_gqa=grouped
    )


class _SplitHeads(torch.autograd.Function):
    """Views of one QKV buffer, rotated in place; backward writes the three gradients into one buffer and rotates back."""

    @staticmethod
    def forward(ctx, qkv, cos, sin, num_heads: int, num_groups: int, head_dim: int):
        heads = qkv.detach().unflatten(-1, (num_heads + 2 * num_groups, head_dim))
        if cos is not None:
            kernels.rotary_(heads[:, :, : num_heads + num_groups], cos, sin, False)
        ctx.save_for_backward(cos, sin)
        ctx.sizes = num_heads, num_groups, num_groups
        return heads.split(ctx.sizes, dim=2)

    @staticmethod
    def backward(ctx, d_q, d_k, d_v):
        cos, sin = ctx.saved_tensors
        d_heads = torch.cat((d_q, d_k, d_v), dim=2)
        if cos is not None:
            kernels.rotary_(d_heads[:, :, : ctx.sizes[0] + ctx.sizes[1]], cos, sin, True)
        return d_heads.flatten(2), None, None, None, None, None


def causal_bias(
    query_positions: Tensor,
    key_positions: Tensor,
    documents: Tensor | None,
    slopes: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """Additive attention bias [1 or B, 1 or N, Sq, Sk]: -inf on the future and on other documents, ALiBi's distance elsewhere.

    `documents` [B, S] gives each token's document; `slopes` [N] the local heads' ALiBi slopes.
    """
    distance = query_positions[:, None] - key_positions[None, :]
    allowed = (distance >= 0)[None, None]
    if documents is not None:
        allowed = allowed & (documents[:, None, :, None] == documents[:, None, None, :])
    zero = torch.zeros((), dtype=dtype, device=distance.device)
    bias = zero if slopes is None else (-slopes[:, None, None] * distance).to(dtype)[None]
    return torch.where(allowed, bias, float("-inf"))

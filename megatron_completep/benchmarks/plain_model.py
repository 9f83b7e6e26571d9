"""The decoder as one would write it in plain torch: what the training benchmark compares with.

It uses nothing of this project but the configuration and the table.

B batch, S sequence, H hidden, N heads, D head dim.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_completep.completep import Table
from megatron_completep.config.derived import has_qkv_bias, head_dim, num_query_groups
from megatron_completep.config.schema import ModelConfig
from megatron_completep.model.rotary import rotary_frequencies

Angles = tuple[Tensor, Tensor]  # cos and sin [S, D/2]


class PlainGPT(nn.Module):
    """Pre-norm decoder of nn.Linear, nn.LayerNorm (or nn.RMSNorm) and `x + s * f(norm(x))`.

    Maps tokens [B, S] and labels [B, S] to their mean loss.
    """

    def __init__(self, model: ModelConfig, table: Table):
        super().__init__()
        self.model = model
        self.table = table
        self.embedding = nn.Embedding(model.vocab_size, model.hidden_size)
        self.positions: nn.Embedding | None = None
        if model.position == "learned":
            self.positions = nn.Embedding(model.seq_length, model.hidden_size)
        self.layers = nn.ModuleList(PlainBlock(model, table) for _ in range(model.num_layers))
        self.final_norm = plain_norm(model)
        self.unembedding = nn.Linear(model.hidden_size, model.vocab_size, bias=False)
        if model.tied_embeddings:
            self.unembedding.weight = self.embedding.weight
        self.apply(init_weights)

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        x = self.embedding(tokens)
        if self.positions is not None:
            x = x + self.positions.weight[: tokens.shape[1]]
        angles = rotary_angles(self.model, tokens) if self.model.position == "rope" else None
        for block in self.layers:
            x = block(x, angles)
        logits = self.unembedding(self.final_norm(x)) * self.table.logit_multiplier
        # The softmax over a large vocabulary needs float32, as it has in ours.
        return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())


class PlainBlock(nn.Module):
    """Attention and MLP, each with its norm in front and the residual multiplier behind."""

    def __init__(self, model: ModelConfig, table: Table):
        super().__init__()
        self.heads = model.num_attention_heads
        self.groups = num_query_groups(model)
        self.head_dim = head_dim(model)
        self.residual_multiplier = table.residual_multiplier
        self.attention_scale = table.attention_scale
        self.activation = model.activation
        self.attention_norm = plain_norm(model)
        self.mlp_norm = plain_norm(model)

        hidden = model.hidden_size
        query_width = self.heads * self.head_dim
        key_width = self.groups * self.head_dim
        self.qkv = nn.Linear(hidden, query_width + 2 * key_width, bias=has_qkv_bias(model))
        self.output = nn.Linear(query_width, hidden, bias=model.bias)

        ffn = model.ffn_hidden_size
        up_width = 2 * ffn if self.activation == "swiglu" else ffn  # gate and up in one product
        self.up = nn.Linear(hidden, up_width, bias=model.bias)
        self.down = nn.Linear(ffn, hidden, bias=model.bias)

    def forward(self, x: Tensor, angles: Angles | None) -> Tensor:
        x = x + self.residual_multiplier * self.attention(self.attention_norm(x), angles)
        return x + self.residual_multiplier * self.mlp(self.mlp_norm(x))

    def attention(self, x: Tensor, angles: Angles | None) -> Tensor:
        """Causal self-attention of x [B, S, H]."""
        # One product; its heads are those of the queries, then of the keys and the values.
        qkv = self.qkv(x).unflatten(-1, (self.heads + 2 * self.groups, self.head_dim))
        q, k, v = qkv.transpose(1, 2).split((self.heads, self.groups, self.groups), dim=1)
        if angles is not None:
            q = rotate(q, *angles)
            k = rotate(k, *angles)
        # With fewer groups than heads, torch has to repeat each key and value for its heads.
        grouped = self.heads != self.groups
        mixed = F.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=self.attention_scale, enable_gqa=grouped
        )
        out: Tensor = self.output(mixed.transpose(1, 2).flatten(2))
        return out

    def mlp(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(self._activate(self.up(x)))
        return out

    def _activate(self, inner: Tensor) -> Tensor:
        if self.activation == "swiglu":
            gate, up = inner.chunk(2, dim=-1)
            return F.silu(gate) * up
        if self.activation == "squared_relu":
            return F.relu(inner).square()
        if self.activation == "gelu_tanh":
            return F.gelu(inner, approximate="tanh")
        assert self.activation == "gelu", f"the plain model has no {self.activation}"
        return F.gelu(inner)


def plain_norm(model: ModelConfig) -> nn.Module:
    if model.norm == "rmsnorm":
        return nn.RMSNorm(model.hidden_size, eps=model.norm_eps)
    return nn.LayerNorm(model.hidden_size, eps=model.norm_eps, bias=model.bias)


def init_weights(module: nn.Module) -> None:
    """A standard deviation of 0.02; the figures do not depend on it."""
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)


def rotary_angles(model: ModelConfig, tokens: Tensor) -> Angles:
    """cos and sin [S, D/2] in float32."""
    frequencies, factor = rotary_frequencies(model, tokens.device)
    positions = torch.arange(tokens.shape[1], device=tokens.device, dtype=torch.float32)
    angles = torch.outer(positions, frequencies.float())
    return factor * angles.cos(), factor * angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Pairs (i, i + D/2) of x [B, N, S, D] turned by their position's angle."""
    # cos and sin are float32, so bf16 is rounded once, at the end.
    x1, x2 = x.chunk(2, dim=-1)
    rotated_x1 = x1 * cos - x2 * sin
    rotated_x2 = x2 * cos + x1 * sin
    return torch.cat((rotated_x1, rotated_x2), dim=-1).to(x.dtype)

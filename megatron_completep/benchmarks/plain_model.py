"""The decoder as one would write it in plain torch, without anything of this project: what the benchmark measures against.

B batch, S sequence, H hidden, N heads, D head dim.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_completep.completep import Table
from megatron_completep.config.derived import head_dim, num_query_groups
from megatron_completep.config.schema import ModelConfig


class PlainGPT(nn.Module):
    """Pre-norm decoder of nn.Linear, nn.LayerNorm (or nn.RMSNorm) and `x + s * f(norm(x))`; tokens [B, S] -> mean loss."""

    def __init__(self, model: ModelConfig, table: Table):
        super().__init__()
        self.model, self.table = model, table
        self.embedding = nn.Embedding(model.vocab_size, model.hidden_size)
        self.positions = (
            nn.Embedding(model.seq_length, model.hidden_size)
            if model.position == "learned"
            else None
        )
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
        return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())


class PlainBlock(nn.Module):
    """One layer: attention and MLP, each with its norm in front and the residual multiplier behind."""

    def __init__(self, model: ModelConfig, table: Table):
        super().__init__()
        self.heads, self.groups, self.head_dim = (
            model.num_attention_heads,
            num_query_groups(model),
            head_dim(model),
        )
        self.residual_multiplier, self.attention_scale = (
            table.residual_multiplier,
            table.attention_scale,
        )
        width, inner = self.heads * self.head_dim, model.ffn_hidden_size
        self.activation = model.activation
        self.attention_norm, self.mlp_norm = plain_norm(model), plain_norm(model)
        self.qkv = nn.Linear(
            model.hidden_size, width + 2 * self.groups * self.head_dim, bias=model.bias
        )
        self.output = nn.Linear(width, model.hidden_size, bias=model.bias)
        self.up = nn.Linear(
            model.hidden_size, inner * (2 if self.activation == "swiglu" else 1), bias=model.bias
        )
        self.down = nn.Linear(inner, model.hidden_size, bias=model.bias)

    def forward(self, x: Tensor, angles: tuple[Tensor, Tensor] | None) -> Tensor:
        x = x + self.residual_multiplier * self.attention(self.attention_norm(x), angles)
        return x + self.residual_multiplier * self.mlp(self.mlp_norm(x))

    def attention(self, x: Tensor, angles: tuple[Tensor, Tensor] | None) -> Tensor:
        heads = (
            self.qkv(x).unflatten(-1, (self.heads + 2 * self.groups, self.head_dim)).transpose(1, 2)
        )
        q, k, v = heads.split((self.heads, self.groups, self.groups), dim=1)
        if angles is not None:
            q, k = rotate(q, *angles), rotate(k, *angles)
        grouped = self.heads != self.groups
        mixed = F.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=self.attention_scale, enable_gqa=grouped
        )
        return self.output(mixed.transpose(1, 2).flatten(2))

    def mlp(self, x: Tensor) -> Tensor:
        inner = self.up(x)
        if self.activation == "swiglu":
            gate, up = inner.chunk(2, dim=-1)
            return self.down(F.silu(gate) * up)
        if self.activation == "squared_relu":
            return self.down(F.relu(inner).square())
        return self.down(
            F.gelu(inner, approximate="tanh" if self.activation == "gelu_tanh" else "none")
        )


def plain_norm(model: ModelConfig) -> nn.Module:
    if model.norm == "rmsnorm":
        return nn.RMSNorm(model.hidden_size, eps=model.norm_eps)
    return nn.LayerNorm(model.hidden_size, eps=model.norm_eps, bias=model.bias)


def init_weights(module: nn.Module) -> None:
    """A standard deviation of 0.02; the figures do not depend on it."""
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)


def rotary_angles(model: ModelConfig, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin [S, D/2] in float32."""
    size = head_dim(model)
    frequencies = model.rope_base ** (
        -torch.arange(0, size, 2, device=tokens.device, dtype=torch.float32) / size
    )
    angles = torch.outer(
        torch.arange(tokens.shape[1], device=tokens.device, dtype=torch.float32), frequencies
    )
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Pairs (i, i + D/2) of x [B, N, S, D] turned by their position's angle."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)

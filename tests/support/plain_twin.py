"""The decoder once more, as a textbook would write it:
plain torch, batch first, autograd, no code of the project.

It shares only parameter names and configuration classes with the model, and takes its own powers of
m_N and m_L, so that a mistake in the model, its kernels, its hand-written gradients or the table
shows as a difference.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_completep.config.schema import CompletePConfig, ModelConfig


@dataclass(frozen=True)
class PlainTwin:
    """Weights by the model's parameter names; every method is a formula."""

    weights: dict[str, Tensor]
    model: ModelConfig
    completep: CompletePConfig

    @property
    def head_dim(self) -> int:
        return self.model.head_dim or self.model.hidden_size // self.model.num_attention_heads

    def residual_multiplier(self) -> float:
        if self.completep.parameterization != "completep":
            return self.model.residual_multiplier
        ratio = self.model.num_layers / (self.completep.base_num_layers or self.model.num_layers)
        return float(self.model.residual_multiplier * ratio ** (-self.completep.alpha))

    def logit_multiplier(self) -> float:
        if self.completep.parameterization == "sp":
            return self.model.logit_multiplier
        base = self.completep.base_hidden_size or self.model.hidden_size
        return self.model.logit_multiplier * base / self.model.hidden_size

    def attention_scale(self) -> float:
        d = self.head_dim
        factor = self.model.attention_multiplier
        kind = self.model.attention_scale
        if self.completep.parameterization == "sp" or kind == "1/sqrt(head_dim)":
            return float(factor * d**-0.5)
        if kind == "1/head_dim":
            return factor / d
        return float(factor * (self.completep.base_head_dim or d) ** 0.5 / d)

    def logits(
        self,
        tokens: Tensor,
        positions: Tensor | None = None,
        document_ids: Tensor | None = None,
        residual_multiplier: float | None = None,
        branch_factors: list[Tensor] | None = None,
    ) -> Tensor:
        """tokens [B, S] -> logits [B, S, V].

        `branch_factors`: a dropout mask [B, S, H] for each branch in order.
        """
        w = self.weights
        s = self.residual_multiplier() if residual_multiplier is None else residual_multiplier
        batch, length = tokens.shape
        if positions is None:
            positions = torch.arange(length).expand(batch, length)
        if document_ids is None:
            document_ids = torch.zeros_like(tokens)
        h = w["embedding.weight"][tokens]
        if self.model.position == "learned":
            h = h + w["positions.weight"][positions]
        h = h * self.model.input_multiplier
        factors = iter(branch_factors or [])
        for layer in range(self.model.num_layers):
            for name, branch in (("attention", self.attention), ("mlp", self.mlp)):
                prefix = f"layers.{layer}.{name}"
                out = branch(self.norm(h, f"{prefix}_norm"), prefix, positions, document_ids)
                h = h + s * out * next(factors, torch.ones(()))
        x = self.norm(h, "final_norm")
        head = w["embedding.weight" if self.model.tied_embeddings else "unembedding.weight"]
        return self.logit_multiplier() * x @ head[: self.model.vocab_size].T

    def norm(self, x: Tensor, name: str, kind: str | None = None) -> Tensor:
        gain = self.weights[f"{name}.weight"]
        bias = self.weights.get(f"{name}.bias")
        if (kind or self.model.norm) == "layernorm":
            return F.layer_norm(x, x.shape[-1:], gain, bias, self.model.norm_eps)
        return x / torch.sqrt((x * x).mean(-1, keepdim=True) + self.model.norm_eps) * gain

    def linear(self, x: Tensor, name: str) -> Tensor:
        return F.linear(x, self.weights[f"{name}.weight"], self.weights.get(f"{name}.bias"))

    def mlp(self, x: Tensor, prefix: str, positions: Tensor, document_ids: Tensor) -> Tensor:
        if f"{prefix}.router.weight" in self.weights:
            return self.experts(x, prefix)
        return self.linear(self.activated(self.linear(x, f"{prefix}.up")), f"{prefix}.down")

    def experts(self, x: Tensor, prefix: str) -> Tensor:
        """Token by token, as the formula has it."""
        moe = self.model.moe
        assert moe is not None
        w = self.weights
        rows = []
        for token in x.flatten(0, -2):
            logits = w[f"{prefix}.router.weight"] @ token
            scores = torch.sigmoid(logits) if moe.gate == "sigmoid" else logits
            biased = scores.detach() + w.get(f"{prefix}.router.bias", torch.zeros(()))
            chosen = torch.topk(biased, moe.top_k).indices
            total = torch.zeros_like(token)
            for expert in chosen.tolist():
                if moe.gate == "sigmoid":
                    weight = scores[expert] / moe.top_k
                else:
                    weight = torch.exp(logits[expert]) / torch.exp(logits[chosen]).sum()
                inner = self.activated(w[f"{prefix}.experts.up"][expert] @ token)
                total = total + weight * (w[f"{prefix}.experts.down"][expert] @ inner)
            rows.append(total)
        out = torch.stack(rows).view_as(x)
        if moe.shared_ffn_hidden_size is not None:
            inner = self.activated(self.linear(x, f"{prefix}.shared.up"))
            out = out + self.linear(inner, f"{prefix}.shared.down")
        return out

    def activated(self, up: Tensor) -> Tensor:
        """The non-linearity of an MLP or an expert."""
        if self.model.activation == "swiglu":
            gate, up = up.chunk(2, dim=-1)
            inner = gate / (1 + torch.exp(-gate)) * up
        elif self.model.activation == "gelu":
            inner = 0.5 * up * (1 + torch.erf(up / math.sqrt(2)))
        elif self.model.activation == "gelu_tanh":
            inner = 0.5 * up * (1 + torch.tanh(math.sqrt(2 / math.pi) * (up + 0.044715 * up**3)))
        else:
            assert self.model.activation == "squared_relu", self.model.activation
            inner = torch.where(up > 0, up * up, 0.0)
        return inner

    def attention(self, x: Tensor, prefix: str, positions: Tensor, document_ids: Tensor) -> Tensor:
        d = self.head_dim
        heads = self.model.num_attention_heads
        groups = self.model.num_query_groups or heads
        sizes = [heads * d, groups * d, groups * d]
        q, k, v = torch.split(self.linear(x, f"{prefix}.qkv"), sizes, dim=-1)
        # [B, S, heads * D] -> [B, heads, S, D]
        q, k, v = (torch.unflatten(t, -1, (-1, d)).transpose(1, 2) for t in (q, k, v))
        if self.model.qk_norm:
            q = self.norm(q, f"{prefix}.q_norm", "rmsnorm")
            k = self.norm(k, f"{prefix}.k_norm", "rmsnorm")
        if self.model.position == "rope":
            q = self.rotate(q, positions)
            k = self.rotate(k, positions)
        k, v = (t.repeat_interleave(heads // groups, dim=1) for t in (k, v))
        scores = self.attention_scale() * q @ k.transpose(-1, -2)
        order = torch.arange(x.shape[1])
        if self.model.position == "alibi":
            scores = scores - slopes(heads)[:, None, None] * (order[:, None] - order[None, :])
        in_the_future = order[:, None] < order[None, :]
        in_another_document = document_ids[:, :, None] != document_ids[:, None, :]
        masked = (in_the_future | in_another_document)[:, None]
        mixed = torch.softmax(scores.masked_fill(masked, -math.inf), dim=-1) @ v
        return self.linear(mixed.transpose(1, 2).flatten(2), f"{prefix}.output")

    def rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        """Pairs (i, i + D/2) as complex numbers, times exp(i * position * base^(-2i/D))."""
        half = self.head_dim // 2
        speeds = [self.model.rope_base ** (-2 * i / self.head_dim) for i in range(half)]
        angle = positions[:, None, :, None] * torch.tensor(speeds, dtype=torch.float64)
        turn = torch.polar(torch.ones_like(angle), angle)
        turned = torch.complex(x[..., :half], x[..., half:]) * turn
        return torch.cat((turned.real, turned.imag), dim=-1)


def slopes(heads: int) -> Tensor:
    """ALiBi's slopes, from the paper's description: 2^(-8/n) and its powers;
    for other n, every other one of the next power of two.
    """
    n = 2 ** int(math.log2(heads))
    powers = [2 ** (-8 * (i + 1) / n) for i in range(n)]
    between = [2 ** (-8 * (i + 0.5) / n) for i in range(n)]
    return torch.tensor((powers + between)[:heads], dtype=torch.float64)


def cross_entropy_sum(
    logits: Tensor, labels: Tensor, z_loss: float = 0.0, label_smoothing: float = 0.0
) -> Tensor:
    """Sum over the labels that are not -100."""
    loss = F.cross_entropy(
        logits.flatten(0, 1),
        labels.flatten(),
        ignore_index=-100,
        reduction="sum",
        label_smoothing=label_smoothing,
    )
    return loss + z_loss * (torch.logsumexp(logits, -1).square() * (labels != -100)).sum()

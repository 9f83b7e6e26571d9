"""Muon and AdamW once more, in one file that a reader can check against the papers.

It takes no code of the project: parameters are matrices of their own, rates are given.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

QUINTIC = (3.4445, -4.7750, 2.0315)


def newton_schulz(m: Tensor, iterations: int) -> Tensor:
    x = m / m.norm()
    for _ in range(iterations):
        a = x @ x.T
        x = QUINTIC[0] * x + (QUINTIC[1] * a + QUINTIC[2] * a @ a) @ x
    return x


def logical_matrices(
    name: str, weight: Tensor, sizes: list[int], heads: list[int]
) -> Iterator[Tensor]:
    """The parts of a matrix, as views of it: stacked projections, or heads of them."""
    if ".qkv." in name:
        for part, count in zip(weight.split(sizes), heads, strict=True):
            yield from part.chunk(count)
    elif ".mlp.up." in name:
        yield from weight.chunk(2)
    else:
        yield weight


@dataclass
class PlainOptimizer:
    """Weights by the model's names. width_ratio: fan_in / base fan_in of a hidden matrix."""

    weights: dict[str, Tensor]
    lr: float
    muon_lr: float
    decay: float
    muon_decay: float
    eps: dict[str, float]
    clip: float
    sizes: list[int]
    heads: list[int]
    iterations: int = 5
    momentum: float = 0.95
    steps: int = 0
    state: dict[str, dict[str, Tensor]] = field(default_factory=dict)

    def step(self, gradients: dict[str, Tensor]) -> None:
        self.steps += 1
        norm = math.sqrt(sum(g.square().sum().item() for g in gradients.values()))
        scale = min(1.0, self.clip / (norm + 1e-6)) if self.clip else 1.0
        for name, weight in self.weights.items():
            g = gradients[name] * scale
            hidden = name.startswith("layers.") and weight.dim() == 2
            (self._muon if hidden else self._adamw)(name, weight, g)

    def _muon(self, name: str, weight: Tensor, g: Tensor) -> None:
        m = self.state.setdefault(name, {"m": torch.zeros_like(g)})["m"]
        m.mul_(self.momentum).add_((1 - self.momentum) * g)
        u = self.momentum * m + (1 - self.momentum) * g
        pairs = zip(
            logical_matrices(name, weight, self.sizes, self.heads),
            logical_matrices(name, u, self.sizes, self.heads),
            strict=True,
        )
        for w, part in pairs:
            d_out, d_in = w.shape
            rate = self.muon_lr * math.sqrt(d_out / d_in)
            update = rate * newton_schulz(part, self.iterations)
            w.sub_(update + self.muon_lr * self.muon_decay * w)

    def _adamw(self, name: str, weight: Tensor, g: Tensor) -> None:
        state = self.state.setdefault(name, {k: torch.zeros_like(g) for k in ("m", "v")})
        state["m"].mul_(0.9).add_(0.1 * g)
        state["v"].mul_(0.95).add_(0.05 * g * g)
        m = state["m"] / (1 - 0.9**self.steps)
        v = state["v"] / (1 - 0.95**self.steps)
        decay = self.decay if weight.dim() == 2 else 0.0
        weight.sub_(self.lr * (m / (v.sqrt() + self.eps[name]) + decay * weight))

"""Rotary angles and ALiBi slopes."""

from __future__ import annotations

import torch
from torch import Tensor


def rotary_table(
    seq_length: int, head_dim: int, base: float, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """cos and sin, each [S, D/2], of position * base^(-2i/D); computed in float64, kept in float32 (float64 for float64)."""
    frequencies = base ** (
        -torch.arange(0, head_dim, 2, dtype=torch.float64, device=device) / head_dim
    )
    angles = torch.arange(seq_length, dtype=torch.float64, device=device)[:, None] * frequencies
    kept = torch.float64 if dtype == torch.float64 else torch.float32
    return angles.cos().to(kept), angles.sin().to(kept)


def alibi_slopes(num_heads: int, device: torch.device) -> Tensor:
    """[N] slopes 2^(-8i/N) for a power of two; otherwise those of the next lower power, then every second one of the next higher
    (arXiv 2108.12409)."""

    def geometric(n: int) -> list[float]:
        return [2.0 ** (-8.0 * (i + 1) / n) for i in range(n)]

    lower = 1 << (num_heads.bit_length() - 1)
    slopes = geometric(lower) + geometric(2 * lower)[0::2][: num_heads - lower]
    return torch.tensor(slopes, dtype=torch.float64, device=device)

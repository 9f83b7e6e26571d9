"""Rotary angles and ALiBi slopes."""

from __future__ import annotations

import torch
from torch import Tensor


def rotary_table(
    seq_length: int, head_dim: int, base: float, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """cos and sin, each [S, D/2], of position * base^(-2i/D).

    Computed in float64: float32 loses the angle's fraction at far positions. Returned in float32,
    and in float64 where that is `dtype`.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float64, device=device) / head_dim
    frequencies = base**-exponents
    positions = torch.arange(seq_length, dtype=torch.float64, device=device)
    angles = positions[:, None] * frequencies
    table_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    return angles.cos().to(table_dtype), angles.sin().to(table_dtype)


def alibi_slopes(num_heads: int, device: torch.device) -> Tensor:
    """[N] slopes of the attention bias over distance, float64 (arXiv 2108.12409).

    For a power of two 2^(-8i/N); otherwise the slopes of the next lower power, then every second
    one of the next higher.
    """

    def geometric(count: int) -> list[float]:
        return [2.0 ** (-8.0 * (i + 1) / count) for i in range(count)]

    lower_power = 1 << (num_heads.bit_length() - 1)
    between = geometric(2 * lower_power)[0::2]
    slopes = geometric(lower_power) + between[: num_heads - lower_power]
    return torch.tensor(slopes, dtype=torch.float64, device=device)

"""Rotary frequencies and angles, and ALiBi slopes."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from megatron_completep.config.derived import head_dim
from megatron_completep.config.schema import ModelConfig, RopeScalingConfig


def rotary_frequencies(model: ModelConfig, device: torch.device) -> tuple[Tensor, float]:
    """(frequencies [D/2] in float64, the factor on cos and sin).

    The frequencies are base^(-2i/D), rescaled as `model.rope_scaling` says: each is the angle by
    which a pair of elements turns from one position to the next. All formulas are those of
    transformers' `ROPE_INIT_FUNCTIONS`. The factor is 1 but for yarn.
    """
    size = head_dim(model)
    exponents = torch.arange(0, size, 2, dtype=torch.float64, device=device) / size
    frequencies = model.rope_base**-exponents
    scaling = model.rope_scaling
    if scaling is None:
        return frequencies, 1.0
    if scaling.rope_type == "linear":
        return frequencies / scaling.factor, 1.0
    if scaling.rope_type == "llama3":
        return _llama3(frequencies, scaling), 1.0
    return _yarn(frequencies, scaling, model.rope_base), _yarn_factor(scaling)


def _llama3(frequencies: Tensor, scaling: RopeScalingConfig) -> Tensor:
    """Low frequencies divided by the factor, high ones kept, and a ramp between them."""
    length = scaling.original_max_position_embeddings
    low = scaling.low_freq_factor
    high = scaling.high_freq_factor
    assert length is not None and low is not None and high is not None  # `rope_problems`
    turns = length * frequencies / (2 * math.pi)  # within the original length
    kept_share = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - kept_share) * frequencies / scaling.factor + kept_share * frequencies


def _yarn(frequencies: Tensor, scaling: RopeScalingConfig, base: float) -> Tensor:
    """As `_llama3`, with a ramp over the number of the frequency (arXiv 2309.00071)."""
    length = scaling.original_max_position_embeddings
    assert length is not None  # `rope_problems`
    size = 2 * len(frequencies)

    def number_with(turns: float) -> float:
        """The number of the frequency that turns this often within the original length."""
        return size * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(base))

    first = number_with(scaling.beta_fast or 32)
    last = number_with(scaling.beta_slow or 1)
    if scaling.truncate is not False:
        first = math.floor(first)
        last = math.ceil(last)
    first = max(first, 0)
    last = min(last, size - 1)
    if first == last:
        last += 0.001  # a ramp without length
    numbers = torch.arange(len(frequencies), dtype=torch.float64, device=frequencies.device)
    kept_share = 1 - ((numbers - first) / (last - first)).clamp(0, 1)
    return (1 - kept_share) * frequencies / scaling.factor + kept_share * frequencies


def _yarn_factor(scaling: RopeScalingConfig) -> float:
    """What yarn multiplies cos and sin by, so that attention logits have its square."""
    if scaling.attention_factor is not None:
        return scaling.attention_factor

    def grown(weight: float) -> float:
        return 0.1 * weight * math.log(scaling.factor) + 1 if scaling.factor > 1 else 1.0

    if scaling.mscale and scaling.mscale_all_dim:
        return grown(scaling.mscale) / grown(scaling.mscale_all_dim)
    return grown(1.0)


def rotary_angles(
    positions: Tensor, model: ModelConfig, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """cos and sin of the rotary angles at any positions [...]: two tensors [..., D/2].

    Both are times the factor of `rotary_frequencies`. Computed in float64: float32 loses the
    angle's fraction at far positions. Returned in float32, and in float64 where that is `dtype`.
    """
    frequencies, factor = rotary_frequencies(model, positions.device)
    angles = positions.to(torch.float64)[..., None] * frequencies
    table_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    cos = angles.cos()
    sin = angles.sin()
    if factor != 1.0:
        cos *= factor
        sin *= factor
    return cos.to(table_dtype), sin.to(table_dtype)


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

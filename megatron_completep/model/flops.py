"""Model FLOPs: what the mathematics of a step asks of the matrix units.

What an implementation computes in addition does not count. Every module of the model says what its
forward pass takes (`flops`), so that a new branch counts once it answers. Per token, at 2 FLOPs a
multiply-add, that is (N heads of size D, G query groups, F inner width, V vocabulary, S sequence):

    layer:        2 H (N + 2G) D + 2 N D H          query, key, value and output projections
                + 2 * 2 N D (S + 1) / 2             scores and mixing, over the causal half only
                + 2 * 2 H F   (3 matrices for SwiGLU: 2 * 3 H F)
    unembedding:  2 H V

Training is three times that: backward needs the gradient of the input and of the weight of every
product. Norms, rotations, softmax, the embedding look-up, the optimizer and recomputation do not
count. Without attention and unembedding this is the familiar 6 * parameters.
"""

from __future__ import annotations

import re

import torch

from megatron_completep.completep import table_of
from megatron_completep.config.bare import bare_config
from megatron_completep.config.schema import ModelConfig
from megatron_completep.model.stages import whole_model

# Dense bf16 peak of one device in FLOP/s, from the makers' data sheets, by words of the device's
# name; the first match wins.
PEAK_FLOPS: dict[str, float] = {
    "GB200": 2.5e15,
    "B200": 2.25e15,
    "GH200": 989.4e12,
    "H200": 989.4e12,
    "H100 NVL": 835e12,
    "H100 PCIe": 756e12,
    "H100": 989.4e12,
    "H800": 989.4e12,
    "H20": 148e12,
    "A100": 312e12,
    "A800": 312e12,
    "A40": 149.7e12,
    "A30": 165e12,
    "A10": 125e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "RTX 4090": 165.2e12,
    "RTX 3090": 71e12,
    "MI300X": 1307.4e12,
}


def forward_flops_per_token(model: ModelConfig, seq_length: int | None = None) -> float:
    """Matrix FLOPs of the forward pass, per token of a sequence (default: of the model's length).

    Builds the model on the meta device. ConfigError for a branch that does not say its FLOPs.
    """
    table = table_of(bare_config(model))  # no parameterization changes a shape
    return whole_model(model, table).flops(seq_length or model.seq_length)


def training_flops_per_token(model: ModelConfig, seq_length: int | None = None) -> float:
    """Matrix FLOPs of forward and backward, per token."""
    return 3 * forward_flops_per_token(model, seq_length)


def peak_flops(device_name: str, dtype: torch.dtype) -> float | None:
    """The data sheet's dense bf16 FLOP/s of a GPU, by its name.

    None for another type, a CPU, or a device that is not in the table.
    """
    if dtype != torch.bfloat16:
        return None
    for words, peak in PEAK_FLOPS.items():
        if re.search(rf"\b{words}\b", device_name, re.IGNORECASE):
            return peak
    return None

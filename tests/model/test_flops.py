"""The modules' FLOPs against a formula on paper, and against torch's counter on a plain model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from megatron_completep.benchmarks.plain_model import PlainGPT
from megatron_completep.config.schema import ModelConfig
from megatron_completep.model.flops import (
    forward_flops_per_token,
    peak_flops,
    training_flops_per_token,
)
from tests.support.models import model_config, table_for

SHAPES: list[dict[str, Any]] = [
    {},
    {"activation": "gelu", "norm": "layernorm", "position": "learned", "bias": True},
    {"num_query_groups": 2, "head_dim": 16, "ffn_hidden_size": 80},
    {"num_layers": 1, "seq_length": 7, "vocab_size": 101},
]


def formula(model: ModelConfig, seq_length: int) -> float:
    """FLOPs of the forward pass a token, from the configuration alone."""
    hidden = model.hidden_size
    head_dim = model.head_dim or hidden // model.num_attention_heads
    width = model.num_attention_heads * head_dim
    groups = model.num_query_groups or model.num_attention_heads
    projections = 2 * hidden * (width + 2 * groups * head_dim) + 2 * width * hidden
    attention = 2 * 2 * width * (seq_length + 1) / 2
    matrices = 3 if model.activation == "swiglu" else 2
    mlp = 2 * matrices * hidden * model.ffn_hidden_size
    return model.num_layers * (projections + attention + mlp) + 2 * hidden * model.vocab_size


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "squared_relu", "swiglu"])
@pytest.mark.parametrize(
    "shape", [*SHAPES, {"tied_embeddings": True, "qk_norm": True, "position": "alibi"}], ids=str
)
def test_the_modules_flops_are_those_of_the_formula(shape: dict[str, Any], activation: str) -> None:
    model = model_config(**{**shape, "activation": activation})
    for length in (1, 33, model.seq_length):
        assert forward_flops_per_token(model, length) == formula(model, length)
        assert training_flops_per_token(model, length) == 3 * formula(model, length)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_flops_equal_those_that_torch_counts(shape: dict[str, Any]) -> None:
    model = model_config(**shape)
    plain = PlainGPT(model, table_for(model))
    tokens = torch.randint(model.vocab_size, (2, model.seq_length))
    with sdpa_kernel(SDPBackend.MATH):  # its two products are counted, over the whole square
        with FlopCounterMode(display=False) as forward:
            loss = plain(tokens, tokens)
        with FlopCounterMode(display=False) as backward:
            loss.backward()
    width = model.num_attention_heads * (
        model.head_dim or model.hidden_size // model.num_attention_heads
    )
    # A token, above the diagonal.
    future = model.num_layers * 2 * 2 * width * (model.seq_length - (model.seq_length + 1) / 2)
    counted = forward.get_total_flops() / tokens.numel()
    assert forward_flops_per_token(model) == pytest.approx(counted - future, rel=1e-12)
    whole = (forward.get_total_flops() + backward.get_total_flops()) / tokens.numel()
    assert training_flops_per_token(model) == pytest.approx(whole - 3 * future, rel=1e-12)


def test_flops_come_close_to_six_times_the_parameters_of_the_layers() -> None:
    model = model_config(
        hidden_size=2048,
        num_layers=24,
        num_attention_heads=16,
        ffn_hidden_size=8192,
        activation="gelu",
        seq_length=128,
    )
    layers = 24 * 12 * 2048**2
    assert training_flops_per_token(model) == pytest.approx(6 * layers, rel=0.02)
    assert training_flops_per_token(model, 4096) > 6 * layers * 1.1  # attention counts


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989.4e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA A10G", None),  # another part than the A10
        ("x86_64 CPU", None),
    ],
)
def test_the_peak_follows_from_the_devices_name(name: str, expected: float | None) -> None:
    assert peak_flops(name, torch.bfloat16) == expected
    assert peak_flops(name, torch.float32) is None

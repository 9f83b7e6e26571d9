"""A residual stream in float32 under bf16 parameters."""

from __future__ import annotations

import torch

from tests.support.models import (
    batch_of,
    build_model,
    model_config,
)


def logits_and_loss(dtype: torch.dtype, fp32_residual: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and the embedding's gradient of a deep model whose parameters are rounded to bf16."""
    model = model_config(num_layers=24, fp32_residual=fp32_residual)
    gpt = build_model(model, dtype=torch.bfloat16, random_vectors=False).to(dtype)
    tokens, labels = batch_of(model)
    logits = gpt(tokens).detach().double()
    gpt(tokens, labels=labels).backward()
    return logits, gpt.embedding.weight.main_grad.double()


def test_a_float32_stream_is_nearer_to_float64_than_a_bf16_stream():
    float64 = logits_and_loss(torch.float64, False)
    float32_stream = logits_and_loss(torch.bfloat16, True)
    bf16_stream = logits_and_loss(torch.bfloat16, False)
    for exact, better, worse in zip(float64, float32_stream, bf16_stream, strict=True):
        assert (better - exact).norm() < 0.8 * (worse - exact).norm()

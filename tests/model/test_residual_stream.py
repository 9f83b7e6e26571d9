"""A residual stream in float32 under bf16 parameters."""

from __future__ import annotations

import torch

from megatron_completep.model.gpt import GPT
from megatron_completep.model.initialize import initialize
from megatron_completep.parallel.context import ParallelContext
from tests.support.models import (
    batch_of,
    completep_config,
    model_config,
    optimizer_config,
    table_for,
)


def logits_and_loss(dtype: torch.dtype, fp32_residual: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits, and the gradient of the embedding, of a deep model whose parameters are rounded to bf16 in every case."""
    model = model_config(num_layers=24, fp32_residual=fp32_residual)
    gpt = GPT(model, table_for(model, completep_config()), ParallelContext.single())
    initialize(gpt, gpt.table, optimizer_config(), seed=1)
    gpt.bfloat16().to(dtype)
    tokens, labels = batch_of(model)
    logits = gpt(tokens).detach().double()
    gpt(tokens, labels=labels).backward()
    return logits, gpt.embedding.weight.main_grad.double()


def test_a_float32_stream_is_nearer_to_float64_than_a_bf16_stream():
    expected = logits_and_loss(torch.float64, False)
    with_stream, without = (
        logits_and_loss(torch.bfloat16, True),
        logits_and_loss(torch.bfloat16, False),
    )
    for exact, wide, narrow in zip(expected, with_stream, without, strict=True):
        assert (wide - exact).norm() < 0.8 * (narrow - exact).norm()

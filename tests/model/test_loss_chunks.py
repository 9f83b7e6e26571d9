"""The loss in chunks: equal ones, whose weight gradients go straight to where they belong."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_completep.model.gpt import GPT
from megatron_completep.parallel.cross_entropy import LossConfig
from tests.support.models import (
    batch_of,
    build_model,
    build_optimizer,
    model_config,
    model_on_paper,
)

CHUNKED = LossConfig(chunk_bytes=40 * 8 * 5)  # five tokens of 40 padded words in float64


@pytest.mark.parametrize(
    ("vocab_size", "chunk_bytes", "expected"),
    [
        (50304, 1 << 30, 8192),  # all fit
        (50304, 1 << 28, 2048),  # 2668 fit: four of 2048, not three and a rest of 188
        (131072, 1 << 30, 4096),
        (131072, 1 << 28, 1024),
        (131072, 3 << 28, 2816),  # three: 8192 / 3, rounded up to 256
        (131072, 10 * 131072 * 2, 10),  # fewer than a tile fit: no more than these
    ],
)
def test_chunks_are_as_equal_as_whole_tiles_allow(
    vocab_size: int, chunk_bytes: int, expected: int
) -> None:
    model = model_on_paper(model_config(vocab_size=vocab_size, vocab_multiple=128))
    model.unembedding.loss = LossConfig(chunk_bytes=chunk_bytes)
    assert model.unembedding.chunk_tokens(8192, element_bytes=2) == expected


class Allocations(TorchDispatchMode):
    """The sizes, in elements, of what is made while it is active."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        made = function(*args, **(kwargs or {}))
        given = {t.untyped_storage()._cdata for t in args if isinstance(t, Tensor)}
        if isinstance(made, Tensor) and made.untyped_storage()._cdata not in given:
            self.sizes.append(made.numel())
        return made


def step_gradients(gpt: GPT, micro_batches: int = 2) -> list[Tensor]:
    """The gradients of a training step."""
    gpt.queue.begin_step(gpt.parameters(), micro_batches)
    for seed in range(micro_batches):
        tokens, labels = batch_of(model_config(), seed)
        gpt(tokens, labels=labels).backward()
    return [p.main_grad.clone() for p in gpt.parameters()]  # type: ignore[attr-defined]


def test_in_a_training_step_chunks_write_to_the_main_gradient() -> None:
    whole = step_gradients(build_model(model_config()))
    gpt = build_model(model_config(), loss=CHUNKED)
    for parameter in gpt.parameters():
        # What is there of the step before must be overwritten.
        parameter.main_grad = torch.full_like(parameter, 7.0)  # type: ignore[attr-defined]
    chunked = step_gradients(gpt)
    for here, there in zip(chunked, whole, strict=True):
        torch.testing.assert_close(here, there, rtol=1e-12, atol=1e-12)


def test_in_a_training_step_no_second_gradient_of_the_weight_is_made() -> None:
    gpt = build_model(model_config(), loss=CHUNKED)
    weight_size = gpt.unembedding.weight.numel()
    tokens, labels = batch_of(model_config())
    with Allocations() as outside:
        gpt(tokens, labels=labels)
    build_optimizer(gpt, gpt.table).begin_step(1)
    with Allocations() as inside:
        gpt(tokens, labels=labels)
    assert weight_size not in inside.sizes
    assert outside.sizes.count(weight_size) == 1  # the control


def test_a_pass_without_a_step_and_an_evaluation_within_one_change_no_gradient() -> None:
    gpt = build_model(model_config(), loss=CHUNKED)
    optimizer = build_optimizer(gpt, gpt.table)
    gradient = optimizer.shards.grad
    gradient.fill_(7.0)
    tokens, labels = batch_of(model_config())
    gpt(tokens, labels=labels)  # a probe that never runs backward
    assert bool((gradient == 7.0).all())
    optimizer.begin_step(1)
    weight_size = gpt.unembedding.weight.numel()
    with torch.no_grad(), Allocations() as allocations:
        gpt(tokens, labels=labels)
    assert bool((gradient == 7.0).all()) and weight_size not in allocations.sizes
    gpt(tokens, labels=labels)
    assert not bool((gradient == 7.0).all())  # the control: a training pass writes in forward


def test_in_a_training_step_a_loss_that_is_scaled_is_refused() -> None:
    gpt = build_model(model_config(), loss=CHUNKED)
    gpt.queue.begin_step(gpt.parameters(), 1)
    tokens, labels = batch_of(model_config())
    with pytest.raises(RuntimeError, match="the loss has the gradient 1"):
        (2.0 * gpt(tokens, labels=labels)).backward()

"""Workers for the test of the loss in chunks in layouts."""

from __future__ import annotations

from typing import Any
from unittest import mock

from torch import Tensor

from megatron_completep.parallel.cross_entropy import LossConfig
from megatron_completep.parallel.gradients import GradientQueue
from tests.parallel.layouts import Case, assembled, counted_tokens, micro_batches_of

MICRO_BATCHES = 4


def gradients(rank: int, layout: dict[str, Any], chunk_bytes: int) -> tuple[Tensor, int]:
    """This rank's gradients of one step, and how often a forward asked for a main gradient."""
    asked = 0
    main_grad_for_forward = GradientQueue.main_grad_for_forward

    def watched(self: GradientQueue, parameter: Any) -> Any:
        nonlocal asked
        asked += 1
        return main_grad_for_forward(self, parameter)

    chunked = classmethod(lambda cls, training: cls(chunk_bytes=chunk_bytes))
    case = Case(layout, {"tied_embeddings": True}, micro_batches=MICRO_BATCHES)
    with mock.patch.object(LossConfig, "of", chunked):
        config, context, assembly = assembled(rank, case)
    optimizer = assembly.optimizer
    batches = micro_batches_of(0, config, context)
    with mock.patch.object(GradientQueue, "main_grad_for_forward", watched):
        optimizer.begin_step(MICRO_BATCHES)
        loss_sum = assembly.step.forward_backward(batches)
    optimizer.step(config.optimizer.base_lr, loss_sum, counted_tokens(batches, context))
    optimizer.wait_for_parameters()
    return optimizer.shards.grad.clone(), asked


def difference(rank: int, layout: dict[str, Any]) -> tuple[float, int, int]:
    """Of the gradients in chunks and at once, relative to the largest; how often each asked."""
    whole, never = gradients(rank, layout, 1 << 30)
    chunked, often = gradients(rank, layout, 512)
    largest = whole.abs().max()
    return float(((chunked - whole).abs().max() / largest).double()), never, often

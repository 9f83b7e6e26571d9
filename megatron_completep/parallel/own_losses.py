"""Losses that arise inside a layer, such as a router's: their gradient is injected there, their values are kept for the metrics.

A pipeline stage sends one tensor on, and the loss of the tokens exists on the last stage only. So a layer's own loss is not added to
it: an identity on the layer's output starts the loss's backward pass when its own gradient arrives.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class LossLedger:
    """Sums of a chunk's own losses since they were last taken, by name."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}

    def add(self, name: str, value: Tensor) -> None:
        """Count one value, without gradient."""
        value = value.detach().double()
        self._sums[name] = self._sums[name] + value if name in self._sums else value

    def take(self) -> dict[str, Tensor]:
        """Name -> sum [], float64, over the backward passes since the last call."""
        sums, self._sums = self._sums, {}
        return sums


def with_own_loss(x: Tensor, loss: Tensor, name: str, ledger: LossLedger) -> Tensor:
    """x, with the gradient of `loss` [] beside its own.

    loss: in the units of the objective, a sum over the tokens of the micro-batch. It counts once in every backward pass, under
    recomputation and schedules that split backward too, and not at all without gradients (validation, generation).
    """
    return _OwnLoss.apply(x, loss, name, ledger)


class _OwnLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor, name: str, ledger: LossLedger) -> Tensor:
        ctx.save_for_backward(loss)
        ctx.name = name
        ctx.ledger = ledger
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, d_x: Tensor) -> tuple[Tensor, Tensor, None, None]:
        (loss,) = ctx.saved_tensors
        ctx.ledger.add(ctx.name, loss)
        return d_x, torch.ones_like(loss), None, None

"""Losses that arise inside a layer, such as a router's: injected there, reported with the metrics.

A pipeline stage sends one tensor on, and the loss of the tokens exists on the last stage only. So a
layer's own loss is not added to it. An identity on the layer's output starts the backward pass of
the own loss when the gradient of that output arrives.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class LossLedger:
    """What the own losses of one model chunk came to since they were last taken, by name.

    A layer declares the name of its loss when it is made, so that every rank knows all names before
    the first step and the sums can be reduced in one collective.
    """

    def __init__(self) -> None:
        self._sums: dict[str, Tensor | None] = {}

    @property
    def names(self) -> tuple[str, ...]:
        """The declared names, sorted."""
        return tuple(sorted(self._sums))

    def declare(self, name: str) -> None:
        """Say that a layer of this chunk has a loss of this name; several layers may share one."""
        self._sums.setdefault(name, None)

    def add(self, name: str, value: Tensor) -> None:
        """Add one value [] to the sum of a declared name; its gradient is cut off."""
        assert name in self._sums, f"the own loss {name!r} was not declared when its layer was made"
        # Float64, because a sum over many layers and micro-batches goes into the metrics.
        value = value.detach().double()
        total = self._sums[name]
        self._sums[name] = value if total is None else total + value

    def take(self) -> dict[str, Tensor]:
        """Name -> sum [], float64, over the backward passes since the last call.

        A name is missing where no backward pass met it.
        """
        sums = {name: total for name, total in self._sums.items() if total is not None}
        self._sums = dict.fromkeys(self._sums)
        return sums


def with_own_loss(
    x: Tensor, loss: Tensor, name: str, ledger: LossLedger, counts: bool = True
) -> Tensor:
    """Return x unchanged; its backward pass adds the gradient of `loss` [] to that of x.

    The loss is injected once in every backward pass, under recomputation and under schedules that
    split the backward pass too, and not at all without gradients (validation, generation).

    loss: in the units of the objective, a sum over the tokens of the micro-batch that this rank
        sees.
    name: declared in `ledger`; metrics report the mean over all tokens of a step under it.
    counts: whether this rank's value enters the metrics. Tensor ranks that compute the same value
        from the same tokens pass True on one of them only.
    """
    counting_ledger = ledger if counts else None
    out: Tensor = _OwnLoss.apply(x, loss, name, counting_ledger)  # type: ignore[no-untyped-call]
    return out


class _OwnLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor, name: str, ledger: LossLedger | None) -> Tensor:
        ctx.save_for_backward(loss)
        ctx.name = name
        ctx.ledger = ledger
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, d_x: Tensor) -> tuple[Tensor, Tensor, None, None]:
        (loss,) = ctx.saved_tensors
        # Counted here and not in the forward pass, which recomputation runs twice.
        if ctx.ledger is not None:
            ctx.ledger.add(ctx.name, loss)
        return d_x, torch.ones_like(loss), None, None

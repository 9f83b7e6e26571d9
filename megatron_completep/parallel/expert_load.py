"""How full a rank's experts are in one layer and micro-batch, for the message if it is too much."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import Any, TypeVar

import torch

from megatron_completep.errors import ExpertsDoNotFit

Gradients = TypeVar("Gradients")


@dataclass
class ExpertLoad:
    """rows: those that came to this rank's experts, once they are known. mean: of a rank."""

    layer: int
    mean: int
    rows: int = 0

    @contextmanager
    def naming(self) -> Iterator[None]:
        """Name layer and load where an allocation for the rows fails: raise ExpertsDoNotFit."""
        try:
            yield
        except RuntimeError as error:
            if not _is_memory(error):
                raise
            raise ExpertsDoNotFit(
                f"layer {self.layer}: the experts of this rank have {self.rows:,} rows, "
                f"{self.rows / max(1, self.mean):.2f} times the mean, which do not fit into "
                "memory. Lower training.micro_batch_size, use training.recompute = full, raise "
                "parallel.expert_parallel_size, or balance the experts (model.moe.balance)."
            ) from None


def naming_load(backward: Callable[..., Gradients]) -> Callable[..., Gradients]:
    """A backward pass that names the load, which it finds as ctx.load; None: it does not."""

    @wraps(backward)
    def named(ctx: Any, *gradients: Any) -> Gradients:
        if ctx.load is None:
            return backward(ctx, *gradients)
        with ctx.load.naming():
            return backward(ctx, *gradients)

    return named


def _is_memory(error: RuntimeError) -> bool:
    """Whether an allocation failed. A CPU raises a plain RuntimeError."""
    return isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error)

"""Learning-rate schedules as closed forms. Every group's factor multiplies the whole of it: warm-up, peak and minimum."""

from __future__ import annotations

import math

from megatron_completep.config.derived import decay_steps, warmup_steps
from megatron_completep.config.schema import OptimizerConfig


def schedule(step: int, optimizer: OptimizerConfig, train_steps: int) -> float:
    """Fraction of the peak at update `step` = 1 .. train_steps: 1 at the end of the warm-up, the minimum at the last."""
    warmup = warmup_steps(optimizer, train_steps)
    if step < warmup:
        return step / warmup
    start = warmup
    if optimizer.schedule == "warmup_stable_decay":
        start = max(warmup, train_steps - decay_steps(optimizer, train_steps))
    progress = min(1.0, max(0.0, (step - start) / max(1, train_steps - start)))
    minimum = optimizer.min_lr_fraction
    match optimizer.schedule:
        case "constant":
            return 1.0
        case "cosine":
            return minimum + (1 - minimum) * 0.5 * (1 + math.cos(math.pi * progress))
        case _:
            return 1.0 - (1 - minimum) * progress


def learning_rate(step: int, optimizer: OptimizerConfig, train_steps: int) -> float:
    """The base learning rate at update `step`, before any group's factor."""
    return optimizer.base_lr * schedule(step, optimizer, train_steps)

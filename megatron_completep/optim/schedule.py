"""Learning-rate schedules as closed forms.

The factor of a group multiplies the whole schedule: the warm-up, the peak and the minimum.
"""

from __future__ import annotations

import math

from megatron_completep.config.derived import decay_steps, warmup_steps
from megatron_completep.config.schema import OptimizerConfig


def schedule(step: int, optimizer: OptimizerConfig, train_steps: int) -> float:
    """The fraction of the peak learning rate at update `step`, which is 1 .. train_steps.

    It is 1 at the end of the warm-up, and the minimum at the last update.
    """
    warmup = warmup_steps(optimizer, train_steps)
    if step < warmup:
        return step / warmup

    decay_start = warmup
    if optimizer.schedule == "warmup_stable_decay":
        decay_start = max(warmup, train_steps - decay_steps(optimizer, train_steps))
    # A run that only warms up has no step of decay, and must not divide by zero.
    decay_length = max(1, train_steps - decay_start)
    progress = (step - decay_start) / decay_length
    progress = min(1.0, max(0.0, progress))

    # The last update reaches the minimum itself, as progress is 1 there.
    minimum = optimizer.min_lr_fraction
    match optimizer.schedule:
        case "constant":
            return 1.0
        case "cosine":
            cosine = 0.5 * (1 + math.cos(math.pi * progress))
            return minimum + (1 - minimum) * cosine
        case _:
            return 1.0 - (1 - minimum) * progress


def learning_rate(step: int, optimizer: OptimizerConfig, train_steps: int) -> float:
    """The base learning rate at update `step`, before any group's factor."""
    return optimizer.base_lr * schedule(step, optimizer, train_steps)

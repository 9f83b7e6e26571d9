"""The record of an optimizer step: what the host, the gradient norm and AdamW tell each other.

A float64 tensor [8] on the device, whose numbers have names. The optimizer writes the learning rate
before a step and `begin_step_` writes the others, so nothing waits for the host, and a captured
CUDA graph stays right.

    record = new_control(device)
    record[LEARNING_RATE] = 1e-3          one number, on the device
    read_control(record).grad_norm        all of them, on the host: this waits for the device
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .optional_triton import tl


class Control(NamedTuple):
    """The record's numbers on the host, in the order in which they lie on the device."""

    learning_rate: float = 0.0  # before the groups' factors
    step: float = 0.0  # updates so far; a skipped step does not count
    clip: float = 0.0  # what every gradient is multiplied by
    skip: float = 0.0  # 1: a gradient was not finite, and AdamW touches nothing
    correction1: float = 0.0  # 1 - beta1^step
    correction2: float = 0.0  # 1 - beta2^step
    grad_norm: float = 0.0  # before clipping
    unused: float = 0.0  # 64 bytes in all


_positions = range(len(Control._fields))
LEARNING_RATE, STEP, CLIP, SKIP, CORRECTION1, CORRECTION2, GRAD_NORM, _ = _positions

# The same positions for kernels, which can read a module's name only where it is a `tl.constexpr`.
AT_LEARNING_RATE = tl.constexpr(LEARNING_RATE)
AT_STEP = tl.constexpr(STEP)
AT_CLIP = tl.constexpr(CLIP)
AT_SKIP = tl.constexpr(SKIP)
AT_CORRECTION1 = tl.constexpr(CORRECTION1)
AT_CORRECTION2 = tl.constexpr(CORRECTION2)
AT_GRAD_NORM = tl.constexpr(GRAD_NORM)


def new_control(device: torch.device | str, control: Control | None = None) -> Tensor:
    """A record (float64 [8]) on `device` that holds `control`, or zeros."""
    return torch.tensor(control or Control(), dtype=torch.float64).to(device)


def read_control(record: Tensor) -> Control:
    """The numbers of a record. On a GPU this waits for the device."""
    return Control(*record.tolist())

"""The control of an optimizer step: state shared by the host, the gradient norm and AdamW.

A control is a float64 tensor [8] on the device, whose numbers have names. The optimizer writes the
learning rate before a step and `ops.grad_norm.begin_step_` writes the others, so no kernel waits
for the host, and a captured CUDA graph stays valid.

    control = new_control(device)
    control[LEARNING_RATE] = 1e-3          one number, on the device
    read_control(control).grad_norm        all of them, on the host: this waits for the device
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .optional_triton import tl


class Control(NamedTuple):
    """The numbers of a control on the host, in the order of the tensor's elements."""

    learning_rate: float = 0.0  # before the groups' factors
    step: float = 0.0  # updates so far; a skipped step does not count
    clip: float = 0.0  # what every gradient is multiplied by
    skip: float = 0.0  # 1 if a gradient was not finite; AdamW then changes nothing
    correction1: float = 0.0  # 1 - beta1^step
    correction2: float = 0.0  # 1 - beta2^step
    grad_norm: float = 0.0  # before clipping
    unused: float = 0.0  # pads the tensor to 64 bytes


# Positions in the tensor.
LEARNING_RATE = Control._fields.index("learning_rate")
STEP = Control._fields.index("step")
CLIP = Control._fields.index("clip")
SKIP = Control._fields.index("skip")
CORRECTION1 = Control._fields.index("correction1")
CORRECTION2 = Control._fields.index("correction2")
GRAD_NORM = Control._fields.index("grad_norm")

# The same positions for Triton kernels, which can read module-level globals only if they are
# `tl.constexpr`.
AT_LEARNING_RATE = tl.constexpr(LEARNING_RATE)
AT_STEP = tl.constexpr(STEP)
AT_CLIP = tl.constexpr(CLIP)
AT_SKIP = tl.constexpr(SKIP)
AT_CORRECTION1 = tl.constexpr(CORRECTION1)
AT_CORRECTION2 = tl.constexpr(CORRECTION2)
AT_GRAD_NORM = tl.constexpr(GRAD_NORM)


def new_control(device: torch.device | str, numbers: Control | None = None) -> Tensor:
    """A control (float64 [8]) on `device` that holds `numbers`, or zeros."""
    return torch.tensor(numbers or Control(), dtype=torch.float64).to(device)


def read_control(control: Tensor) -> Control:
    """The numbers of a control. On a GPU this waits for the device."""
    return Control(*control.tolist())

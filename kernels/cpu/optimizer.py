"""AdamW and the gradient norm on CPU tensors: the same functions as in `reference`, fast enough to train with.

They work on pieces that stay in the cache, so that main memory is crossed once, and no reduction is split between threads.
float64 takes the definition itself: tests compare it to the last digits.
"""

import math

import torch
from torch import Tensor

from .. import reference
from ..control import read_control

ADAMW_CHUNK = 1 << 17  # elements; a multiple of 64, so that every chunk ends on a whole vector
NORM_ROW = 1024  # elements whose squares are summed in float32 before float64 takes over


def adamw_(
    parameter_out: Tensor | None,
    master: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    grad: Tensor,
    segments: Tensor,
    groups: Tensor,
    control: Tensor,
    beta1: float,
    beta2: float,
) -> None:
    """AdamW through torch's fused CPU kernel, a chunk at a time: clip, update and bf16 copy while the chunk is in the cache.

    The bias corrections come from `control`, in float64, not from the kernel, which would read a float32 step: at an infinite
    step its own corrections are 1, and with r = sqrt(correction2)
        lr * m/correction1 / (sqrt(v)/r + eps) = lr*r/correction1 * m / (sqrt(v) + eps*r).
    The decay is taken beforehand: the kernel rounds 1 - lr*wd to float32, which is 3 percent of a decay of 1e-6, always the same way.
    """
    if master.dtype != torch.float32:
        reference.adamw_(
            parameter_out,
            master,
            exp_avg,
            exp_avg_sq,
            grad,
            segments,
            groups,
            control,
            beta1,
            beta2,
        )
        return
    step = read_control(control)
    if step.skip:
        return
    root = math.sqrt(step.correction2)
    group_values = groups.tolist()
    infinite_step = [torch.full((), math.inf)]
    scaled = torch.empty(min(ADAMW_CHUNK, grad.numel()), dtype=torch.float32)
    for start, length, group in segments.tolist():
        lr_factor, weight_decay, eps = group_values[group]
        for begin in range(start, start + length, ADAMW_CHUNK):
            piece = slice(begin, min(begin + ADAMW_CHUNK, start + length))
            gradient = grad[piece]
            if step.clip != 1.0 or gradient.dtype != torch.float32:
                gradient = torch.mul(gradient, step.clip, out=scaled[: gradient.numel()])
            parameter = master[piece]
            decay = step.learning_rate * lr_factor * weight_decay
            if decay:
                torch.add(parameter, parameter, alpha=-decay, out=parameter)
            torch._fused_adamw_(
                [parameter],
                [gradient],
                [exp_avg[piece]],
                [exp_avg_sq[piece]],
                [],
                infinite_step,
                lr=step.learning_rate * lr_factor * root / step.correction1,
                beta1=beta1,
                beta2=beta2,
                weight_decay=0.0,
                eps=eps * root,
                amsgrad=False,
                maximize=False,
            )
            if parameter_out is not None:
                parameter_out[piece].copy_(parameter)


def sum_of_squares(flat: Tensor, segments: Tensor | None = None) -> Tensor:
    """Rows of 1024 in the storage's precision, their sums in float64. (torch's norm of a whole float32 buffer is off by 5e-4.)"""
    pieces = [(0, flat.numel(), 0)] if segments is None else segments.tolist()
    total = flat.new_zeros((), dtype=torch.float64)
    for start, length, _ in pieces:
        whole = length - length % NORM_ROW
        rows = flat[start : start + whole].view(-1, NORM_ROW).to(reference.compute_dtype(flat))
        rest = flat[start + whole : start + length]
        total += (
            torch.linalg.vector_norm(rows, dim=1).double().square().sum()
            + rest.double().square().sum()
        )
    return total

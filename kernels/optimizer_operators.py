"""The optimizer's operations as torch sees them: AdamW over a flat shard, the gradient norm, the beginning of a step.

CPU tensors run native_optimizer.py, CUDA tensors the Triton launchers of adamw.py and grad_norm.py. The flat buffers hold every
parameter at a multiple of 64 elements; the next multiple of 64 after its last element is padding, which no operation changes.
"""

import torch
from torch import Tensor

from . import launch, native_optimizer, reference
from .library import lazy, register

# What `control` (float64 [8]) holds. The optimizer writes the first before a step; `begin_step_` writes the others.
LEARNING_RATE, STEP, CLIP, SKIP, CORRECTION1, CORRECTION2, GRAD_NORM = range(7)
CONTROL_SIZE = 8

ALIGNMENT = 64  # elements: where a segment may start, and what its padding is rounded up to

_adamw = register(
    "adamw_(Tensor(a!)? parameter_out, Tensor(b!) master, Tensor(c!) exp_avg, Tensor(d!) exp_avg_sq, Tensor grad, Tensor segments, "
    "Tensor groups, Tensor control, float beta1, float beta2) -> ()",
    cpu=native_optimizer.adamw_,
    cuda=lazy("adamw", "adamw_"),
    fake=lambda *_: None,
)
_sum_of_squares = register(
    "sum_of_squares(Tensor flat, Tensor? segments) -> Tensor",
    cpu=native_optimizer.sum_of_squares,
    cuda=lazy("grad_norm", "sum_of_squares"),
    fake=lambda flat, segments: flat.new_empty((), dtype=torch.float64),
)
_begin_step = register(
    "begin_step_(Tensor(a!) control, Tensor sum_sq, float max_norm, float beta1, float beta2) -> ()",
    cpu=reference.begin_step_,
    cuda=lazy("grad_norm", "begin_step_"),
    fake=lambda *_: None,
)


def device_segments(segments: Tensor, device: torch.device | str) -> Tensor:
    """Check a segment table (int64 [n, 3] on the CPU: start, length, group) and put it on `device`, once per run.

    For a GPU it is cut into pieces of one program each, so that all multiprocessors share the work. Raises ValueError for a
    table that the operations cannot use.
    """
    device = torch.device(device)
    table = block_table(segments, launch.block_shape("adamw", device).block)
    return segments if device.type == "cpu" else table.to(device)


def block_table(segments: Tensor, block: int) -> Tensor:
    """Cut `segments` into pieces of at most `block` elements: a segment table too, without empty segments."""
    if segments.dtype != torch.int64 or segments.dim() != 2 or segments.shape[1] != 3:
        raise ValueError(f"a segment table is int64 [n, 3] (start, length, group), not {segments.dtype} {list(segments.shape)}.")
    if block <= 0 or block % ALIGNMENT:
        raise ValueError(f"block = {block} must be a positive multiple of {ALIGNMENT} elements.")
    start, length, group = segments.unbind(1)
    wrong = (start % ALIGNMENT != 0) | (start < 0) | (length < 0)
    wrong[1:] |= start[1:] < (start + length)[:-1]
    if wrong.any():
        row = int(wrong.nonzero()[0])
        raise ValueError(
            f"segment {row} (start, length, group) = {segments[row].tolist()}: starts must be multiples of {ALIGNMENT} elements, in "
            "ascending order, lengths must be >= 0, and no segment may reach into the next."
        )
    pieces = (length + block - 1) // block
    owner = torch.repeat_interleave(torch.arange(len(segments)), pieces)
    offset = (torch.arange(len(owner)) - (torch.cumsum(pieces, 0) - pieces)[owner]) * block
    return torch.stack([start[owner] + offset, torch.clamp(length[owner] - offset, max=block), group[owner]], dim=1)


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
    """One AdamW step of every segment of a flat shard, in place; nothing at all when the skip flag is set.

        g = clip * grad;  m += (1 - beta1)*(g - m);  v += (1 - beta2)*(g*g - v)
        p -= lr * (m / correction1 / (sqrt(v / correction2) + eps) + weight_decay * p),   lr = control[0] * lr_factor

    `master`, `exp_avg`, `exp_avg_sq` [n]: float32 or float64; `grad` [n]: float32, float64 or bf16, not changed; `parameter_out`
    [n], if given, receives the new `master`, rounded. `segments` int64 [k, 3] (start, length, group) from `device_segments`;
    `groups` float64 [G, 3] (lr_factor, weight_decay, eps); `control` float64 [8], see the constants above. Every tensor is on the
    device, contiguous, and long enough for the padding of its last segment. No communication, no host synchronisation on a GPU.
    Source: Loshchilov and Hutter, Decoupled weight decay regularization (arXiv 1711.05101), in PyTorch's form (decay times lr).
    """
    _adamw(parameter_out, master, exp_avg, exp_avg_sq, grad, segments, groups, control, beta1, beta2)


def sum_of_squares(flat: Tensor, segments: Tensor | None = None) -> Tensor:
    """The sum of the squares of a flat buffer [n] as a float64 scalar on its device, in a fixed order (bitwise repeatable).

    With `segments` (from `device_segments`) only those pieces count: leave out what another rank counts, then all-reduce.
    Squares are taken in float32 (float64 for float64 buffers): a gradient element above 1.8e19 makes the norm infinite.
    """
    return _sum_of_squares(flat, segments)


def begin_step_(control: Tensor, sum_sq: Tensor, max_norm: float, beta1: float, beta2: float) -> None:
    """Decide a step on the device, from the squares of all gradients summed over all ranks (float64 scalar).

    Writes into `control`: the norm; the clip coefficient min(1, max_norm / (norm + 1e-6)), or 1 when `max_norm` is 0; the skip flag,
    set when the norm is not finite; the step, which a skipped step does not advance; both bias corrections 1 - beta^step.
    """
    _begin_step(control, sum_sq, max_norm, beta1, beta2)

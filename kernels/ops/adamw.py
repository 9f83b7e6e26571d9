"""AdamW over a flat shard in one launch.

It covers every parameter group, gradient clipping, the skip flag and the bf16 copy. A table of
segments says which elements belong to which group, so one launch serves any number of parameters.
Everything that changes from step to step is read from the record of control.py on the device:
nothing waits for the host, and a captured CUDA graph stays right. Traffic: 30 bytes a parameter
(master, both moments and the gradient in float32, a bf16 copy out).
"""

import torch
from torch import Tensor

from ..control import AT_CLIP, AT_CORRECTION1, AT_CORRECTION2, AT_LEARNING_RATE, AT_SKIP
from ..cpu import optimizer as cpu
from ..launch import block_shape, options
from ..library import register
from ..optional_triton import tl, triton

ALIGNMENT = 64  # elements: where a segment may start, and what its padding is rounded up to


@triton.jit
def adamw_kernel(
    parameter_out: tl.tensor,
    master: tl.tensor,
    exp_avg: tl.tensor,
    exp_avg_sq: tl.tensor,
    grad: tl.tensor,
    segments: tl.tensor,  # int64 [programs, 3]: start, length, group
    groups: tl.tensor,  # float64 [G, 3]: learning-rate factor, weight decay, eps
    control: tl.tensor,  # float64 [8], see control.py
    BETA1: tl.constexpr,
    BETA2: tl.constexpr,
    HAS_OUT: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Each program updates one row of `segments`; `parameter_out` is used with HAS_OUT only."""
    dtype = master.dtype.element_ty
    program = tl.program_id(0).to(tl.int64)
    row = segments + program * 3
    # Vectors of 128 bits need a start and an end that are known multiples: the padding is loaded,
    # and stored back as it was.
    start = tl.multiple_of(tl.load(row), 64)
    length = tl.load(row + 1).to(tl.int32)
    padded = (length + 63) // 64 * 64
    skip = tl.load(control + AT_SKIP)
    padded = tl.where(skip == 0.0, padded, 0)  # a skipped step touches nothing
    padded = tl.multiple_of(padded, 64)
    unpadded = tl.multiple_of(length // 64 * 64, 64)  # the elements of vectors without padding

    group = groups + tl.load(row + 2) * 3
    learning_rate = tl.load(control + AT_LEARNING_RATE)
    lr = learning_rate * tl.load(group)
    step_size = (lr / tl.load(control + AT_CORRECTION1)).to(dtype)
    decay = (lr * tl.load(group + 1)).to(dtype)
    eps = tl.load(group + 2).to(dtype)
    clip = tl.load(control + AT_CLIP).to(dtype)
    correction2 = tl.load(control + AT_CORRECTION2).to(dtype)

    master += start
    exp_avg += start
    exp_avg_sq += start
    grad += start
    for offset in range(0, padded, BLOCK):
        i = offset + tl.arange(0, BLOCK)
        mask = i < padded
        g = tl.load(grad + i, mask=mask, other=0.0).to(dtype) * clip
        p = tl.load(master + i, mask=mask, other=0.0)
        m = tl.load(exp_avg + i, mask=mask, other=0.0)
        v = tl.load(exp_avg_sq + i, mask=mask, other=0.0)
        new_m = m + (1 - BETA1) * (g - m)
        new_v = v + (1 - BETA2) * (g * g - v)
        # The rounded square root: the fast one flushes subnormal variances to zero, and a gradient
        # of 1e-20 would explode.
        corrected_v = new_v / correction2
        root = tl.sqrt(corrected_v) if dtype == tl.float64 else tl.sqrt_rn(corrected_v)
        update = step_size * new_m / (root + eps)
        new_p = p - (update + decay * p)

        # What is loaded of the padding is stored back.
        inside = i < length
        new_p = tl.where(inside, new_p, p)
        tl.store(exp_avg + i, tl.where(inside, new_m, m), mask=mask)
        tl.store(exp_avg_sq + i, tl.where(inside, new_v, v), mask=mask)
        tl.store(master + i, new_p, mask=mask)
        if HAS_OUT:
            # The old padding of the copy is not loaded, so it cannot be stored back: full vectors
            # come first, then the odd end of a parameter.
            out = new_p.to(parameter_out.dtype.element_ty)
            tl.store(parameter_out + start + i, out, mask=i < unpadded)
            tl.store(parameter_out + start + i, out, mask=inside & (i >= unpadded))


def launch_adamw_(
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
    """One launch, one program a row of `segments`, which `device_segments` has cut to blocks."""
    if segments.shape[0] == 0:
        return
    shape = block_shape("adamw", master.dtype, master.device)
    grid = (segments.shape[0],)
    adamw_kernel[grid](
        master if parameter_out is None else parameter_out,
        master,
        exp_avg,
        exp_avg_sq,
        grad,
        segments,
        groups,
        control,
        BETA1=beta1,
        BETA2=beta2,
        HAS_OUT=parameter_out is not None,
        BLOCK=shape.block,
        **options(shape.num_warps),
    )


_adamw = register(
    "adamw_(Tensor(a!)? parameter_out, Tensor(b!) master, Tensor(c!) exp_avg, "
    "Tensor(d!) exp_avg_sq, Tensor grad, Tensor segments, Tensor groups, Tensor control, "
    "float beta1, float beta2) -> ()",
    cpu=cpu.adamw_,
    cuda=launch_adamw_,
    fake=lambda *_: None,
)


def device_segments(segments: Tensor, device: torch.device | str) -> Tensor:
    """Check a table of segments and put it on `device`, once a run.

    `segments` is int64 [n, 3] on the CPU: start, length, group. For a GPU it is cut into blocks of
    one program each, so that all multiprocessors share the work. Raises ValueError for a table that
    the operations cannot use.
    """
    device = torch.device(device)
    table = block_table(segments, block_shape("adamw", torch.float32, device).block)
    return segments if device.type == "cpu" else table.to(device)


def block_table(segments: Tensor, block: int) -> Tensor:
    """Cut `segments` into blocks of at most `block` elements.

    The result is a table of segments too, without empty ones. Raises ValueError where the table is
    not int64 [n, 3], where a segment does not start at a multiple of 64 elements or reaches into
    the next, and for a `block` that is not a positive multiple of 64.
    """
    is_table = segments.dim() == 2 and segments.shape[1] == 3
    if segments.dtype != torch.int64 or not is_table:
        raise ValueError(
            "a segment table is int64 [n, 3] (start, length, group), "
            f"not {segments.dtype} {list(segments.shape)}."
        )
    if block <= 0 or block % ALIGNMENT:
        raise ValueError(f"block = {block} must be a positive multiple of {ALIGNMENT} elements.")
    start, length, group = segments.unbind(1)
    stop = start + length
    wrong = (start % ALIGNMENT != 0) | (start < 0) | (length < 0)
    wrong[1:] |= start[1:] < stop[:-1]
    if wrong.any():
        row = int(wrong.nonzero()[0])
        raise ValueError(
            f"segment {row} (start, length, group) = {segments[row].tolist()}: starts must be "
            f"multiples of {ALIGNMENT} elements, in ascending order, lengths must be >= 0, and no "
            "segment may reach into the next."
        )

    # One row a block: which segment it belongs to, and its place among that segment's blocks.
    blocks = (length + block - 1) // block
    segment = torch.repeat_interleave(torch.arange(len(segments)), blocks)
    first_block = torch.cumsum(blocks, 0) - blocks
    place = torch.arange(len(segment)) - first_block[segment]
    offset = place * block
    block_start = start[segment] + offset
    block_length = torch.clamp(length[segment] - offset, max=block)
    return torch.stack([block_start, block_length, group[segment]], dim=1)


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
    """One AdamW step of every segment of a flat shard, in place.

    Nothing is changed when the skip flag is set.

        g = clip * grad;  m += (1 - beta1)*(g - m);  v += (1 - beta2)*(g*g - v)
        p -= lr * (m / correction1 / (sqrt(v / correction2) + eps) + weight_decay * p)
        lr = learning_rate * lr_factor

    `master`, `exp_avg`, `exp_avg_sq` [n]: float32 or float64. `grad` [n]: float32, float64 or bf16,
    not changed. `parameter_out` [n], unless it is None, receives the new `master`, rounded.
    `segments` int64 [k, 3] (start, length, group) from `device_segments`; `groups` float64 [G, 3]
    (lr_factor, weight_decay, eps); `control` float64 [8], see control.py. Every tensor is on the
    device, contiguous, and long enough for the padding of its last segment. There is no
    communication, and no host synchronization on a GPU.

    Source: Loshchilov and Hutter, Decoupled weight decay regularization (arXiv 1711.05101), in
    PyTorch's form (decay times lr).
    """
    _adamw(
        parameter_out, master, exp_avg, exp_avg_sq, grad, segments, groups, control, beta1, beta2
    )

"""The gradient norm and the decisions that follow from it, all on the device.

Nothing waits for the host. The order of every sum is fixed: the segments are dealt to a fixed
number of programs; each adds the squares of one segment in the storage's precision and its segments
in float64; one more reduction adds the programs. The same buffer gives the same bits on every run.
"""

import math

import torch
from torch import Tensor

from .. import launch, reference
from ..control import (
    AT_CLIP,
    AT_CORRECTION1,
    AT_CORRECTION2,
    AT_GRAD_NORM,
    AT_SKIP,
    AT_STEP,
)
from ..cpu import optimizer as cpu
from ..launch import block_shape, options
from ..library import register
from ..optional_triton import tl, triton
from ..tiling import ceil_div

_PROGRAMS_A_PROCESSOR = 8


@triton.jit
def sum_of_squares_kernel(
    flat: tl.tensor,
    segments: tl.tensor,  # int64 [count, 3]: start, length, group; unused where WHOLE
    partials: tl.tensor,  # float64 [programs]
    count: tl.tensor,  # of segments, or of blocks where WHOLE
    size: tl.tensor,
    WHOLE: tl.constexpr,  # every element of the buffer counts
    BLOCK: tl.constexpr,
) -> None:
    """Program p sums segments (or blocks) p, p + P, p + 2P, ... into one partial sum."""
    dtype: tl.constexpr = tl.float64 if flat.dtype.element_ty == tl.float64 else tl.float32
    total = tl.zeros([1], dtype=tl.float64)
    for r in range(tl.program_id(0).to(tl.int64), count, tl.num_programs(0)):
        if WHOLE:
            start = r * BLOCK
            length = tl.minimum(size - start, BLOCK)
        else:
            row = segments + r * 3
            start = tl.multiple_of(tl.load(row), 64)
            length = tl.load(row + 1).to(tl.int32)

        # The padding of a segment is loaded too, or vectors of 128 bits would be split.
        squares = tl.zeros([BLOCK], dtype=dtype)
        padded = tl.multiple_of((length + 63) // 64 * 64, 64)
        for offset in range(0, length, BLOCK):
            i = offset + tl.arange(0, BLOCK)
            mask = (i < length) if WHOLE else (i < padded)
            x = tl.load(flat + start + i, mask=mask, other=0.0).to(dtype)
            x = tl.where(i < length, x, 0.0)
            squares += x * x
        total += tl.sum(squares, 0).to(tl.float64)
    tl.store(partials + tl.program_id(0) + tl.arange(0, 1), total)


@triton.jit
def begin_step_kernel(
    control: tl.tensor,  # float64 [8], see control.py
    sum_sq: tl.tensor,  # float64 scalar
    MAX_NORM: tl.constexpr,
    LOG_BETA1: tl.constexpr,
    LOG_BETA2: tl.constexpr,
) -> None:
    """One program decides the step and writes it into the record."""
    squares = tl.load(sum_sq)
    norm = tl.sqrt(squares)
    finite = (squares >= 0.0) & (squares < float("inf"))  # false for NaN
    previous_step = tl.load(control + AT_STEP)
    step = previous_step + tl.where(finite, 1.0, 0.0)
    tl.store(control + AT_STEP, step)

    # Where the norm is not finite the coefficient would be 0 or NaN: the record says 1.
    if MAX_NORM > 0:
        clip = tl.minimum(MAX_NORM / (norm + 1e-6), 1.0)
        tl.store(control + AT_CLIP, tl.where(finite, clip, 1.0))
    else:
        tl.store(control + AT_CLIP, 1.0)
    tl.store(control + AT_SKIP, tl.where(finite, 0.0, 1.0))

    # beta^step is exp(step * log(beta)): `tl` has no power function.
    tl.store(control + AT_CORRECTION1, 1.0 - tl.exp(step * LOG_BETA1))
    tl.store(control + AT_CORRECTION2, 1.0 - tl.exp(step * LOG_BETA2))
    tl.store(control + AT_GRAD_NORM, norm)


def launch_sum_of_squares(flat: Tensor, segments: Tensor | None) -> Tensor:
    """A float64 scalar on the device of `flat`."""
    shape = block_shape("sum_of_squares", flat.dtype, flat.device)
    size = flat.numel()
    count = ceil_div(size, shape.block) if segments is None else segments.shape[0]
    processors = launch.processors(launch.architecture(flat.device))
    programs = max(1, min(_PROGRAMS_A_PROCESSOR * processors, count))
    partials = torch.empty(programs, dtype=torch.float64, device=flat.device)
    grid = (programs,)
    sum_of_squares_kernel[grid](
        flat,
        flat if segments is None else segments,
        partials,
        count,
        size,
        WHOLE=segments is None,
        BLOCK=shape.block,
        **options(shape.num_warps),
    )
    return partials.sum()


def _log(beta: float) -> float:
    return math.log(beta) if beta > 0 else -1e5  # exp(-1e5) is 0, and 0 * -1e5 still 0


def launch_begin_step_(
    control: Tensor, sum_sq: Tensor, max_norm: float, beta1: float, beta2: float
) -> None:
    """One launch of one program."""
    grid = (1,)
    begin_step_kernel[grid](
        control,
        sum_sq,
        MAX_NORM=max_norm,
        LOG_BETA1=_log(beta1),
        LOG_BETA2=_log(beta2),
        **options(num_warps=1),
    )


_sum_of_squares = register(
    "sum_of_squares(Tensor flat, Tensor? segments) -> Tensor",
    cpu=cpu.sum_of_squares,
    cuda=launch_sum_of_squares,
    fake=lambda flat, segments: flat.new_empty((), dtype=torch.float64),
)
_begin_step = register(
    "begin_step_(Tensor(a!) control, Tensor sum_sq, float max_norm, float beta1, float beta2) "
    "-> ()",
    cpu=reference.begin_step_,
    cuda=launch_begin_step_,
    fake=lambda *_: None,
)


def sum_of_squares(flat: Tensor, segments: Tensor | None = None) -> Tensor:
    """The sum of the squares of a flat buffer [n] as a float64 scalar on its device.

    The order is fixed, so the sum is bitwise repeatable. With `segments` (from `device_segments`)
    only their elements count: leave out what another rank counts, then all-reduce. Squares are
    taken in float32 (float64 for float64 buffers): a gradient element above 1.8e19 makes the norm
    infinite.
    """
    return _sum_of_squares(flat, segments)


def begin_step_(
    control: Tensor, sum_sq: Tensor, max_norm: float, beta1: float, beta2: float
) -> None:
    """Decide a step on the device, from the squares of all gradients summed over all ranks.

    `sum_sq` is a float64 scalar. Five decisions are written into `control`: the norm; the clip
    coefficient min(1, max_norm / (norm + 1e-6)), or 1 when `max_norm` is 0; the skip flag, set when
    the norm is not finite; the step, which a skipped step does not advance; both bias corrections
    1 - beta^step.
    """
    _begin_step(control, sum_sq, max_norm, beta1, beta2)

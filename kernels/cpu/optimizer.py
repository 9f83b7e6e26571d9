"""AdamW and the gradient norm on CPU tensors: as in `reference`, and fast enough to train with.

They work on chunks that stay in the cache, so that main memory is crossed once, and no reduction is
split between threads. float64 takes the definition itself: tests compare it to the last digits.
"""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import pairwise

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
    """AdamW through torch's fused CPU kernel, a chunk at a time.

    Clip, update and bf16 copy happen while the chunk is in the cache. The bias corrections come
    from `control`, in float64, not from torch's kernel, which would read a float32 step: at an
    infinite step its own corrections are 1, and with r = sqrt(correction2)
        lr * m/correction1 / (sqrt(v)/r + eps) = lr*r/correction1 * m / (sqrt(v) + eps*r).
    The decay is taken beforehand: torch's kernel rounds 1 - lr*wd to float32, which is 3 percent of
    a decay of 1e-6, always the same way.
    """
    if master.dtype != torch.float32:
        shard = (parameter_out, master, exp_avg, exp_avg_sq, grad)
        reference.adamw_(*shard, segments, groups, control, beta1, beta2)
        return
    step = read_control(control)
    if step.skip:
        return

    # Read once: every number that is taken from a tensor costs host time.
    root = math.sqrt(step.correction2)
    infinite_step = torch.full((), math.inf)
    stored = [master, grad, exp_avg, exp_avg_sq]
    if parameter_out is not None:
        stored.append(parameter_out)
    calls = list(_spans_by_values(segments, groups))
    place, views = _cut(stored, [span for _, spans in calls for span in spans])
    for (lr_factor, weight_decay, eps), spans in calls:
        lr = step.learning_rate * lr_factor
        decay = lr * weight_decay
        places = [place[start] for start, _ in spans]
        parameters, gradients, averages, squares, *copies = (
            [pieces[number] for number in places] for pieces in views
        )
        # `grad` is not changed: what is clipped goes into a buffer that stays in the cache.
        if grad.dtype != torch.float32:
            gradients = [gradient.float() for gradient in gradients]
        if step.clip != 1.0:
            gradients = list(torch._foreach_mul(gradients, step.clip))
        if decay:
            torch._foreach_add_(parameters, parameters, alpha=-decay)
        torch._fused_adamw_(
            parameters,
            gradients,
            averages,
            squares,
            [],
            [infinite_step] * len(parameters),
            lr=lr * root / step.correction1,
            beta1=beta1,
            beta2=beta2,
            weight_decay=0.0,
            eps=eps * root,
            amsgrad=False,
            maximize=False,
        )
        if parameter_out is not None:
            torch._foreach_copy_(copies[0], parameters)


def _cut(
    flats: Sequence[Tensor], spans: Sequence[tuple[int, int]]
) -> tuple[dict[int, int], list[tuple[Tensor, ...]]]:
    """(the number of the piece that begins at an element, the pieces of each flat tensor).

    Each span, a start and a length, is one piece, and so is what lies between two of them. A call
    that makes all the views of a tensor takes a fraction of the host time of one for each.
    """
    bounds = {0, flats[0].numel()}
    for start, length in spans:
        bounds |= {start, start + length}
    edges = sorted(bounds)
    sizes = [stop - start for start, stop in pairwise(edges)]
    places = {start: number for number, start in enumerate(edges)}
    return places, [flat.split(sizes) for flat in flats]


def _spans_by_values(
    segments: Tensor, groups: Tensor
) -> Iterator[tuple[tuple[float, ...], list[tuple[int, int]]]]:
    """(values of a group, parts of the shard as start and length), a chunk of elements at most.

    Long segments are cut. Short ones are taken together, those of groups with equal values too,
    because each call costs host time.
    """
    values = [tuple(row) for row in groups.tolist()]
    parts: dict[tuple[float, ...], list[tuple[int, int]]] = {}
    sizes: Counter[tuple[float, ...]] = Counter()
    for start, length, group in segments.tolist():
        key = values[group]
        stop = start + length
        for begin in range(start, stop, ADAMW_CHUNK):
            size = min(ADAMW_CHUNK, stop - begin)
            if sizes[key] + size > ADAMW_CHUNK:
                yield key, parts.pop(key)
                sizes[key] = 0
            parts.setdefault(key, []).append((begin, size))
            sizes[key] += size
    yield from parts.items()


def sum_of_squares(flat: Tensor, segments: Tensor | None = None) -> Tensor:
    """The sum of the squares of `flat` [n], or of its `segments` [k, 3], as a float64 scalar.

    Rows of 1024 elements are summed in the storage's precision and their sums in float64: torch's
    norm of a float32 buffer in one row is off by 5e-4.
    """
    table = [(0, flat.numel(), 0)] if segments is None else segments.tolist()
    math_dtype = reference.compute_dtype(flat)
    total = flat.new_zeros((), dtype=torch.float64)
    for start, length, _ in table:
        remainder = length % NORM_ROW
        stop = start + length
        rows = flat[start : stop - remainder].view(-1, NORM_ROW).to(math_dtype)
        row_norms = torch.linalg.vector_norm(rows, dim=1).double()
        tail = flat[stop - remainder : stop].double()
        total += row_norms.square().sum() + tail.square().sum()
    return total

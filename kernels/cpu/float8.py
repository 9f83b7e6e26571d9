"""Float8 operands on a CPU: torch's own casts, which round to nearest even."""

import torch
from torch import Tensor

from .. import reference


def largest_magnitude(x: Tensor) -> Tensor:
    """float32 []; NaN where an element is NaN."""
    if x.numel() == 0:
        return torch.zeros((), device=x.device)
    return x.detach().abs().amax().float()


def float8_cast(
    x: Tensor, amax: Tensor, gradient: bool, transpose: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """As `reference.float8_cast`, with the transpose [n, m] or, without, an empty tensor."""
    data, scale = reference.float8_cast(x, amax, gradient)
    transposed = data.t().contiguous() if transpose else data.new_empty(0)
    return data, scale, transposed


def largest_of_segments(values: Tensor, segments: Tensor, groups: int) -> Tensor:
    """float32 [groups]: the largest magnitude of the segments of each group."""
    largest = torch.zeros(groups, device=values.device)
    for start, size, group in segments.tolist():
        largest[group] = torch.maximum(
            largest[group], largest_magnitude(values[start : start + size])
        )
    return largest

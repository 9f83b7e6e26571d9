"""Matrix products of groups of rows, each group with a matrix of its own: the linear of experts.

Rows lie sorted by group. The loop over groups is the definition, and what float64 takes; torch's
grouped product computes the same in one call. R rows, G groups.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Parameter

from megatron_completep.parallel.expert_load import ExpertLoad, naming_load
from megatron_completep.parallel.gradients import Accumulate, GradientQueue
from megatron_completep.parallel.products import Products

# torch 2.11 has the private name only.
_grouped_mm: Any = getattr(F, "grouped_mm", None) or getattr(torch, "_grouped_mm", None)
# Multiply-adds of one group's product up to which one call for all groups was the faster one on the
# CPU where it was tried, whose figures are not kept. Larger ones are left to the run's library.
LARGEST_GROUPED = 1 << 24


def grouped_linear(
    x: Tensor,
    weight: Parameter,
    sizes: Sequence[int],
    products: Products,
    queue: GradientQueue,
    load: ExpertLoad | None = None,
) -> Tensor:
    """x [R, in] -> [R, out]: the rows of group g times weight[g]^T.

    The weight gradient goes to the queue, one contribution for all groups also where there are no
    rows. Nothing communicates.

    weight: [G, out, in]. sizes: rows of each group, in order; they add up to R. load: what is named
    where the backward pass does not fit into memory.
    """
    out: Tensor = _GroupedLinear.apply(  # type: ignore[no-untyped-call]
        x, weight, tuple(sizes), products, queue, load
    )
    return out


class _GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        sizes: tuple[int, ...],
        products: Products,
        queue: GradientQueue,
        load: ExpertLoad | None,
    ) -> Tensor:
        ctx.load = load
        ctx.save_for_backward(x, weight)
        ctx.weight = weight  # the parameter itself, for the queue
        ctx.sizes = sizes
        ctx.products = products
        ctx.queue = queue
        return grouped_product(x, weight, sizes, products)

    @staticmethod
    @naming_load
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, None, None, None, None, None]:
        x, weight = ctx.saved_tensors
        d_out = d_out.contiguous()
        d_x = None
        if ctx.needs_input_grad[0]:
            d_x = grouped_input_gradient(d_out, weight, ctx.sizes, ctx.products)
        contribution = accumulate_grouped(ctx.products, d_out, x, ctx.sizes)
        ctx.queue.push(ctx.weight, _named(contribution, ctx.load))
        return d_x, None, None, None, None, None


def _named(accumulate: Accumulate, load: ExpertLoad | None) -> Accumulate:
    """A contribution that names the load, too, where it does not fit: it may be computed later."""
    if load is None:
        return accumulate

    def named(main_grad: Tensor, first: bool) -> None:
        with load.naming():
            accumulate(main_grad, first)

    return named


def grouped_product(x: Tensor, weight: Tensor, sizes: Sequence[int], products: Products) -> Tensor:
    """x [R, in], weight [G, out, in] -> [R, out]."""
    if takes_one_call(x, weight, sizes):
        out: Tensor = _grouped_mm(x, weight.transpose(-2, -1), offs=_ends(sizes, x.device))
        return out
    return looped_product(x, weight, sizes, products)


def looped_product(x: Tensor, weight: Tensor, sizes: Sequence[int], products: Products) -> Tensor:
    """The definition of `grouped_product`."""
    out = x.new_empty(x.shape[0], weight.shape[1])
    for group, rows in _groups(sizes):
        out[rows] = products.forward(x[rows], weight[group])
    return out


def grouped_input_gradient(
    d_out: Tensor, weight: Tensor, sizes: Sequence[int], products: Products
) -> Tensor:
    """d_out [R, out], weight [G, out, in] -> [R, in]."""
    if takes_one_call(d_out, weight, sizes):
        d_x: Tensor = _grouped_mm(d_out, weight, offs=_ends(sizes, d_out.device))
        return d_x
    d_x = d_out.new_empty(d_out.shape[0], weight.shape[2])
    for group, rows in _groups(sizes):
        products.input_gradient(d_out[rows], weight[group], out=d_x[rows])
    return d_x


def accumulate_grouped(
    products: Products, d_out: Tensor, x: Tensor, sizes: Sequence[int]
) -> Accumulate:
    """main_grad [G, out, in] (+)= d_out^T x of each group's rows; 0 of a group without rows."""

    def accumulate(main_grad: Tensor, first: bool) -> None:
        # On a GPU one call, which reads no sizes from the host; a CPU adds in place.
        if x.is_cuda and takes_one_call(x, main_grad, sizes):
            total = _grouped_mm(d_out.t(), x, offs=_ends(sizes, x.device))
            main_grad.copy_(total) if first else main_grad.add_(total)
            return
        if first and 0 in sizes:
            main_grad.zero_()
        for group, rows in _groups(sizes):
            products.add_weight_gradient(main_grad[group], d_out[rows], x[rows], first)

    return accumulate


def takes_one_call(x: Tensor, weight: Tensor, sizes: Sequence[int]) -> bool:
    """Whether torch's grouped product can compute this, and was the faster one."""
    if _grouped_mm is None or x.shape[0] == 0:
        return False
    _, out_features, in_features = weight.shape
    if x.is_cuda:
        # The kernel wants bf16, and rows that begin at multiples of 16 bytes.
        return x.dtype == torch.bfloat16 and out_features % 8 == 0 and in_features % 8 == 0
    if x.dtype == torch.bfloat16:
        return True
    work = x.shape[0] * out_features * in_features // len(sizes)
    return x.dtype == torch.float32 and work <= LARGEST_GROUPED


def _ends(sizes: Sequence[int], device: torch.device) -> Tensor:
    """int32 [G]: where the rows of each group end."""
    return torch.tensor(list(accumulate(sizes)), dtype=torch.int32, device=device)


def _groups(sizes: Sequence[int]) -> Iterator[tuple[int, slice]]:
    """Number and rows of every group that has any."""
    start = 0
    for group, size in enumerate(sizes):
        if size:
            yield group, slice(start, start + size)
        start += size

"""A parameter says everything about itself once: its `Spec` is made where the parameter is made.

Initial weights, learning-rate groups, the optimizer, checkpoints, replayed traces and plans ask the
spec. None of them knows a module or the name of a parameter.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from megatron_completep.errors import ConfigError
from megatron_completep.parallel.axis import Share
from megatron_completep.parallel.collectives import all_reduce
from megatron_completep.parallel.context import ParallelContext
from megatron_completep.roles import Role

Range = tuple[int, int]  # [start, stop)


class Site(StrEnum):
    """Which forward multiplier acts right behind a tensor.

    Where the multiplier changes, the values of the tensor can be changed in its place.
    """

    STREAM = "stream"  # the residual multiplier, on the output of a branch
    QUERY = "query"  # the attention scale
    INPUT = "input"  # model.input_multiplier
    LOGITS = "logits"  # the logit multiplier
    TIED_LOGITS = "tied logits"  # before a tied unembedding, which has the input multiplier, too


@dataclass(frozen=True)
class Spec:
    """What is to be known of one parameter.

    shape: of the logical tensor, before any split and without padding.
    fan_in, base_fan_in: of the logical matrix, or of one part of a fused one; here and at the
        proxy.
    parts: name -> size of each logical matrix that a fused one stacks along `part_dim`, in order.
    split: dimension -> this rank's share along the mesh axis that divides it; along `part_dim`
        every part is divided by itself.
    multiple: a split dimension is padded so that every rank holds a multiple of this; padding
        belongs to no parameter.
    partial_over: the axis over whose ranks the gradient of a replicated parameter is a sum of
        shares.
    summed_over: the axis whose ranks hold the same parameter and see other tokens: gradients are
        summed over it, and the optimizer's state is sharded along it.
    uses: gradient contributions a micro-batch.
    tied_to: the name under which the two ends of a pipeline are one parameter.
    constant: the initial value of every element; None: drawn at random.
    site: which forward multiplier acts behind it, on the part `site_part` alone where one is named.
    """

    role: Role
    shape: tuple[int, ...]
    fan_in: int | None = None
    base_fan_in: int | None = None
    parts: Mapping[str, int] = field(default_factory=dict)
    part_dim: int = 0
    split: Mapping[int, Share] = field(default_factory=dict)
    multiple: int = 1
    partial_over: str | None = None
    summed_over: str = "gradient"
    uses: int = 1
    tied_to: str | None = None
    constant: float | None = None
    site: Site | None = None
    site_part: str | None = None

    # --- the table --------------------------------------------------------------------------------

    @property
    def width_ratio(self) -> float:
        """fan_in / base_fan_in; 1 for vectors, the embedding and the unembedding."""
        if self.fan_in is None or self.base_fan_in is None:
            return 1.0
        return self.fan_in / self.base_fan_in

    @property
    def writes_to_stream(self) -> bool:
        """Whether this parameter makes the output of a branch."""
        return self.site is Site.STREAM

    @property
    def partial_gradient(self) -> bool:
        """Whether the gradient on this rank is a share of a sum."""
        return self.partial_over is not None

    # --- names ------------------------------------------------------------------------------------

    def stored_name(self, name: str) -> str:
        """The name under which a parameter called `name` here is drawn, grouped and stored."""
        return self.tied_to or name

    def is_copy(self, name: str) -> bool:
        """Whether another parameter of the model, of the name `tied_to`, stands for this one."""
        return self.tied_to not in (None, name)

    # --- geometry ---------------------------------------------------------------------------------

    @property
    def replicated(self) -> bool:
        """Whether every rank of the model holds all of it."""
        return not self.split

    def local_ranges(self, dim: int) -> tuple[Range, ...]:
        """The logical ranges that follow one another along `dim` of the local tensor.

        What reaches past the logical size is padding.
        """
        share = self.split.get(dim)
        if share is None:
            return ((0, self.shape[dim]),)
        if self.parts and dim == self.part_dim:
            return _share_of_each(tuple(self.parts.values()), share)
        # Rounded up, so that every rank has the same number of rows.
        padded_to = self.multiple * share.size
        size = -(-self.shape[dim] // padded_to) * self.multiple
        return ((share.rank * size, (share.rank + 1) * size),)

    @property
    def local_shape(self) -> tuple[int, ...]:
        """The shape of what this rank holds, padding included."""
        dims = range(len(self.shape))
        return tuple(sum(stop - start for start, stop in self.local_ranges(dim)) for dim in dims)

    @property
    def size(self) -> int:
        """Elements of the logical tensor."""
        return prod(self.shape)

    def part_range(self, name: str) -> Range:
        """[start, stop) of a part along `part_dim` of the logical tensor."""
        start = 0
        for part_name, size in self.parts.items():
            if part_name == name:
                return start, start + size
            start += size
        raise KeyError(name)

    def cut(self, logical: Tensor) -> Tensor:
        """What this rank holds of a logical tensor; padding is 0."""
        local = logical
        for dim in self.split:
            local = _cut(local, dim, self.local_ranges(dim))
        return local

    def spread(self, local: Tensor) -> Tensor:
        """The logical tensor with this rank's elements in their place, and 0 everywhere else."""
        logical = local
        for dim in self.split:
            logical = _spread(logical, dim, self.local_ranges(dim), self.shape[dim])
        return logical

    def join(self, local: Tensor, context: ParallelContext) -> Tensor:
        """The logical tensor, on every rank. Communicates over the axes that split it."""
        logical = self.spread(local)
        for share in self.split.values():
            # Every element is held by one rank along the axis, and is 0 on all others.
            logical = all_reduce(logical.contiguous(), context.axis(share.axis))
        return logical

    def counts_on(self, name: str, context: ParallelContext) -> bool:
        """Whether this rank's copy of the parameter counts.

        Of the ranks that hold the same elements one counts them, in what is summed or stored once:
        norms and checkpoints. `name` is the parameter's name here.
        """
        split_over = {share.axis for share in self.split.values()}
        repeated = (axis for axis in context.model_axes if axis.name not in split_over)
        is_first = all(axis.rank == 0 for axis in repeated) and context.replica.rank == 0
        return is_first and not self.is_copy(name)


def make_parameter(spec: Spec, context: ParallelContext) -> nn.Parameter:
    """A float32 parameter of this rank's shape.

    A constant one is filled here; the others are filled by `initialize`.
    """
    if spec.constant is None:
        tensor = torch.empty(spec.local_shape, device=context.device)
    else:
        tensor = torch.full(spec.local_shape, spec.constant, device=context.device)
    parameter: nn.Parameter = attach(nn.Parameter(tensor), spec)
    return parameter


def attach(parameter: Any, spec: Spec) -> Any:
    """Attach its spec to a parameter; returns the parameter."""
    parameter.spec = spec
    return parameter


def declare(
    parameter: Any, role: Role, fan_in: int | None = None, base_fan_in: int | None = None
) -> Any:
    """Declare what a parameter of a plain torch module is; returns the parameter.

    fan_in, base_fan_in: of a matrix of hidden weights, here and at the proxy. A parameter with the
        role of a gain or bias keeps the value with which its module filled it.
    """
    constant = float(role is not Role.HIDDEN_BIAS) if role in CONSTANT else None
    spec = Spec(role, tuple(parameter.shape), fan_in, base_fan_in, constant=constant)
    return attach(parameter, spec)


# Roles that keep the value of a module that only declares them.
CONSTANT = (Role.PRE_NORM, Role.HIDDEN_BIAS, Role.FINAL_NORM, Role.QK_NORM)


def spec_of(parameter: Any, name: str = "") -> Spec:
    """The spec of a parameter.

    Raises ConfigError, with the name, for a parameter without one: its role is never guessed.
    """
    spec = getattr(parameter, "spec", None)
    if not isinstance(spec, Spec):
        raise ConfigError(
            f"parameter {name} declares no CompleteP role. "
            f"Call declare(parameter, role) with one of: {', '.join(Role)}."
        )
    return spec


def specs_of(model: nn.Module) -> dict[str, Spec]:
    """Name -> spec of every parameter of a model, in its order."""
    return {name: spec_of(parameter, name) for name, parameter in model.named_parameters()}


def _share_of_each(parts: tuple[int, ...], share: Share) -> tuple[Range, ...]:
    """This rank's range of each of several stacked parts, each divided evenly over the axis."""
    ranges = []
    offset = 0
    for size in parts:
        length = size // share.size
        start = offset + share.rank * length
        ranges.append((start, start + length))
        offset += size
    return tuple(ranges)


def _cut(tensor: Tensor, dim: int, ranges: tuple[Range, ...]) -> Tensor:
    """The ranges of a logical tensor along `dim`, one after the other; padding is 0."""
    shape = list(tensor.shape)
    shape[dim] = sum(stop - start for start, stop in ranges)
    local = tensor.new_zeros(shape)
    position = 0
    for start, stop in ranges:
        # A range may reach into the padding, or lie in it as a whole.
        length = max(0, min(stop, tensor.shape[dim]) - start)
        if length:
            local.narrow(dim, position, length).copy_(tensor.narrow(dim, start, length))
        position += stop - start
    return local


def _spread(tensor: Tensor, dim: int, ranges: tuple[Range, ...], size: int) -> Tensor:
    """The inverse of `_cut`: `size` elements along `dim`, 0 where the ranges do not reach."""
    shape = list(tensor.shape)
    shape[dim] = size
    logical = tensor.new_zeros(shape)
    position = 0
    for start, stop in ranges:
        length = max(0, min(stop, size) - start)
        if length:
            logical.narrow(dim, start, length).copy_(tensor.narrow(dim, position, length))
        position += stop - start
    return logical

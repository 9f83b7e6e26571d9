"""`Spec`: a parameter's metadata, created together with the parameter.

Initialization, learning-rate groups, the optimizer, checkpoints, trace replay and plans read only
the spec. None of them has code for particular modules or parameter names.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from megatron_completep.errors import ConfigError
from megatron_completep.parallel.axis import Share
from megatron_completep.parallel.collectives import all_reduce
from megatron_completep.parallel.context import ParallelContext
from megatron_completep.roles import CONSTANT_ROLES, Role

Range = tuple[int, int]  # [start, stop)


class ForwardMultiplier(StrEnum):
    """The forward multiplier that is applied directly after a parameter.

    When a checkpoint is loaded under a different multiplier, the parameter's values are rescaled
    instead, which keeps the function (checkpoint/adapt.py).
    """

    STREAM = "stream"  # the residual multiplier, on the output of a branch
    QUERY = "query"  # the attention scale
    INPUT = "input"  # model.input_multiplier
    LOGITS = "logits"  # the logit multiplier
    # logit multiplier / input multiplier, on the final norm before a tied unembedding: the tied
    # weight itself is rescaled for the input multiplier.
    TIED_LOGITS = "tied logits"


class Balance(NamedTuple):
    """How the bias of a router moves: by `rate` towards a load of `share` of all tokens each."""

    rate: float
    share: float  # k / E


@dataclass(frozen=True)
class Spec:
    """Metadata of one parameter.

    shape: shape of the logical tensor, before any split and without padding.
    fan_in, base_fan_in: fan-in of the logical matrix (or of one part of a fused matrix) in this
        model, and in the proxy.
    parts: name -> size of each logical matrix that a fused one stacks along `part_dim`, in order.
    heads: name of a part -> equal matrices, one a head, that it stacks in its turn; 1 where absent.
    split: dimension -> this rank's share along the mesh axis that divides it; along `part_dim` each
        part is split separately.
    multiple: each rank's slice of a split dimension is padded to a multiple of this; padding is not
        part of the logical tensor and not stored.
    partial_over: mesh axis over which a replicated parameter's gradient must still be summed,
        because each rank computes only a partial sum.
    summed_over: mesh axis whose ranks hold the same parameter but process different tokens;
        gradients are reduced and optimizer state sharded along it.
    uses: number of gradient contributions per micro-batch.
    tied_to: common name of a parameter that the first and the last pipeline stage both hold.
    constant: the initial value of every element; None: drawn at random.
    balance: for the bias of a router: what arrives in the place of its gradient are the experts'
        loads, tokens each, and optim/balance.py moves it.
    forward_multiplier: the one applied directly after this parameter, if any; if `multiplied_part`
        is set, only to that part.
    """

    role: Role
    shape: tuple[int, ...]
    fan_in: int | None = None  # None for vectors, the embedding and the unembedding
    base_fan_in: int | None = None  # None like fan_in
    parts: Mapping[str, int] = field(default_factory=dict)
    part_dim: int = 0
    heads: Mapping[str, int] = field(default_factory=dict)
    split: Mapping[int, Share] = field(default_factory=dict)
    multiple: int = 1
    partial_over: str | None = None
    summed_over: str = "gradient"
    uses: int = 1
    tied_to: str | None = None
    constant: float | None = None
    balance: Balance | None = None
    forward_multiplier: ForwardMultiplier | None = None
    multiplied_part: str | None = None

    # --- the table --------------------------------------------------------------------------------

    @property
    def width_ratio(self) -> float:
        """fan_in / base_fan_in; 1 for vectors, the embedding and the unembedding."""
        if self.fan_in is None or self.base_fan_in is None:
            return 1.0
        return self.fan_in / self.base_fan_in

    @property
    def writes_to_stream(self) -> bool:
        """Whether this is the output projection of a branch, or its bias."""
        return self.forward_multiplier is ForwardMultiplier.STREAM

    @property
    def partial_gradient(self) -> bool:
        """Whether this rank's gradient is a partial sum that must be all-reduced."""
        return self.partial_over is not None

    # --- names ------------------------------------------------------------------------------------

    def stored_name(self, name: str) -> str:
        """The name for seeding, grouping and checkpoints, of a parameter `name` on this rank."""
        return self.tied_to or name

    def is_copy(self, name: str) -> bool:
        """Whether this is the second copy of a tied parameter; the original is named `tied_to`."""
        return self.tied_to is not None and self.tied_to != name

    # --- logical parts ----------------------------------------------------------------------------

    @property
    def logical_parts(self) -> tuple[str, ...]:
        """The names of the parts; one empty name where nothing is fused."""
        return tuple(self.parts) if len(self.parts) > 1 else ("",)

    def matrix_of(self, part: str, per_head: bool = False) -> tuple[int, int] | None:
        """(d_out, d_in) of the logical matrices of a part: the last two dimensions; None: a vector.

        Dimensions before the last two count matrices.

        per_head: of one head, where the part has heads.
        """
        if len(self.shape) < 2:
            return None
        shape = list(self.shape)
        if part:
            shape[self.part_dim] = self.parts[part]
        if per_head:
            shape[self.part_dim] //= self.heads.get(part, 1)
        return shape[-2], shape[-1]

    def local_parts(self) -> tuple[tuple[str, int], ...]:
        """Name and size of each part of this rank's tensor along `part_dim`, in order."""
        if len(self.parts) < 2:
            return (("", self.local_shape[self.part_dim]),)
        sizes = [stop - start for start, stop in self._ranges_of_parts]
        return tuple(zip(self.parts, sizes, strict=True))

    @property
    def _ranges_of_parts(self) -> tuple[Range, ...]:
        """For each part, the range along `part_dim` of the logical tensor that this rank holds."""
        share = self.split.get(self.part_dim) or Share("", 0, 1)
        return _share_of_each(tuple(self.parts.values()), share)

    # --- geometry ---------------------------------------------------------------------------------

    @property
    def replicated(self) -> bool:
        """Whether the parameter is not split over any axis."""
        return not self.split

    def local_ranges(self, dim: int) -> tuple[Range, ...]:
        """The ranges of the logical dimension `dim` that this rank holds, in local order.

        A range may extend past the logical size; that part is padding.
        """
        share = self.split.get(dim)
        if share is None:
            return ((0, self.shape[dim]),)
        if self.parts and dim == self.part_dim:
            return self._ranges_of_parts
        # Rounded up, so that every rank has the same number of rows.
        multiples_per_rank = -(-self.shape[dim] // (self.multiple * share.size))
        rows_per_rank = multiples_per_rank * self.multiple
        return ((share.rank * rows_per_rank, (share.rank + 1) * rows_per_rank),)

    @property
    def local_shape(self) -> tuple[int, ...]:
        """The shape of this rank's local tensor, padding included."""
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

    def to_local(self, logical: Tensor) -> Tensor:
        """This rank's part of a logical tensor; padding is 0."""
        local = logical
        for dim in self.split:
            local = _take_ranges(local, dim, self.local_ranges(dim))
        return local

    def to_logical(self, local: Tensor) -> Tensor:
        """The logical tensor with this rank's elements in their places, and 0 elsewhere."""
        logical = local
        for dim in self.split:
            logical = _place_ranges(logical, dim, self.local_ranges(dim), self.shape[dim])
        return logical

    def gather_logical(self, local: Tensor, context: ParallelContext) -> Tensor:
        """The complete logical tensor, on every rank. Communicates over the axes that split it."""
        logical = self.to_logical(local)
        for share in self.split.values():
            # Every element is held by one rank along the axis, and is 0 on all others.
            logical = all_reduce(logical.contiguous(), context.axis(share.axis))
        return logical

    def is_primary(self, name: str, context: ParallelContext) -> bool:
        """Whether this rank's copy is the one that counts, if several ranks hold the same elements.

        The gradient norm and checkpoints use only that copy. name: the parameter's name on this
        rank.
        """
        split_over = {share.axis for share in self.split.values()}
        sharing = context.sharing(self.summed_over)
        repeated = (axis for axis in sharing if axis.name not in split_over)
        is_first = all(axis.rank == 0 for axis in repeated) and context.replica.rank == 0
        return is_first and not self.is_copy(name)


def make_parameter(spec: Spec, context: ParallelContext) -> nn.Parameter:
    """A float32 parameter of this rank's shape.

    Constant parameters are filled here, all others later by `model.initialize.initialize`.
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
    """Declare the role of a parameter of a plain torch module; returns the parameter.

    Raises ConfigError for a word that is no role and for a fan-in that is no size.

    fan_in, base_fan_in: of a matrix of hidden weights, in this model and in the proxy.

    `initialize` leaves a gain or a bias at the value that its module gave it. Here `constant` is
    only recorded; layers that a checkpoint lacks start from it (checkpoint/adapt.py).
    """
    if role not in list(Role):
        raise ConfigError(f"{role} is no role. Use one of: {', '.join(Role)}.")
    role = Role(role)  # a plain word would not be known by identity later
    for name, size in (("fan_in", fan_in), ("base_fan_in", base_fan_in)):
        if size is not None and not (isinstance(size, int) and size >= 1):
            raise ConfigError(f"{name} = {size!r}: a size is a whole number of at least 1.")
    constant: float | None = None
    if role in (Role.HIDDEN_BIAS, Role.BALANCE_BIAS):
        constant = 0.0
    elif role in CONSTANT_ROLES:
        constant = 1.0
    spec = Spec(role, tuple(parameter.shape), fan_in, base_fan_in, constant=constant)
    return attach(parameter, spec)


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


def part_name(name: str, part: str) -> str:
    """The name of a logical part of a parameter; that of the parameter where nothing is fused."""
    return f"{name}.{part}" if part else name


def specs_of(model: nn.Module) -> dict[str, Spec]:
    """Name -> spec of every parameter of a model, in its order."""
    return {name: spec_of(parameter, name) for name, parameter in model.named_parameters()}


def _share_of_each(parts: tuple[int, ...], share: Share) -> tuple[Range, ...]:
    """For each stacked part, the range this rank holds; every part is split evenly."""
    ranges = []
    offset = 0
    for size in parts:
        length = size // share.size
        start = offset + share.rank * length
        ranges.append((start, start + length))
        offset += size
    return tuple(ranges)


def _take_ranges(tensor: Tensor, dim: int, ranges: tuple[Range, ...]) -> Tensor:
    """The ranges of a logical tensor along `dim`, one after the other; padding is 0."""
    shape = list(tensor.shape)
    shape[dim] = sum(stop - start for start, stop in ranges)
    local = tensor.new_zeros(shape)
    position = 0
    for start, stop in ranges:
        # A range may extend into the padding, or lie completely in it.
        length = max(0, min(stop, tensor.shape[dim]) - start)
        if length:
            local.narrow(dim, position, length).copy_(tensor.narrow(dim, start, length))
        position += stop - start
    return local


def _place_ranges(tensor: Tensor, dim: int, ranges: tuple[Range, ...], size: int) -> Tensor:
    """The inverse of `_take_ranges`: `size` elements along `dim`, 0 outside the ranges."""
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

"""Which part of a logical (unsharded) tensor a rank holds. Initial weights, checkpoints and tests read it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megatron_completep.parallel.context import Axis


@dataclass(frozen=True)
class Placement:
    """`ranges` are the [start, stop) pieces along `dim` of the logical tensor that lie one after the other in the local one.

    dim None: every tensor rank holds the whole. Rows past the logical size (vocabulary padding) are held but belong to nothing.
    """

    global_shape: tuple[int, ...]
    dim: int | None = None
    ranges: tuple[tuple[int, int], ...] = ()
    partial_gradient: bool = False  # the local gradient is one tensor rank's share of the sum
    uses: int = 1  # gradient contributions a micro-batch (2 for a tied embedding)
    tied_to: str | None = None  # embedding and unembedding tied across pipeline stages: the name under which they are one

    @property
    def replicated(self) -> bool:
        return self.dim is None


def place(parameter: Any, placement: Placement) -> Any:
    """Attach a placement to a parameter where it is created; returns the parameter."""
    parameter.placement = placement
    return parameter


def placement_of(parameter: Any) -> Placement:
    """The placement of a parameter; one without is whole on every rank."""
    return getattr(parameter, "placement", None) or Placement(tuple(parameter.shape))


def logical_name(name: str, parameter: Any) -> str:
    """The name of a parameter in the whole model: one that is tied across pipeline stages has the same at both ends."""
    return placement_of(parameter).tied_to or name


def shard_ranges(parts: tuple[int, ...], axis: Axis) -> tuple[tuple[int, int], ...]:
    """This rank's range of each of several stacked parts (q, k, v or gate, up), each divided evenly over the axis."""
    ranges, offset = [], 0
    for size in parts:
        share = size // axis.size
        ranges.append((offset + axis.rank * share, offset + (axis.rank + 1) * share))
        offset += size
    return tuple(ranges)

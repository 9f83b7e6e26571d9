"""From flat shards to boxes of logical tensors and back. Arithmetic only.

A rank's optimizer shard is a list of runs of flattened local parameters. A run is a few boxes of the local tensor, and the
parameter's `Spec` says where those lie in the logical, unsharded tensor. A checkpoint stores
boxes by logical name and coordinates, so what reads it needs to know nothing of the layout that wrote it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from math import prod
from operator import mul

from megatron_completep.optim.layout import Segment
from megatron_completep.parallel.parameter import Spec


@dataclass(frozen=True)
class Box:
    """Elements [offset, offset + size) of a logical tensor, dimension by dimension."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    @property
    def numel(self) -> int:
        return prod(self.sizes)

    def moved(self, by: tuple[int, ...]) -> Box:
        """The same box further along."""
        return Box(tuple(a + b for a, b in zip(self.offsets, by, strict=True)), self.sizes)

    def within(self, other: Box) -> bool:
        """Whether it has as many dimensions and no element that `other` lacks."""
        return len(self.sizes) == len(other.sizes) and (
            self.numel == 0 or self.intersect(other) == self
        )

    def intersect(self, other: Box) -> Box | None:
        """What both hold, or None."""
        starts = tuple(map(max, self.offsets, other.offsets))
        stops = tuple(
            min(a + m, b + n)
            for a, m, b, n in zip(self.offsets, self.sizes, other.offsets, other.sizes, strict=True)
        )
        if any(start >= stop for start, stop in zip(starts, stops, strict=True)):
            return None
        return Box(starts, tuple(stop - start for start, stop in zip(starts, stops, strict=True)))


@dataclass(frozen=True)
class OwnedBox:
    """A box of the logical tensor `name`, and where this rank's flat shard holds it.

    Its first element is `start` in the shard; `strides` are the local tensor's.
    """

    name: str
    box: Box
    start: int
    strides: tuple[int, ...]

    def locate(self, part: Box) -> tuple[int, tuple[int, ...], tuple[int, ...]]:
        """Start, sizes and strides of a part of this box, for `torch.as_strided` on the flat shard."""
        inner = (a - b for a, b in zip(part.offsets, self.box.offsets, strict=True))
        start = self.start + sum(map(mul, inner, self.strides))
        return start, part.sizes, self.strides


def owned_boxes(segments: Iterable[Segment], specs: Mapping[str, Spec]) -> list[OwnedBox]:
    """The boxes of the segments of a shard, in shard order; padding is left out."""
    boxes: list[OwnedBox] = []
    for segment in segments:
        boxes += _boxes_of(segment, specs[segment.name])
    return boxes


def _boxes_of(segment: Segment, spec: Spec) -> Iterator[OwnedBox]:
    shape = spec.local_shape
    strides = strides_of(shape)
    for local in cut_run(segment.parameter_start, segment.size, shape):
        for offsets, box in _logical(spec, local):
            position = sum(map(mul, offsets, strides)) - segment.parameter_start
            yield OwnedBox(segment.name, box, segment.shard_start + position, strides)


def strides_of(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Of a contiguous tensor, in elements."""
    return tuple(prod(shape[dim + 1 :]) for dim in range(len(shape)))


def cut_run(start: int, size: int, shape: tuple[int, ...]) -> Iterator[Box]:
    """The flat run [start, start + size) of a contiguous tensor as boxes of it, in order.

    A run of a matrix is at most three: the rest of a row, whole rows, the start of a row. The ends of a run of a tensor with
    more dimensions are cut in the same way once more.
    """
    if size == 0:
        return
    if len(shape) == 1:
        yield Box((start,), (size,))
        return
    row = prod(shape[1:])
    stop = start + size
    if start % row or size < row:
        end = min(stop, start - start % row + row)
        yield from _inside_row(start, end - start, shape)
        start = end
    rows = (stop - start) // row
    if rows:
        zeros = (0,) * (len(shape) - 1)
        yield Box((start // row, *zeros), (rows, *shape[1:]))
        start += rows * row
    if start < stop:
        yield from _inside_row(start, stop - start, shape)


def _inside_row(start: int, size: int, shape: tuple[int, ...]) -> Iterator[Box]:
    """The boxes of a run that stays inside one index of the first dimension."""
    row = prod(shape[1:])
    index = start // row
    for box in cut_run(start - index * row, size, shape[1:]):
        yield Box((index, *box.offsets), (1, *box.sizes))


def _logical(spec: Spec, local: Box) -> Iterator[tuple[tuple[int, ...], Box]]:
    """A local box in logical coordinates, cut where the ranges jump, each with its offsets in the local tensor."""
    along = []
    for dim, (first, count) in enumerate(zip(local.offsets, local.sizes, strict=True)):
        ranges = spec.local_ranges(dim)
        along.append(list(_ranges_within(ranges, first, count, spec.shape[dim])))
    for pieces in product(*along):
        offsets = tuple(here for here, _, _ in pieces)
        starts = tuple(there for _, there, _ in pieces)
        yield offsets, Box(starts, tuple(size for _, _, size in pieces))


def _ranges_within(
    ranges: Iterable[tuple[int, int]], first: int, count: int, limit: int
) -> Iterator[tuple[int, int, int]]:
    """(local position, logical position, size) of the parts of local [first, first + count); nothing past `limit`."""
    position = 0
    for start, stop in ranges:
        begin, end = (
            max(first, position),
            min(first + count, position + stop - start, position + limit - start),
        )
        if begin < end:
            yield begin, start + begin - position, end - begin
        position += stop - start

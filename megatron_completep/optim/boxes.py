"""From flat shards to boxes of logical tensors and back. Arithmetic only.

A rank's shard is a list of segments, each a run of a flattened local parameter. A run is a few
boxes of the local tensor, and the parameter's `Spec` says where those lie in the logical, unsharded
tensor. A checkpoint stores boxes by logical name and coordinates, so what reads it needs to know
nothing of the layout that wrote it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from math import prod
from operator import add, mul, sub

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

    @property
    def stops(self) -> tuple[int, ...]:
        """The offset behind the last element, in each dimension."""
        return tuple(map(add, self.offsets, self.sizes))

    def moved(self, by: tuple[int, ...]) -> Box:
        """The same box, further along by so many elements in each dimension."""
        assert len(by) == len(self.offsets)
        return Box(tuple(map(add, self.offsets, by)), self.sizes)

    def within(self, outer: Box) -> bool:
        """Whether it has as many dimensions as `outer`, and no element that `outer` lacks."""
        if len(self.sizes) != len(outer.sizes):
            return False
        # An empty box has no intersection with anything, and lies in everything.
        return self.numel == 0 or self.intersect(outer) == self

    def intersect(self, box: Box) -> Box | None:
        """The elements that both boxes hold, or None."""
        assert len(self.sizes) == len(box.sizes)
        starts = tuple(map(max, self.offsets, box.offsets))
        stops = tuple(map(min, self.stops, box.stops))
        sizes = tuple(map(sub, stops, starts))
        if any(size <= 0 for size in sizes):
            return None
        return Box(starts, sizes)


@dataclass(frozen=True)
class OwnedBox:
    """A box of the logical tensor `name`, and where this rank's flat shard holds it.

    Its first element is `start` in the shard; `strides` are the local tensor's.
    """

    name: str
    box: Box
    start: int
    strides: tuple[int, ...]

    def locate(self, inner: Box) -> tuple[int, tuple[int, ...], tuple[int, ...]]:
        """Start, sizes and strides of a box within this one, in the flat shard.

        These are what `torch.as_strided` takes.
        """
        steps = map(sub, inner.offsets, self.box.offsets)
        start = self.start + sum(map(mul, steps, self.strides))
        return start, inner.sizes, self.strides


def owned_boxes(segments: Iterable[Segment], specs: Mapping[str, Spec]) -> list[OwnedBox]:
    """The boxes of the segments of a shard, in shard order. Padding is left out."""
    boxes: list[OwnedBox] = []
    for segment in segments:
        boxes += _boxes_of(segment, specs[segment.name])
    return boxes


def _boxes_of(segment: Segment, spec: Spec) -> Iterator[OwnedBox]:
    shape = spec.local_shape
    strides = strides_of(shape)
    for local_box in cut_run(segment.parameter_start, segment.size, shape):
        for local_offsets, box in _logical(spec, local_box):
            # Where the box begins in the flattened local tensor, and from there in the shard.
            local_start = sum(map(mul, local_offsets, strides))
            start = segment.shard_start + local_start - segment.parameter_start
            yield OwnedBox(segment.name, box, start, strides)


def strides_of(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The strides of a contiguous tensor, in elements."""
    return tuple(prod(shape[dim + 1 :]) for dim in range(len(shape)))


def cut_run(start: int, size: int, shape: tuple[int, ...]) -> Iterator[Box]:
    """The flat run [start, start + size) of a contiguous tensor as boxes of it, in order.

    A run of a matrix is at most three boxes: the end of a row, whole rows, the start of a row. In a
    tensor with more dimensions the incomplete rows are cut in the same way once more.
    """
    if size == 0:
        return
    if len(shape) == 1:
        yield Box((start,), (size,))
        return

    row_size = prod(shape[1:])  # a row is all that one index of the first dimension selects
    stop = start + size
    # The end of a row, where the run begins inside of one or is shorter than one.
    if start % row_size or size < row_size:
        row_end = start - start % row_size + row_size
        end = min(stop, row_end)
        yield from _inside_row(start, end - start, shape)
        start = end
    # Whole rows.
    rows = (stop - start) // row_size
    if rows:
        zeros = (0,) * (len(shape) - 1)
        yield Box((start // row_size, *zeros), (rows, *shape[1:]))
        start += rows * row_size
    # The start of a row.
    if start < stop:
        yield from _inside_row(start, stop - start, shape)


def _inside_row(start: int, size: int, shape: tuple[int, ...]) -> Iterator[Box]:
    """The boxes of a run that stays inside one index of the first dimension."""
    row_size = prod(shape[1:])
    index = start // row_size
    for box in cut_run(start - index * row_size, size, shape[1:]):
        yield Box((index, *box.offsets), (1, *box.sizes))


def _logical(spec: Spec, local: Box) -> Iterator[tuple[tuple[int, ...], Box]]:
    """A box of the local tensor in logical coordinates, each with its offsets in the local tensor.

    Along a dimension that is split, several logical ranges may lie one after the other in the local
    tensor; the box is cut where one ends.
    """
    ranges_by_dim = []
    for dim, (offset, size) in enumerate(zip(local.offsets, local.sizes, strict=True)):
        ranges = _ranges_within(spec.local_ranges(dim), offset, size, spec.shape[dim])
        ranges_by_dim.append(list(ranges))
    # One logical box for each combination of a range of every dimension.
    for ranges_of_box in product(*ranges_by_dim):
        local_offsets, logical_offsets, sizes = zip(*ranges_of_box, strict=True)
        yield local_offsets, Box(logical_offsets, sizes)


def _ranges_within(
    ranges: Iterable[tuple[int, int]], offset: int, size: int, limit: int
) -> Iterator[tuple[int, int, int]]:
    """What local [offset, offset + size) holds of logical ranges along one dimension.

    Args:
        ranges: logical [start, stop) that lie one after the other in the local tensor.
        limit: the logical size; what lies past it is padding and is left out.

    Yields:
        Local offset, logical offset, and size.
    """
    range_start = 0  # of the range at hand, in the local tensor
    for start, stop in ranges:
        range_stop = range_start + stop - start
        padding_start = range_start + limit - start
        begin = max(offset, range_start)
        end = min(offset + size, range_stop, padding_start)
        if begin < end:
            yield begin, start + begin - range_start, end - begin
        range_start = range_stop

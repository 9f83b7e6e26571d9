"""From flat shards to boxes of logical tensors and back. Arithmetic only.

A rank's optimizer shard is a list of runs of flattened local parameters. A run is at most three boxes of the local tensor (the
rest of a row, whole rows, the start of a row), and `Placement.ranges` says where those lie in the logical, unsharded tensor. A
checkpoint stores boxes by logical name and coordinates, so what reads it needs to know nothing of the layout that wrote it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from megatron_completep.optim.layout import Segment
from megatron_completep.parallel.placement import Placement


@dataclass(frozen=True)
class Box:
    """Elements [offset, offset + size) of a logical tensor, dimension by dimension."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    @property
    def numel(self) -> int:
        count = 1
        for size in self.sizes:
            count *= size
        return count

    def within(self, other: Box) -> bool:
        """Whether it has as many dimensions and no element that `other` lacks."""
        return len(self.sizes) == len(other.sizes) and (self.numel == 0 or self.intersect(other) == self)

    def intersect(self, other: Box) -> Box | None:
        """What both hold, or None."""
        starts = tuple(map(max, self.offsets, other.offsets))
        stops = tuple(min(a + m, b + n) for a, m, b, n in zip(self.offsets, self.sizes, other.offsets, other.sizes, strict=True))
        if any(start >= stop for start, stop in zip(starts, stops, strict=True)):
            return None
        return Box(starts, tuple(stop - start for start, stop in zip(starts, stops, strict=True)))


@dataclass(frozen=True)
class OwnedBox:
    """A box of the logical tensor `name`, and where this rank's flat shard holds it.

    Its first element is `start` in the shard, rows lie `row_stride` elements apart, elements of a row side by side.
    """

    name: str
    box: Box
    start: int
    row_stride: int

    def locate(self, part: Box) -> tuple[int, tuple[int, ...], tuple[int, ...]]:
        """Start, sizes and strides of a part of this box, for `torch.as_strided` on the flat shard."""
        strides = (self.row_stride, 1)[2 - len(part.sizes) :] if len(part.sizes) > 1 else (1,)
        inner = (a - b for a, b in zip(part.offsets, self.box.offsets, strict=True))
        return self.start + sum(i * s for i, s in zip(inner, strides, strict=True)), part.sizes, strides


def owned_boxes(segments: Iterable[Segment], placements: dict[str, Placement], shapes: dict[str, tuple[int, ...]]) -> list[OwnedBox]:
    """The boxes of the segments of a shard, in shard order. `shapes` are the local ones; vocabulary padding is left out."""
    return [owned for segment in segments for owned in _boxes_of(segment, placements[segment.name], shapes[segment.name])]


def _boxes_of(segment: Segment, placement: Placement, shape: tuple[int, ...]) -> Iterator[OwnedBox]:
    columns = shape[1] if len(shape) == 2 else 1
    assert len(shape) <= 2, f"{segment.name}: {len(shape)} dimensions"
    for row, rows, column, width in cut_rows(segment.parameter_start, segment.size, columns):
        start = segment.shard_start + row * columns + column - segment.parameter_start
        for box, row_shift, column_shift in _logical(placement, row, rows, column, width):
            flat = Box(box.offsets[:1], box.sizes[:1]) if len(shape) == 1 else box
            yield OwnedBox(segment.name, flat, start + row_shift * columns + column_shift, columns)


def cut_rows(start: int, size: int, columns: int) -> Iterator[tuple[int, int, int, int]]:
    """A flat run as (row, rows, column, columns): the rest of a row, whole rows, the start of a row."""
    stop = start + size
    if start % columns:
        width = min(columns - start % columns, size)
        yield start // columns, 1, start % columns, width
        start += width
    whole = (stop - start) // columns
    if whole:
        yield start // columns, whole, 0, columns
        start += whole * columns
    if start < stop:
        yield start // columns, 1, 0, stop - start


def _logical(placement: Placement, row: int, rows: int, column: int, width: int) -> Iterator[tuple[Box, int, int]]:
    """A local box in logical coordinates, cut where `ranges` jump, with each part's shift inside the local box."""
    if placement.dim is None:
        yield Box((row, column), (rows, width)), 0, 0
        return
    first, count = (row, rows) if placement.dim == 0 else (column, width)
    limit = placement.global_shape[placement.dim]
    for local, start, size in _ranges_within(placement.ranges, first, count, limit):
        if placement.dim == 0:
            yield Box((start, column), (size, width)), local - first, 0
        else:
            yield Box((row, start), (rows, size)), 0, local - first


def _ranges_within(ranges: Iterable[tuple[int, int]], first: int, count: int, limit: int) -> Iterator[tuple[int, int, int]]:
    """(local position, logical position, size) of the parts of local [first, first + count); nothing past `limit`."""
    position = 0
    for start, stop in ranges:
        begin, end = max(first, position), min(first + count, position + stop - start, position + limit - start)
        if begin < end:
            yield begin, start + begin - position, end - begin
        position += stop - start

"""Where every parameter lies in the flat buffers, and which part of them a rank updates.

Parameters lie in backward order, so that gradients complete from the front of the buffer, and each
is padded to ALIGNMENT elements. A bucket is a run of parameters whose gradients are summed over one
axis of the mesh; it is padded so that every rank along that axis owns an equal, aligned slice. The
shard of a rank is its slices of all buckets, one after the other. All of this is arithmetic and
needs no tensor.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

from megatron_completep.parallel.parameter import Spec, part_name

ALIGNMENT = 64  # elements: 128-bit loads in any storage type
LOADS = "loads"  # the kind of parameters whose gradients are counts (`Spec.balance`)
GROWING_FROM = 40  # ranks: with buckets of 40 MB each has 1 MB

Run = tuple[int, int]  # [start, stop)


@dataclass(frozen=True)
class Piece:
    """Where one parameter lies in the flat buffer: [start, start + size), and then padding."""

    name: str
    start: int
    size: int
    bucket: int


@dataclass(frozen=True)
class Segment:
    """The part of one parameter, or of one of its logical parts, inside this rank's shard."""

    name: str
    shard_start: int  # offset inside the shard
    parameter_start: int  # offset inside the flattened local parameter
    size: int
    part: str = ""  # the logical part; empty: whatever lies there

    @property
    def group(self) -> str:
        """The name of the group of the logical part."""
        return part_name(self.name, self.part)

    @property
    def in_shard(self) -> slice:
        """Where it lies inside the shard."""
        return slice(self.shard_start, self.shard_start + self.size)


class Bucket(NamedTuple):
    """What one collective reduces, or gathers: elements [start, stop) of the flat buffer."""

    start: int
    stop: int
    axis: str  # over whose ranks the gradients are summed
    shards: int  # ranks of the axis that share one copy of the state, with an equal slice each
    shard_start: int  # where the slice begins inside the shard of any rank
    kind: str = ""  # of its parameters, see `Entry`

    @property
    def size(self) -> int:
        """Number of elements, padding included."""
        return self.stop - self.start

    @property
    def in_shard(self) -> Run:
        """Where the slice of the bucket lies inside the shard of any rank."""
        return self.shard_start, self.shard_start + self.size // self.shards

    def slice_of(self, shard: int) -> Run:
        """The slice of the flat buffer that rank `shard` owns of the bucket."""
        slice_size = self.size // self.shards
        start = self.start + shard * slice_size
        return start, start + slice_size


@dataclass(frozen=True)
class Layout:
    """Where one rank's parameters lie, and how they are divided into buckets."""

    pieces: tuple[Piece, ...]
    buckets: tuple[Bucket, ...]

    @property
    def size(self) -> int:
        """Number of elements of the flat buffer."""
        return self.buckets[-1].stop if self.buckets else 0

    @property
    def shard_size(self) -> int:
        """Number of elements of a shard, the same on every rank."""
        return self.buckets[-1].in_shard[1] if self.buckets else 0

    def slices(self, ranks: Mapping[str, int]) -> list[Run]:
        """The slice of the flat buffer that a rank owns of every bucket, in order.

        ranks: axis -> number of the shard along it that the rank holds.
        """
        return [bucket.slice_of(ranks[bucket.axis]) for bucket in self.buckets]

    def segments(self, ranks: Mapping[str, int]) -> tuple[Segment, ...]:
        """The segments of a rank's shard, in order. `ranks` is as in `slices`."""
        slices = self.slices(ranks)
        segments = []
        for placement in self.pieces:
            # The boundary between two ranks may cut any parameter.
            owned_start, owned_stop = slices[placement.bucket]
            start = max(placement.start, owned_start)
            stop = min(placement.start + placement.size, owned_stop)
            if start >= stop:
                continue
            bucket = self.buckets[placement.bucket]
            shard_start = bucket.shard_start + start - owned_start
            parameter_start = start - placement.start
            segments.append(Segment(placement.name, shard_start, parameter_start, stop - start))
        return tuple(segments)


def cut_at_parts(segments: Iterable[Segment], specs: Mapping[str, Spec]) -> tuple[Segment, ...]:
    """The same elements as segments of single logical parts, in order."""
    cut_segments: list[Segment] = []
    for segment in segments:
        spec = specs[segment.name]
        if len(spec.logical_parts) == 1:
            cut_segments.append(segment)
            continue
        stop = segment.parameter_start + segment.size
        for part, part_start, part_stop in _runs_of_parts(spec):
            start = max(part_start, segment.parameter_start)
            end = min(part_stop, stop)
            if start < end:
                shard_start = segment.shard_start + start - segment.parameter_start
                cut_segments.append(Segment(segment.name, shard_start, start, end - start, part))
    return tuple(cut_segments)


def _runs_of_parts(spec: Spec) -> Iterator[tuple[str, int, int]]:
    """Part, start and stop of each run of one part in the flattened local parameter, in order."""
    row = prod(spec.local_shape[spec.part_dim + 1 :])  # elements of one index along part_dim
    start = 0
    for _ in range(prod(spec.local_shape[: spec.part_dim])):
        for part, size in spec.local_parts():
            yield part, start, start + size * row
            start += size * row


class Entry(NamedTuple):
    """A parameter that is to be laid out; `name` is the one that it has on this rank."""

    name: str
    size: int  # number of elements that this rank holds
    axis: str = "gradient"  # over whose ranks its gradient is summed
    alone: bool = False  # in a bucket of its own
    kind: str = ""  # a bucket holds parameters of one kind: an update rule may tell them apart


def elements_of_bucket(bucket_megabytes: float, ranks: int) -> int:
    """Elements of a bucket of gradients that so many ranks sum.

    Beyond GROWING_FROM ranks a bucket grows with them, so that no rank's part of it becomes so
    small that a collective is all latency.
    """
    growth = max(1.0, ranks / GROWING_FROM)
    return int(growth * bucket_megabytes * 2**20 / 4)  # 4 bytes a float32 gradient


def lay_out(entries: Sequence[Entry], shards: Mapping[str, int], bucket_elements: int) -> Layout:
    """Lay parameters, given in backward order, into buckets of about `bucket_elements`.

    shards: axis -> number of its ranks that share one copy of the state.
    """
    placements: list[Piece] = []
    buckets: list[Bucket] = []
    position = 0  # in the flat buffer
    shard_position = 0

    for members in _divide(entries, bucket_elements):
        start = position
        for entry in members:
            placements.append(Piece(entry.name, position, entry.size, len(buckets)))
            position += _align(entry.size, ALIGNMENT)

        # Padding at the end gives every rank of the axis a slice of the same, aligned size. It
        # counts from the start of the bucket, which may follow a bucket of another axis.
        axis = members[0].axis
        position = start + _align(position - start, ALIGNMENT * shards[axis])
        if position > start:
            kind = members[0].kind
            bucket = Bucket(start, position, axis, shards[axis], shard_position, kind)
            buckets.append(bucket)
            _, shard_position = bucket.in_shard
    return Layout(tuple(placements), tuple(buckets))


def _divide(entries: Sequence[Entry], bucket_elements: int) -> Iterator[list[Entry]]:
    """The entries of each bucket in turn: of one axis and kind, about `bucket_elements` together.

    Axes and kinds alternate in the model, and each fills a bucket of its own meanwhile. A bucket
    comes when it is full, as its last gradient completes then.
    """
    filling: dict[tuple[str, str], list[Entry]] = {}
    elements: dict[tuple[str, str], int] = {}
    for entry in entries:
        key = entry.axis, entry.kind
        members = filling.setdefault(key, [])
        if members and entry.alone:
            yield members
            members = []
            filling[key] = members
            elements[key] = 0
        members.append(entry)
        elements[key] = elements.get(key, 0) + _align(entry.size, ALIGNMENT)
        if entry.alone or elements[key] >= bucket_elements:
            yield members
            del filling[key], elements[key]
    # In the order in which the last gradients of what is left complete.
    places = {entry: place for place, entry in enumerate(entries)}
    yield from sorted(filter(None, filling.values()), key=lambda members: places[members[-1]])


def entry_of(name: str, spec: Spec, kind: str = "") -> Entry:
    """What the layout has to know of a parameter.

    Loads in the place of gradients are counts, which must arrive exactly: they have a kind of their
    own.

    A parameter tied across the pipeline lies in a bucket of its own, so that both ends cut it
    alike. So does one that a micro-batch uses twice: if gradients are sharded too, the buffer of
    its bucket lives from the first use to the last, and their norm must not depend on that setting.
    """
    alone = spec.tied_to is not None or spec.uses > 1
    if spec.balance is not None:
        kind = LOADS
    return Entry(name, prod(spec.local_shape), spec.summed_over, alone, kind)


def _align(size: int, multiple: int) -> int:
    """`size` rounded up to a multiple of `multiple`."""
    return -(-size // multiple) * multiple

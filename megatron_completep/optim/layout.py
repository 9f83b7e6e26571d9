"""Where every parameter lies in the flat buffers, and which part of them a rank updates.

Parameters lie in backward order (gradients complete from the front), each piece padded to ALIGNMENT
elements. Buckets are runs of pieces whose gradients are summed over one axis of the mesh, padded so
that every rank along it owns an equal, aligned slice of each; a rank's shard is its slices, one
after the other. All of this is arithmetic, without a tensor.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

from megatron_completep.parallel.parameter import Spec

ALIGNMENT = 64  # elements: 128-bit loads in any storage type

Run = tuple[int, int]  # [start, stop)


@dataclass(frozen=True)
class Piece:
    """One parameter in the flat buffer: elements [start, start + size), then padding."""

    name: str
    start: int
    size: int
    bucket: int


@dataclass(frozen=True)
class Segment:
    """A run of one parameter inside this rank's shard."""

    name: str
    shard_start: int
    parameter_start: int  # offset inside the flattened local parameter
    size: int


class Bucket(NamedTuple):
    """What is reduced and gathered at once: elements [start, stop) of the flat buffer."""

    start: int
    stop: int
    axis: str  # over whose ranks the gradients are summed
    shards: int  # how many of them share one copy of the state, an equal slice each
    shard_start: int  # where the slice begins inside any rank's shard

    @property
    def size(self) -> int:
        """Elements, padding included."""
        return self.stop - self.start

    @property
    def in_shard(self) -> Run:
        """The bucket's slice inside any rank's shard."""
        return self.shard_start, self.shard_start + self.size // self.shards

    def slice_of(self, shard: int) -> Run:
        """What rank `shard` owns of the bucket, in the flat buffer."""
        share = self.size // self.shards
        return self.start + shard * share, self.start + (shard + 1) * share


@dataclass(frozen=True)
class Layout:
    """Pieces and buckets of one rank's parameters."""

    pieces: tuple[Piece, ...]
    buckets: tuple[Bucket, ...]

    @property
    def size(self) -> int:
        """Elements of the flat buffer."""
        return self.buckets[-1].stop if self.buckets else 0

    @property
    def shard_size(self) -> int:
        """Elements of any rank's shard."""
        return self.buckets[-1].in_shard[1] if self.buckets else 0

    def slices(self, ranks: Mapping[str, int]) -> list[Run]:
        """What a rank owns of every bucket, in the flat buffer.

        ranks: axis -> which of the shards along it the rank holds.
        """
        return [bucket.slice_of(ranks[bucket.axis]) for bucket in self.buckets]

    def segments(self, ranks: Mapping[str, int]) -> tuple[Segment, ...]:
        """The runs of parameters in a rank's shard, in order; boundaries may cut any parameter."""
        slices = self.slices(ranks)
        segments = []
        for piece in self.pieces:
            owned_start, owned_stop = slices[piece.bucket]
            start = max(piece.start, owned_start)
            stop = min(piece.start + piece.size, owned_stop)
            if start < stop:
                shard_start = self.buckets[piece.bucket].shard_start + start - owned_start
                segments.append(Segment(piece.name, shard_start, start - piece.start, stop - start))
        return tuple(segments)


class Entry(NamedTuple):
    """A parameter that is to be laid out."""

    name: str
    size: int  # elements that this rank holds
    axis: str = "gradient"  # over whose ranks its gradient is summed
    alone: bool = False  # in a bucket of its own


def lay_out(entries: Sequence[Entry], shards: Mapping[str, int], bucket_elements: int) -> Layout:
    """Lay parameters, given in backward order, into buckets of about `bucket_elements`.

    shards: axis -> how many of its ranks share one copy of the state. A bucket holds parameters of
    one axis.
    """
    pieces: list[Piece] = []
    buckets: list[Bucket] = []
    start = position = shard_start = 0

    def close(axis: str) -> None:
        nonlocal start, position, shard_start
        position = _align(position, ALIGNMENT * shards[axis])
        if position > start:
            bucket = Bucket(start, position, axis, shards[axis], shard_start)
            buckets.append(bucket)
            start = position
            shard_start = bucket.in_shard[1]

    open_axis = entries[0].axis if entries else ""
    for entry in entries:
        if entry.alone or entry.axis != open_axis:
            close(open_axis)
            open_axis = entry.axis
        pieces.append(Piece(entry.name, position, entry.size, len(buckets)))
        position += _align(entry.size, ALIGNMENT)
        if entry.alone or position - start >= bucket_elements:
            close(open_axis)
    if entries:
        close(open_axis)
    return Layout(tuple(pieces), tuple(buckets))


def entry_of(name: str, spec: Spec) -> Entry:
    """What the layout has to know of a parameter.

    The two ends of a tied one lie alone, so that both are cut alike.
    """
    return Entry(name, prod(spec.local_shape), spec.summed_over, alone=spec.tied_to is not None)


def _align(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple

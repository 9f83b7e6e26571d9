"""Where every parameter lies in the flat buffers, and which part of them a data-parallel rank updates. Arithmetic only.

Parameters lie in backward order (gradients complete from the front), each piece padded to ALIGNMENT elements. Buckets are runs
of pieces, padded so that every data rank owns an equal, aligned slice of each; a rank's shard is its slices, one after the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

ALIGNMENT = 64  # elements: 128-bit loads in any storage type


@dataclass(frozen=True)
class Piece:
    """One parameter in the flat buffer: elements [start, start + size), and padding up to the next piece."""

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


@dataclass(frozen=True)
class Layout:
    """Pieces and buckets of one rank's parameters, cut over `shards` data ranks."""

    pieces: tuple[Piece, ...]
    buckets: tuple[tuple[int, int], ...]  # [start, stop) in the flat buffer
    shards: int

    @property
    def size(self) -> int:
        return self.buckets[-1][1] if self.buckets else 0

    @property
    def shard_size(self) -> int:
        return self.size // self.shards

    def bucket_slice(self, bucket: int, shard: int) -> tuple[int, int]:
        """[start, stop) in the flat buffer of what `shard` owns of a bucket."""
        start, stop = self.buckets[bucket]
        share = (stop - start) // self.shards
        return start + shard * share, start + (shard + 1) * share

    def shard_slice(self, bucket: int) -> tuple[int, int]:
        """[start, stop) of a bucket's slice inside any rank's shard."""
        start, stop = self.buckets[bucket]
        return start // self.shards, stop // self.shards

    def segments(self, shard: int) -> tuple[Segment, ...]:
        """The runs of parameters in a shard, in order; boundaries may cut any parameter."""
        found = []
        for piece in self.pieces:
            owned_start, owned_stop = self.bucket_slice(piece.bucket, shard)
            start, stop = max(piece.start, owned_start), min(piece.start + piece.size, owned_stop)
            if start < stop:
                shard_start = self.shard_slice(piece.bucket)[0] + start - owned_start
                found.append(Segment(piece.name, shard_start, start - piece.start, stop - start))
        return tuple(found)


def lay_out(sizes: Sequence[tuple[str, int]], shards: int, bucket_elements: int, alone: frozenset[str] = frozenset()) -> Layout:
    """Lay parameters (name, elements), given in backward order, into buckets of about `bucket_elements`.

    Parameters in `alone` get a bucket of their own (a tied embedding: both ends of the pipeline cut it alike).
    """
    pieces: list[Piece] = []
    buckets: list[tuple[int, int]] = []
    start = position = 0

    def close() -> None:
        nonlocal start, position
        position = _align(position, ALIGNMENT * shards)
        if position > start:
            buckets.append((start, position))
            start = position

    for name, size in sizes:
        if name in alone:
            close()
        pieces.append(Piece(name, position, size, len(buckets)))
        position += _align(size, ALIGNMENT)
        if name in alone or position - start >= bucket_elements:
            close()
    close()
    return Layout(tuple(pieces), tuple(buckets), shards)


def _align(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple

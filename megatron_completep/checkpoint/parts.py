"""From blocks of stored files to boxes of flat tensors: what of a block goes where."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from operator import mul

import torch
from torch import Tensor

from megatron_completep.checkpoint.boxes import Box, OwnedBox, cut_run, strides_of
from megatron_completep.checkpoint.files import DTYPES, StoredBox
from megatron_completep.checkpoint.shard import view_of

TORCH_DTYPES = {"F32": torch.float32, "F64": torch.float64}
Wanted = tuple[OwnedBox, str, Tensor]  # a box, its state, and the flat tensor that holds it


@dataclass(frozen=True)
class Part:
    """What an owned box takes from a stored one: `box` is what both hold, in logical coordinates."""

    stored: StoredBox
    box: Box
    owned: OwnedBox
    flat: Tensor

    @property
    def bytes_range(self) -> tuple[int, int]:
        """Bytes [start, stop) of the file, from the part's first row to its last."""
        row_bytes = (self.stored.stop - self.stored.start) // self.stored.box.sizes[0]
        start = self.stored.start + (self.box.offsets[0] - self.stored.box.offsets[0]) * row_bytes
        return start, start + self.box.sizes[0] * row_bytes

    def place(self, begin: int, data: Tensor) -> None:
        """Copy what belongs here of `data`, the file's bytes (uint8) from `begin` on."""
        start, stop = self.bytes_range
        low, high = max(start, begin), min(stop, begin + data.numel())
        if low >= high:
            return
        values = data[low - begin : high - begin].view(TORCH_DTYPES[self.stored.dtype])
        run = self.run(low, high)
        if run is not None:
            run.copy_(values)
            return
        stored = self.stored.box
        strides = strides_of(stored.sizes)
        first = (low - self.stored.start) // self._item_size
        for piece in cut_run(first, values.numel(), stored.sizes):
            both = piece.moved(stored.offsets).intersect(self.box)
            if both is not None:
                inner = (a - b for a, b in zip(both.offsets, stored.offsets, strict=True))
                offset = values.storage_offset() + sum(map(mul, inner, strides)) - first
                source = torch.as_strided(values, both.sizes, strides, offset)
                view_of(self.flat, self.owned, both).copy_(source)

    def run(self, low: int, high: int) -> Tensor | None:
        """Where bytes [low, high) of the file go when they stay side by side, else None."""
        if self.box.sizes[1:] != self.stored.box.sizes[1:]:
            return None
        target = view_of(self.flat, self.owned, self.box)
        if not target.is_contiguous():
            return None
        start, size = self.bytes_range[0], self._item_size
        return target.reshape(-1)[(low - start) // size : (high - start) // size]

    def direct(self, begin: int, size: int) -> Tensor | None:
        """The target itself, as bytes, where the whole block [begin, begin + size) goes there as it is."""
        start, stop = self.bytes_range
        if self.flat.device.type != "cpu" or self.flat.dtype != TORCH_DTYPES[self.stored.dtype]:
            return None
        if not start <= begin <= begin + size <= stop:
            return None
        run = self.run(begin, begin + size)
        return None if run is None else run.view(torch.uint8)

    @property
    def _item_size(self) -> int:
        return DTYPES[self.stored.dtype].itemsize


Parts = dict[tuple[str, int], list[Part]]  # by file and block


def parts_by_block(
    wanted: Iterable[Wanted], stored: dict[tuple[str, str], list[StoredBox]], block_size: int
) -> Parts:
    """Everything wanted, by the blocks that hold it. `stored`: the boxes by state and name."""
    found: Parts = defaultdict(list)
    for owned, state, flat in wanted:
        for candidate in stored.get((state, owned.name), ()):
            both = candidate.box.intersect(owned.box)
            if both is not None:
                part = Part(candidate, both, owned, flat)
                start, stop = part.bytes_range
                for block in range(start // block_size, -(-stop // block_size)):
                    found[candidate.file, block].append(part)
    return found

"""From blocks of stored files to boxes of flat tensors: which bytes of a block go where."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from operator import mul, sub

import torch
from torch import Tensor

from megatron_completep.checkpoint.files import DTYPES, StoredBox
from megatron_completep.checkpoint.shard import view_of
from megatron_completep.optim.boxes import Box, OwnedBox, cut_run, strides_of

TORCH_DTYPES = {"F32": torch.float32, "F64": torch.float64}
Target = tuple[OwnedBox, str, Tensor]  # a box to fill, its state, and the flat tensor that holds it


@dataclass(frozen=True)
class Part:
    """What an owned box takes from a stored one: `box` is their overlap, in logical coordinates."""

    stored: StoredBox
    box: Box
    owned: OwnedBox
    flat: Tensor

    @property
    def bytes_range(self) -> tuple[int, int]:
        """Bytes [start, stop) of the file, from the first row of the overlap to its last."""
        row_bytes = (self.stored.stop - self.stored.start) // self.stored.box.sizes[0]
        first_row = self.box.offsets[0] - self.stored.box.offsets[0]
        start = self.stored.start + first_row * row_bytes
        return start, start + self.box.sizes[0] * row_bytes

    def place(self, begin: int, data: Tensor) -> None:
        """Copy what belongs here of `data`, the file's bytes (uint8) from `begin` on."""
        start, stop = self.bytes_range
        low = max(start, begin)
        high = min(stop, begin + data.numel())
        if low >= high:
            return
        elements = data[low - begin : high - begin].view(TORCH_DTYPES[self.stored.dtype])
        run = self.run(low, high)
        if run is not None:
            run.copy_(elements)
            return

        # The bytes are a run of the flattened stored box. It is cut into boxes, and of each the
        # elements that this part takes are copied.
        stored_box = self.stored.box
        strides = strides_of(stored_box.sizes)
        run_start = (low - self.stored.start) // self._item_size
        for cut_box in cut_run(run_start, elements.numel(), stored_box.sizes):
            overlap = cut_box.moved(stored_box.offsets).intersect(self.box)
            if overlap is None:
                continue
            # Its first element counted from the start of the stored box, and so in `elements`.
            steps = map(sub, overlap.offsets, stored_box.offsets)
            offset = elements.storage_offset() + sum(map(mul, steps, strides)) - run_start
            source = torch.as_strided(elements, overlap.sizes, strides, offset)
            view_of(self.flat, self.owned, overlap).copy_(source)

    def run(self, low: int, high: int) -> Tensor | None:
        """Where bytes [low, high) of the file go if they stay side by side, else None."""
        # Whole rows of the stored box are taken, and rows lie one after the other in the shard.
        if self.box.sizes[1:] != self.stored.box.sizes[1:]:
            return None
        target = view_of(self.flat, self.owned, self.box)
        if not target.is_contiguous():
            return None
        start, _ = self.bytes_range
        run_start = (low - start) // self._item_size
        run_stop = (high - start) // self._item_size
        return target.reshape(-1)[run_start:run_stop]

    def direct(self, begin: int, size: int) -> Tensor | None:
        """The target as bytes, where the block [begin, begin + size) of the file goes there as is.

        A block may then be read to its place without a copy. None otherwise.
        """
        start, stop = self.bytes_range
        if self.flat.device.type != "cpu" or self.flat.dtype != TORCH_DTYPES[self.stored.dtype]:
            return None
        if begin < start or begin + size > stop:
            return None
        run = self.run(begin, begin + size)
        return None if run is None else run.view(torch.uint8)

    @property
    def _item_size(self) -> int:
        return DTYPES[self.stored.dtype].itemsize


Parts = dict[tuple[str, int], list[Part]]  # by file and block


def parts_by_block(
    targets: Iterable[Target], stored: dict[tuple[str, str], list[StoredBox]], block_size: int
) -> Parts:
    """What is to be read for the targets, by the blocks that hold it.

    stored: the boxes by state and name.
    """
    overlaps: Parts = defaultdict(list)
    for owned, state, flat in targets:
        for candidate in stored.get((state, owned.name), ()):
            box = candidate.box.intersect(owned.box)
            if box is None:
                continue
            overlap = Part(candidate, box, owned, flat)
            start, stop = overlap.bytes_range
            # The block of the last byte is one of them, whether or not that byte ends it.
            for block in range(start // block_size, -(-stop // block_size)):
                overlaps[candidate.file, block].append(overlap)
    return overlaps

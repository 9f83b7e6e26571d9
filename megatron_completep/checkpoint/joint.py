"""All ranks of a job read one checkpoint together.

Each block of a file is read by one rank and sent to the others that need it. What every rank needs
is exchanged first, so that all make the same plan. The plan is cut into rounds in which no rank
holds more than LIMIT blocks, which bounds the memory.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_completep.checkpoint.files import CheckedFile, StoredBox
from megatron_completep.checkpoint.load import BlockReader, StoredCheckpoint
from megatron_completep.checkpoint.manifest import Manifest, StoredFile
from megatron_completep.checkpoint.parts import Parts, Target
from megatron_completep.errors import CheckpointError
from megatron_completep.parallel.exchange import Exchange, describe

LIMIT = 8  # blocks (of 4 MiB) that a rank reads or receives in a round
# Bytes of blocks that a rank read for a header and keeps, so as not to read them again.
KEPT_BYTES = 256 << 20
RUN = 16  # blocks that one rank reads before another takes its turn: disks like sequences

BlockName = tuple[str, int]  # file, block


@dataclass(frozen=True)
class Read:
    """One block: which rank reads it, and which ranks need it, the reader or not."""

    file: str
    block: int
    reader: int
    needed_by: tuple[int, ...]

    @property
    def name(self) -> BlockName:
        return self.file, self.block

    @property
    def receivers(self) -> tuple[int, ...]:
        """The ranks that the reader sends the block to."""
        return tuple(rank for rank in self.needed_by if rank != self.reader)


@dataclass(frozen=True)
class Source:
    """A checkpoint as this job reaches it.

    Attributes:
        folder: this rank's.
        holders: file -> the ranks that can read it.
    """

    folder: Path
    manifest: Manifest
    holders: Mapping[str, Sequence[int]]

    def opened_by(self, rank: int) -> list[StoredFile]:
        """The files whose headers this rank reads: each file is one rank's, shared out in turn."""
        opened = []
        for index, stored in enumerate(self.manifest.files):
            ranks = self.holders[stored.name]
            if ranks[index % len(ranks)] == rank:
                opened.append(stored)
        return opened


class JointReader:
    """Opens a checkpoint with all ranks, and fills what each of them needs.

    Construction and `fill` are collective, and raise the same CheckpointError on every rank. What
    was filled before such an error must not be used.

    progress: called after every round of blocks.
    """

    def __init__(
        self, exchange: Exchange, source: Source, progress: Callable[[], None] = lambda: None
    ):
        self._exchange = exchange
        self._source = source
        self._progress = progress
        self._header_blocks: dict[BlockName, np.ndarray] = {}  # read for a header, and kept
        self.bytes_read = 0

        own_boxes = exchange.together(self._open_own)
        boxes = []
        for described in exchange.all_gather(own_boxes):
            boxes += [StoredBox.from_json(fields) for fields in described]
        self.stored = exchange.together(
            lambda: StoredCheckpoint.checked(source.folder, source.manifest, boxes)
        )
        own_blocks = [[file, block] for file, block in self._header_blocks]
        self._block_owners = exchange.all_gather(own_blocks)

    def _open_own(self) -> list[list[Any]]:
        """The boxes of the files whose headers this rank reads, as JSON."""
        described = []
        manifest = self._source.manifest
        kept_bytes = 0
        for stored in self._source.opened_by(self._exchange.rank):
            with CheckedFile(self._source.folder, stored, manifest.block_size) as file:
                described += [box.to_json() for box in file.index()]
                self.bytes_read += file.bytes_read
                # Blocks that hold a header hold tensors as well. What is too much is read twice.
                new_bytes = sum(data.nbytes for data in file.header_blocks.values())
                if kept_bytes + new_bytes <= KEPT_BYTES:
                    kept_bytes += new_bytes
                    for block, data in file.header_blocks.items():
                        self._header_blocks[stored.name, block] = data
        return described

    def fill(self, targets: Sequence[Target]) -> None:
        """Read what any rank needs, and fill the targets of this rank."""
        overlaps = self._exchange.together(lambda: self.stored.parts_of(targets))
        needs: dict[BlockName, list[int]] = defaultdict(list)
        for rank, ranges in enumerate(self._exchange.all_gather(as_ranges(overlaps))):
            for file, first_block, last_block in ranges:
                for block in range(first_block, last_block + 1):
                    needs[file, block].append(rank)
        owners: dict[BlockName, int] = {}
        for rank, blocks in enumerate(self._block_owners):
            for file, block in blocks:
                owners[file, block] = rank

        # All ranks have the same input here, and so the same plan.
        rounds = in_rounds(choose_readers(needs, self._source.holders, owners))
        work = _Rounds(self._exchange, self._source, self._header_blocks, overlaps)
        work.run(rounds, self._progress)
        self.bytes_read += work.bytes_read
        self._header_blocks.clear()
        self._exchange.together(work.raise_problem)


class _Rounds:
    """Carries out a plan on this rank.

    Args:
        header_blocks: blocks that this rank need not read again; they are taken out when used.
        overlaps: what this rank needs, by block.
    """

    def __init__(
        self,
        exchange: Exchange,
        source: Source,
        header_blocks: dict[BlockName, np.ndarray],
        overlaps: Parts,
    ):
        self._exchange = exchange
        self._header_blocks = header_blocks
        self._overlaps = overlaps
        self._reader = BlockReader(source.folder, source.manifest)
        self._block_size = source.manifest.block_size
        self._sizes = {stored.name: stored.size for stored in source.manifest.files}
        self._buffers: list[Tensor] = []
        self._problem: str | None = None

    @property
    def bytes_read(self) -> int:
        return self._reader.bytes_read

    def raise_problem(self) -> None:
        """Raise CheckpointError with what went wrong on this rank, if anything did."""
        if self._problem is not None:
            raise CheckpointError(self._problem)

    def run(self, rounds: Sequence[Sequence[Read]], progress: Callable[[], None]) -> None:
        """Read, send and receive, round by round.

        A rank that cannot read goes on sending whatever its buffers hold, as the others would wait
        for ever otherwise. `raise_problem` tells of it when all ranks are done.
        """
        with self._reader:
            for reads in rounds:
                self._run(reads)
                progress()

    def _run(self, reads: Sequence[Read]) -> None:
        """One round: start to receive, read and start to send, then wait for all of it."""
        rank = self._exchange.rank
        free_buffers = iter(self._buffers)  # each buffer holds one block in a round
        receiving = []
        sending = []
        # The number of a read in the round tells messages between the same two ranks apart.
        for tag, read in enumerate(reads):
            if rank in read.receivers:
                data = self._buffer(free_buffers)[: self._size(read)]
                work = self._exchange.receive(data, read.reader, tag)
                receiving.append((read, data, work))
        for tag, read in enumerate(reads):
            if read.reader == rank:
                data = self._read(read, self._buffer(free_buffers))
                for receiver in read.receivers:
                    sending.append(self._exchange.send(data, receiver, tag))

        for read, data, work in receiving:
            work.wait()
            self._place(read, data)
        for work in sending:
            work.wait()

    def _buffer(self, free_buffers: Iterator[Tensor]) -> Tensor:
        """The next buffer that this round does not use yet, or a new one."""
        buffer = next(free_buffers, None)
        if buffer is None:
            buffer = torch.empty(self._block_size, dtype=torch.uint8)
            self._buffers.append(buffer)
        return buffer

    def _read(self, read: Read, buffer: Tensor) -> Tensor:
        """The bytes of a block, which are placed on this rank as well where it needs them."""
        header_block = self._header_blocks.pop(read.name, None)
        if header_block is not None:
            data = torch.from_numpy(header_block)
            self._place(read, data)
            return data
        if self._problem is None:
            overlaps = self._overlaps.get(read.name, ())
            try:
                return self._reader.read(read.file, read.block, overlaps, buffer)
            except (CheckpointError, OSError) as error:
                self._problem = describe(error)
        return buffer[: self._size(read)]

    def _place(self, read: Read, data: Tensor) -> None:
        """Copy what this rank needs of a block to its place."""
        for overlap in self._overlaps.get(read.name, ()):
            overlap.place(read.block * self._block_size, data)

    def _size(self, read: Read) -> int:
        """Bytes of the block; the last one of a file may be short."""
        return min(self._block_size, self._sizes[read.file] - read.block * self._block_size)


def as_ranges(blocks: Mapping[BlockName, object]) -> list[tuple[str, int, int]]:
    """(file, first block, last block) of each run of neighbouring blocks."""
    ranges: list[tuple[str, int, int]] = []
    for file, block in sorted(blocks):
        if ranges:
            range_file, first_block, last_block = ranges[-1]
            if file == range_file and block == last_block + 1:
                ranges[-1] = (file, first_block, block)
                continue
        ranges.append((file, block, block))
    return ranges


def choose_readers(
    needs: Mapping[BlockName, Sequence[int]],
    holders: Mapping[str, Sequence[int]],
    owners: Mapping[BlockName, int],
) -> list[Read]:
    """One reader for each block, the same on every rank for the same input.

    A block is read by the rank that has it already; else by one that needs it and can read its
    file; else by any that can read it. Work is shared out in runs of blocks, and always to the
    rank with the least work so far.

    Args:
        needs: block -> the ranks that need it.
        holders: file -> the ranks that can read it.
        owners: block -> the rank that has it in memory.
    """
    able = {file: frozenset(ranks) for file, ranks in holders.items()}
    load: dict[int, int] = defaultdict(int)  # rank -> blocks
    reads: list[Read] = []
    previous_file: str | None = None
    previous_reader = -1
    for (file, block), ranks in sorted(needs.items()):
        reader = owners.get((file, block))
        if reader is None:
            candidates = [rank for rank in ranks if rank in able[file]] or holders[file]
            reader = min(candidates, key=lambda rank: (load[rank], rank))
            # The reader of the block before goes on, until it is a whole run ahead.
            goes_on = file == previous_file and previous_reader in candidates
            if goes_on and load[previous_reader] < load[reader] + RUN:
                reader = previous_reader
            previous_file = file
            previous_reader = reader
        load[reader] += 1
        reads.append(Read(file, block, reader, tuple(ranks)))
    return reads


def in_rounds(reads: Sequence[Read]) -> list[list[Read]]:
    """The reads in rounds, in which no rank reads or receives more than LIMIT blocks.

    Every reader keeps the order of its blocks, and all readers work side by side.
    """
    # The n-th block of every reader comes before the (n+1)-th of any.
    turn: dict[int, int] = defaultdict(int)
    turns = []
    for read in reads:
        turns.append((turn[read.reader], read))
        turn[read.reader] += 1
    turns.sort(key=lambda item: item[0])  # stable: the order within a turn stays

    rounds: list[list[Read]] = [[]]
    blocks_held: dict[int, int] = defaultdict(int)  # by rank, in this round
    for _, read in turns:
        ranks = {read.reader, *read.needed_by}
        if any(blocks_held[rank] == LIMIT for rank in ranks):
            rounds.append([])
            blocks_held.clear()
        rounds[-1].append(read)
        for rank in ranks:
            blocks_held[rank] += 1
    return rounds

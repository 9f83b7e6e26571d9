"""All ranks of a job read one checkpoint: each block of a file is read by one of them and sent to the others that need it.

What every rank needs is exchanged first, so that all make the same plan. The plan is cut into rounds in which no rank holds more
than LIMIT blocks, which bounds the memory.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from megatron_completep.checkpoint.files import CheckedFile, StoredBox
from megatron_completep.checkpoint.load import BlockReader, StoredCheckpoint
from megatron_completep.checkpoint.manifest import Manifest, StoredFile
from megatron_completep.checkpoint.parts import Parts, Wanted
from megatron_completep.errors import CheckpointError
from megatron_completep.parallel.exchange import Exchange, describe

LIMIT = 8  # blocks (of 4 MiB) that a rank reads or receives in a round
KEPT_BYTES = (
    256 << 20
)  # of blocks that a rank read for a header and will not read again; what is more is read twice
RUN = 16  # blocks that one rank reads before another takes its turn: disks like sequences

BlockName = tuple[str, int]  # file, block


@dataclass(frozen=True)
class Read:
    """One block: who reads it, and who needs it (the reader or not)."""

    file: str
    block: int
    reader: int
    needed_by: tuple[int, ...]

    @property
    def receivers(self) -> tuple[int, ...]:
        return tuple(rank for rank in self.needed_by if rank != self.reader)


@dataclass(frozen=True)
class Source:
    """A checkpoint as this job reaches it. `folder` is this rank's; `holders`: the ranks that can read each file."""

    folder: Path
    manifest: Manifest
    holders: Mapping[str, Sequence[int]]

    def opened_by(self, rank: int) -> list[StoredFile]:
        """The files whose headers this rank reads."""
        shares = ((stored, self.holders[stored.name]) for stored in self.manifest.files)
        return [
            stored
            for index, (stored, ranks) in enumerate(shares)
            if ranks[index % len(ranks)] == rank
        ]


class JointReader:
    """Opens a checkpoint with all ranks and fills what each of them wants. Collective; raises the same CheckpointError everywhere.

    What was filled before such an error is part of a checkpoint, and good for nothing. progress: called after every round of blocks.
    """

    def __init__(
        self, exchange: Exchange, source: Source, progress: Callable[[], None] = lambda: None
    ):
        self._exchange, self._source, self._progress = exchange, source, progress
        self._kept: dict[BlockName, np.ndarray] = {}  # blocks that were read for their header
        self.bytes_read = 0
        described = exchange.together(self._open_own)
        boxes = [
            StoredBox.from_json(value) for part in exchange.all_gather(described) for value in part
        ]
        self.stored = exchange.together(
            lambda: StoredCheckpoint.checked(source.folder, source.manifest, boxes)
        )
        self._headers = exchange.all_gather([[file, block] for file, block in self._kept])

    def _open_own(self) -> list[list]:
        """The boxes of the files whose headers this rank reads."""
        described, manifest, kept = [], self._source.manifest, 0
        for stored in self._source.opened_by(self._exchange.rank):
            with CheckedFile(self._source.folder, stored, manifest.block_size) as file:
                described += [box.to_json() for box in file.index()]
                self.bytes_read += file.bytes_read
                if kept + sum(data.nbytes for data in file.kept.values()) <= KEPT_BYTES:
                    kept += sum(data.nbytes for data in file.kept.values())
                    self._kept |= {(stored.name, block): data for block, data in file.kept.items()}
        return described

    def fill(self, wanted: Sequence[Wanted]) -> None:
        """Read what any rank wants; this rank's goes where `wanted` says."""
        parts = self._exchange.together(lambda: self.stored.parts_of(wanted))
        needs: dict[BlockName, list[int]] = defaultdict(list)
        for rank, blocks in enumerate(self._exchange.all_gather(as_ranges(parts))):
            for file, first, last in blocks:
                for block in range(first, last + 1):
                    needs[file, block].append(rank)
        fixed = {
            (file, block): rank for rank, found in enumerate(self._headers) for file, block in found
        }
        rounds = in_rounds(choose_readers(needs, self._source.holders, fixed))
        work = _Rounds(self._exchange, self._source, self._kept, parts)
        work.run(rounds, self._progress)
        self.bytes_read += work.bytes_read
        self._kept.clear()
        self._exchange.together(work.raise_problem)


class _Rounds:
    """Carries out a plan on this rank."""

    def __init__(
        self, exchange: Exchange, source: Source, kept: dict[BlockName, np.ndarray], parts: Parts
    ):
        self._exchange, self._kept, self._parts = exchange, kept, parts
        self._reader = BlockReader(source.folder, source.manifest)
        self._block_size = source.manifest.block_size
        self._sizes = {stored.name: stored.size for stored in source.manifest.files}
        self._buffers: list[Tensor] = []
        self._problem: str | None = None

    @property
    def bytes_read(self) -> int:
        return self._reader.bytes_read

    def raise_problem(self) -> None:
        """CheckpointError with what went wrong on this rank, if anything did."""
        if self._problem is not None:
            raise CheckpointError(self._problem)

    def run(self, rounds: Sequence[Sequence[Read]], progress: Callable[[], None]) -> None:
        """A rank that cannot read goes on sending, so that nobody waits for ever; `raise_problem` tells, once all are done."""
        with self._reader:
            for reads in rounds:
                self._run(reads)
                progress()

    def _run(self, reads: Sequence[Read]) -> None:
        rank, free = self._exchange.rank, iter(self._buffers)
        receiving, sending = [], []
        for tag, read in enumerate(reads):
            if rank in read.receivers:
                data = self._buffer(free)[: self._size(read)]
                receiving.append((read, data, self._exchange.receive(data, read.reader, tag)))
        for tag, read in enumerate(reads):
            if read.reader == rank:
                data = self._read(read, self._buffer(free))
                sending += [self._exchange.send(data, receiver, tag) for receiver in read.receivers]
        for read, data, work in receiving:
            work.wait()
            self._place(read, data)
        for work in sending:
            work.wait()

    def _buffer(self, free: Iterator[Tensor]) -> Tensor:
        """One of the buffers of the rounds before, or a new one."""
        buffer = next(free, None)
        if buffer is None:
            buffer = torch.empty(self._block_size, dtype=torch.uint8)
            self._buffers.append(buffer)
        return buffer

    def _read(self, read: Read, buffer: Tensor) -> Tensor:
        kept = self._kept.pop((read.file, read.block), None)
        if kept is not None:
            data = torch.from_numpy(kept)
            self._place(read, data)
            return data
        if self._problem is None:
            try:
                return self._reader.read(
                    read.file, read.block, self._parts.get((read.file, read.block), ()), buffer
                )
            except (CheckpointError, OSError) as error:
                self._problem = describe(error)
        return buffer[: self._size(read)]

    def _place(self, read: Read, data: Tensor) -> None:
        for part in self._parts.get((read.file, read.block), ()):
            part.place(read.block * self._block_size, data)

    def _size(self, read: Read) -> int:
        return min(self._block_size, self._sizes[read.file] - read.block * self._block_size)


def as_ranges(blocks: Mapping[BlockName, object]) -> list[tuple[str, int, int]]:
    """(file, first block, last block) of runs of blocks."""
    found = []
    for (file, _), run in groupby(
        enumerate(sorted(blocks)), key=lambda item: (item[1][0], item[1][1] - item[0])
    ):
        numbers = [block for _, (_, block) in run]
        found.append((file, numbers[0], numbers[-1]))
    return found


def choose_readers(
    needs: Mapping[BlockName, Sequence[int]],
    holders: Mapping[str, Sequence[int]],
    fixed: Mapping[BlockName, int],
) -> list[Read]:
    """One reader a block: who has it already; else one of those that need it and can read it; else any that can.

    Work is shared out in runs of blocks, and always to the rank with the least so far.
    """
    able = {file: frozenset(ranks) for file, ranks in holders.items()}
    load: dict[int, int] = defaultdict(int)
    reads: list[Read] = []
    before: tuple[str, int] | None = None
    for (file, block), ranks in sorted(needs.items()):
        reader = fixed.get((file, block))
        if reader is None:
            candidates = [rank for rank in ranks if rank in able[file]] or holders[file]
            least = min(candidates, key=lambda rank: (load[rank], rank))
            goes_on = before is not None and before[0] == file and before[1] in candidates
            reader = before[1] if goes_on and load[before[1]] < load[least] + RUN else least  # type: ignore[index]
            before = file, reader
        load[reader] += 1
        reads.append(Read(file, block, reader, tuple(ranks)))
    return reads


def in_rounds(reads: Sequence[Read]) -> list[list[Read]]:
    """The reads in rounds: each reader's in their order, all readers at work side by side, nobody with more than LIMIT blocks at once."""
    turn: dict[int, int] = defaultdict(int)
    ordered = []
    for read in reads:
        ordered.append((turn[read.reader], read))
        turn[read.reader] += 1
    rounds: list[list[Read]] = [[]]
    held: dict[int, int] = defaultdict(int)
    for _, read in sorted(ordered, key=lambda item: item[0]):
        ranks = {read.reader, *read.needed_by}
        if any(held[rank] == LIMIT for rank in ranks):
            rounds.append([])
            held.clear()
        rounds[-1].append(read)
        for rank in ranks:
            held[rank] += 1
    return rounds

"""Tensor files: safetensors, written from memory in one pass with hashes, read back with every byte checked.

A tensor's key is STATE/NAME@OFFSETS, such as `master/layers.0.mlp.down.weight@0,64`: a box of the logical tensor. Any
safetensors reader opens the files; nothing in them can execute.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import xxhash

from megatron_completep.checkpoint.boxes import Box
from megatron_completep.checkpoint.manifest import StoredFile, open_regular_file
from megatron_completep.errors import CheckpointError

BLOCK_SIZE = (
    4 << 20
)  # bytes; hashed one by one, so that a part of a file can be checked without reading the rest
SYNC_BYTES = 1 << 30
MAX_HEADER_BYTES = 100 << 20
DTYPES: dict[str, np.dtype] = {"F32": np.dtype("<f4"), "F64": np.dtype("<f8")}
_ALIGNMENT = 64


@dataclass(frozen=True)
class StoredBox:
    """A box of a logical tensor inside a file: bytes [start, stop) of it."""

    file: str
    state: str
    name: str
    box: Box
    dtype: str
    start: int
    stop: int

    def to_json(self) -> list[Any]:
        """For another rank, which need not open the file."""
        return [
            self.file,
            self.state,
            self.name,
            self.box.offsets,
            self.box.sizes,
            self.dtype,
            self.start,
            self.stop,
        ]

    @classmethod
    def from_json(cls, value: list[Any]) -> StoredBox:
        file, state, name, offsets, sizes, dtype, start, stop = value
        return cls(file, state, name, Box(tuple(offsets), tuple(sizes)), dtype, start, stop)


class BlockHasher:
    """Hashes a stream block by block, whatever the pieces it comes in."""

    def __init__(self, block_size: int = BLOCK_SIZE):
        self.block_size, self.size, self.blocks = block_size, 0, list[str]()
        self._hash = xxhash.xxh3_64()

    def update(self, data: memoryview) -> None:
        while len(data):
            room = self.block_size - self.size % self.block_size
            part, data = data[:room], data[room:]
            self._hash.update(part)
            self.size += len(part)
            if self.size % self.block_size == 0:
                self._close()

    def finish(self) -> list[str]:
        if self.size % self.block_size:
            self._close()
        return self.blocks

    def _close(self) -> None:
        self.blocks.append(self._hash.hexdigest())
        self._hash.reset()


def key_of(state: str, name: str, box: Box) -> str:
    return f"{state}/{name}@{','.join(map(str, box.offsets))}"


def write_tensor_file(
    path: Path,
    tensors: Sequence[tuple[str, tuple[int, ...], np.ndarray]],
    dtype: str,
    metadata: dict[str, str],
    fail_point: Callable[[str], None] = lambda name: None,
    progress: Callable[[], None] = lambda: None,
) -> StoredFile:
    """Write (key, shape, contiguous values) as one safetensors file and fsync it. Returns its size and hashes. Raises OSError.

    progress: called after every block that was handed to the system and, as that may only have been noted in memory, after every
    SYNC_BYTES that the disk really took.
    """
    header = _header(tensors, dtype, metadata)
    hasher = BlockHasher()
    with open(path, "xb", buffering=1 << 20) as file:
        pieces: Iterable[memoryview] = _merge(values for _, _, values in tensors)
        write = partial(_write, file, hasher=hasher, progress=progress)
        write(memoryview(header))
        fail_point("save.header_written")
        for i, piece in enumerate(pieces):
            write(piece)
            if i == 0:
                fail_point("save.values_half_written")
        fail_point("save.values_written")
        file.flush()
        os.fsync(file.fileno())
        progress()
        fail_point("save.file_synced")
    return StoredFile(name=path.name, size=hasher.size, blocks=hasher.finish())


def _write(
    file: BinaryIO, data: memoryview, hasher: BlockHasher, progress: Callable[[], None]
) -> None:
    for start in range(0, len(data), BLOCK_SIZE):
        part = data[start : start + BLOCK_SIZE]
        file.write(part)
        if (hasher.size + len(part)) // SYNC_BYTES > hasher.size // SYNC_BYTES:
            file.flush()
            os.fdatasync(file.fileno())
        hasher.update(part)
        progress()


def _merge(arrays: Iterable[np.ndarray]) -> Iterator[memoryview]:
    """The arrays' bytes; neighbours in memory as one piece, so that many small tensors cost few writes."""
    begin = end = 0
    pending: list[np.ndarray] = []
    for array in arrays:
        address = array.__array_interface__["data"][0]
        if pending and address != end:
            yield _span(pending, begin, end)
            pending = []
        if not pending:
            begin = address
        pending.append(array)
        end = address + array.nbytes
    if pending:
        yield _span(pending, begin, end)


def _span(arrays: list[np.ndarray], begin: int, end: int) -> memoryview:
    if len(arrays) == 1:
        return memoryview(arrays[0].reshape(-1).view(np.uint8))
    base = np.lib.stride_tricks.as_strided(
        arrays[0].reshape(-1).view(np.uint8), shape=(end - begin,), strides=(1,)
    )
    return memoryview(base)


def _header(
    tensors: Sequence[tuple[str, tuple[int, ...], np.ndarray]], dtype: str, metadata: dict[str, str]
) -> bytes:
    entries: dict[str, object] = {"__metadata__": metadata}
    position = 0
    for key, shape, values in tensors:
        assert key not in entries, key
        entries[key] = {
            "dtype": dtype,
            "shape": list(shape),
            "data_offsets": [position, position + values.nbytes],
        }
        position += values.nbytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % _ALIGNMENT)
    return struct.pack("<Q", len(text)) + text


class CheckedFile:
    """A tensor file open for reading: what it returns was checked against the manifest's hashes."""

    def __init__(self, folder: Path, stored: StoredFile, block_size: int):
        self.path, self.stored, self.block_size = folder / stored.name, stored, block_size
        self.file = open_regular_file(self.path)
        self.bytes_read = 0
        os.posix_fadvise(
            self.file.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL
        )  # a larger read-ahead: the disk works while blocks are hashed
        size = os.fstat(self.file.fileno()).st_size
        if size != stored.size:
            self.file.close()
            raise CheckpointError(
                f"{self.path}: {size} bytes, expected {stored.size}. The file is cut off, replaced or still being copied."
            )
        if len(stored.blocks) != -(-stored.size // block_size):
            raise CheckpointError(
                f"{self.path}: the manifest has {len(stored.blocks)} hashes for {stored.size} bytes."
            )
        self.kept: dict[int, np.ndarray] = {}

    def close(self) -> None:
        self.file.close()

    def __enter__(self) -> CheckedFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def read_header(self, size: int) -> bytes:
        """The first bytes; the blocks that hold them stay in `kept`."""
        blocks = range(-(-size // self.block_size))
        for block in blocks:
            if block not in self.kept:
                self.kept[block] = np.empty(self.size_of(block), np.uint8)
                self.read_block(block, self.kept[block])
        return b"".join(self.kept[block].tobytes() for block in blocks)[:size]

    def size_of(self, block: int) -> int:
        """Bytes of a block; the last one may be short."""
        return min(self.block_size, self.stored.size - block * self.block_size)

    def check_all(self) -> None:
        """Read the whole file and compare every hash."""
        buffer = np.empty(min(self.block_size, self.stored.size), np.uint8)
        for block in range(len(self.stored.blocks)):
            self.read_block(block, buffer[: self.size_of(block)])

    def read_block(self, block: int, out: np.ndarray) -> None:
        """Fill `out` (uint8, contiguous, of the block's size) and compare its hash. Raises CheckpointError."""
        begin, done = block * self.block_size, 0
        while done < len(out):
            count = os.preadv(self.file.fileno(), [memoryview(out)[done:]], begin + done)
            if count == 0:
                raise CheckpointError(
                    f"{self.path}: ends at byte {begin + done}, expected {self.stored.size}. It was cut while being read."
                )
            done += count
        self.bytes_read += len(out)
        found = xxhash.xxh3_64_hexdigest(memoryview(out))
        if found != self.stored.blocks[block]:
            raise CheckpointError(
                f"{self.path}: damaged between bytes {begin} and {begin + len(out)}: xxh3 is {found}, "
                f"expected {self.stored.blocks[block]}. "
                "Restore the file, or move the checkpoint's folder away to continue from an older one."
            )

    def index(self) -> list[StoredBox]:
        """The boxes that the file holds, from its header. Raises CheckpointError when anything in it does not add up."""
        try:
            (length,) = struct.unpack("<Q", self.read_header(min(8, self.stored.size)))
            if not 2 <= length <= min(MAX_HEADER_BYTES, self.stored.size - 8):
                raise ValueError(f"header of {length} bytes in a file of {self.stored.size}")
            header = json.loads(self.read_header(8 + length)[8:])
            header.pop("__metadata__", None)
            boxes = [_entry(self.stored, 8 + length, key, value) for key, value in header.items()]
            _refuse_shared_bytes(boxes, 8 + length, self.stored.size)
            return boxes
        except (
            ValueError,
            KeyError,
            TypeError,
            AttributeError,
            OverflowError,
            RecursionError,
            struct.error,
        ) as error:
            what = (
                str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
            )
            raise CheckpointError(
                f"{self.path}: not a tensor file of a checkpoint: {what}"
            ) from None


def _refuse_shared_bytes(boxes: Iterable[StoredBox], data_start: int, size: int) -> None:
    """The tensors lie side by side and make up the rest of the file: no byte belongs to two of them, or to none."""
    position = data_start
    for box in sorted(boxes, key=lambda b: (b.start, b.stop)):
        if box.start != position:
            what = (
                "are also another tensor's"
                if box.start < position
                else f"follow {box.start - position} bytes that are no tensor's"
            )
            raise ValueError(
                f"{key_of(box.state, box.name, box.box)}: bytes {box.start} to {box.stop} {what}"
            )
        position = box.stop
    if position != size:
        raise ValueError(f"bytes {position} to {size} are no tensor's")


def _entry(stored: StoredFile, data_start: int, key: str, value: dict) -> StoredBox:
    owner, _, offsets = key.rpartition("@")
    state, _, name = owner.partition("/")
    box = Box(tuple(map(int, offsets.split(","))), tuple(map(int, value["shape"])))
    start, stop = (data_start + int(x) for x in value["data_offsets"])
    if value["dtype"] not in DTYPES:
        raise ValueError(f"{key}: dtype {value['dtype']}")
    if min(*box.offsets, *box.sizes) < 0 or len(box.offsets) != len(box.sizes):
        raise ValueError(f"{key}: shape {box.sizes}")
    if (
        not data_start <= start <= stop <= stored.size
        or stop - start != box.numel * DTYPES[value["dtype"]].itemsize
    ):
        raise ValueError(f"{key}: bytes {start} to {stop} of {stored.size} for shape {box.sizes}")
    if start % DTYPES[value["dtype"]].itemsize:
        raise ValueError(f"{key}: begins at byte {start}, which is no multiple of its type's size")
    return StoredBox(stored.name, state, name, box, value["dtype"], start, stop)

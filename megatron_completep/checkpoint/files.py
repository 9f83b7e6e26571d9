"""Tensor files: safetensors, written from memory in one pass, read back with every byte checked.

The key of a tensor is STATE/NAME@OFFSETS, such as `master/layers.0.mlp.down.weight@0,64`, and names
a box of the logical tensor. Any reader of safetensors opens the files, and nothing in them can
execute.
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

from megatron_completep.checkpoint.manifest import StoredFile, open_regular_file
from megatron_completep.errors import CheckpointError
from megatron_completep.optim.boxes import Box

# Bytes. Blocks are hashed one by one, so that any of them can be checked without the others.
BLOCK_SIZE = 4 << 20
SYNC_BYTES = 1 << 30  # after so many the disk must have taken what was written
MAX_HEADER_BYTES = 100 << 20  # as safetensors itself has it
DTYPES: dict[str, np.dtype[Any]] = {"F32": np.dtype("<f4"), "F64": np.dtype("<f8")}
_ALIGNMENT = 64  # bytes, of the first tensor in the file

NamedArray = tuple[str, tuple[int, ...], np.ndarray]  # key, shape, contiguous array


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
        """As JSON, for another rank, which then need not open the file."""
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
    def from_json(cls, fields: list[Any]) -> StoredBox:
        file, state, name, offsets, sizes, dtype, start, stop = fields
        box = Box(tuple(offsets), tuple(sizes))
        return cls(file, state, name, box, dtype, start, stop)


class BlockHasher:
    """Hashes a stream block by block, however the stream is divided into calls of `update`."""

    def __init__(self, block_size: int = BLOCK_SIZE):
        self.block_size = block_size
        self.size = 0  # bytes so far
        self.blocks: list[str] = []
        self._hash = xxhash.xxh3_64()

    def update(self, data: memoryview) -> None:
        while len(data):
            room = self.block_size - self.size % self.block_size
            chunk = data[:room]
            data = data[room:]
            self._hash.update(chunk)
            self.size += len(chunk)
            if self.size % self.block_size == 0:
                self._close()

    def finish(self) -> list[str]:
        """The hashes of all blocks; the last one may be short."""
        if self.size % self.block_size:
            self._close()
        return self.blocks

    def _close(self) -> None:
        self.blocks.append(self._hash.hexdigest())
        self._hash.reset()


def key_of(state: str, name: str, box: Box) -> str:
    """The key of a box in a tensor file."""
    return f"{state}/{name}@{','.join(map(str, box.offsets))}"


def write_tensor_file(
    path: Path,
    tensors: Sequence[NamedArray],
    dtype: str,
    metadata: dict[str, str],
    fail_point: Callable[[str], None] = lambda name: None,
    progress: Callable[[], None] = lambda: None,
) -> StoredFile:
    """Write a safetensors file and fsync it. Returns its size and hashes. Raises OSError.

    Args:
        path: of the file, which must not exist.
        dtype: of all arrays, F32 or F64.
        metadata: what the header says of the file.
        fail_point: called at named places; only tests pass one that does something.
        progress: called after each block. The system may have noted a block in memory alone, so the
            disk is waited for after every SYNC_BYTES: progress then means that the disk works.
    """
    header = _header(tensors, dtype, metadata)
    hasher = BlockHasher()
    with open(path, "xb", buffering=1 << 20) as file:
        # Everything is hashed on its way to the disk, and never read back.
        write = partial(_write, file, hasher=hasher, progress=progress)
        write(memoryview(header))
        fail_point("save.header_written")
        spans = _merge(array for _, _, array in tensors)
        for number, span in enumerate(spans):
            write(span)
            if number == 0:
                fail_point("save.values_half_written")
        fail_point("save.values_written")
        # The checkpoint is committed by a rename, which must not reach the disk before the bytes.
        file.flush()
        os.fsync(file.fileno())
        progress()
        fail_point("save.file_synced")
    return StoredFile(name=path.name, size=hasher.size, blocks=hasher.finish())


def _write(
    file: BinaryIO, data: memoryview, hasher: BlockHasher, progress: Callable[[], None]
) -> None:
    for start in range(0, len(data), BLOCK_SIZE):
        block = data[start : start + BLOCK_SIZE]
        file.write(block)
        # Whether this block takes the file past a multiple of SYNC_BYTES.
        if (hasher.size + len(block)) // SYNC_BYTES > hasher.size // SYNC_BYTES:
            file.flush()
            os.fdatasync(file.fileno())
        hasher.update(block)
        progress()


def _merge(arrays: Iterable[np.ndarray]) -> Iterator[memoryview]:
    """The bytes of the arrays, in order.

    Arrays that are neighbours in memory come as one view, so that many small ones cost few writes.
    """
    begin = end = 0
    pending: list[np.ndarray] = []
    for array in arrays:
        address, _ = array.__array_interface__["data"]
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
    """The bytes [begin, end) of memory that the arrays make up."""
    first_bytes = arrays[0].reshape(-1).view(np.uint8)
    if len(arrays) == 1:
        return memoryview(first_bytes)
    size = end - begin
    span = np.lib.stride_tricks.as_strided(first_bytes, shape=(size,), strides=(1,))
    return memoryview(span)


def _header(tensors: Sequence[NamedArray], dtype: str, metadata: dict[str, str]) -> bytes:
    """The length of the JSON, 8 bytes, and the JSON, padded to the alignment."""
    entries: dict[str, object] = {"__metadata__": metadata}
    position = 0
    for key, shape, array in tensors:
        assert key not in entries, key
        stop = position + array.nbytes
        entries[key] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, stop]}
        position = stop
    encoded = json.dumps(entries, separators=(",", ":")).encode()
    # safetensors allows spaces at the end of the JSON.
    encoded += b" " * (-(len(encoded) + 8) % _ALIGNMENT)
    return struct.pack("<Q", len(encoded)) + encoded


class CheckedFile:
    """A tensor file open for reading: what it returns was checked against the manifest's hashes.

    Construction raises CheckpointError where the size is not the manifest's.

    Attributes:
        header_blocks: block -> its bytes, of the blocks that were read for the header.
        bytes_read: from the file so far.
    """

    def __init__(self, folder: Path, stored: StoredFile, block_size: int):
        self.path = folder / stored.name
        self.stored = stored
        self.block_size = block_size
        self.header_blocks: dict[int, np.ndarray] = {}
        self.bytes_read = 0
        self.file = open_regular_file(self.path)
        # A larger read-ahead: the disk works while blocks are hashed.
        os.posix_fadvise(self.file.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
        size = os.fstat(self.file.fileno()).st_size
        if size != stored.size:
            self.file.close()
            raise CheckpointError(
                f"{self.path}: {size} bytes, expected {stored.size}. "
                "The file is cut off, replaced or still being copied."
            )
        if len(stored.blocks) != -(-stored.size // block_size):
            raise CheckpointError(
                f"{self.path}: the manifest has {len(stored.blocks)} hashes "
                f"for {stored.size} bytes."
            )

    def close(self) -> None:
        self.file.close()

    def __enter__(self) -> CheckedFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def read_header(self, size: int) -> bytes:
        """The first `size` bytes; the blocks that hold them stay in `header_blocks`."""
        blocks = range(-(-size // self.block_size))
        for block in blocks:
            if block not in self.header_blocks:
                self.header_blocks[block] = np.empty(self.size_of(block), np.uint8)
                self.read_block(block, self.header_blocks[block])
        return b"".join(self.header_blocks[block].tobytes() for block in blocks)[:size]

    def size_of(self, block: int) -> int:
        """Bytes of a block; the last block may be short."""
        return min(self.block_size, self.stored.size - block * self.block_size)

    def check_all(self) -> None:
        """Read the whole file and compare every hash. Raises CheckpointError."""
        buffer = np.empty(min(self.block_size, self.stored.size), np.uint8)
        for block in range(len(self.stored.blocks)):
            self.read_block(block, buffer[: self.size_of(block)])

    def read_block(self, block: int, out: np.ndarray) -> None:
        """Fill `out` with a block and compare its hash. Raises CheckpointError.

        out: uint8, contiguous, of the block's size.
        """
        begin = block * self.block_size
        done = 0
        while done < len(out):
            # A read may return less than was asked for.
            count = os.preadv(self.file.fileno(), [memoryview(out)[done:]], begin + done)
            if count == 0:
                raise CheckpointError(
                    f"{self.path}: ends at byte {begin + done}, expected {self.stored.size}. "
                    "It was cut while being read."
                )
            done += count
        self.bytes_read += len(out)

        digest = xxhash.xxh3_64_hexdigest(memoryview(out))
        expected = self.stored.blocks[block]
        if digest != expected:
            raise CheckpointError(
                f"{self.path}: damaged between bytes {begin} and {begin + len(out)}: "
                f"xxh3 is {digest}, expected {expected}. "
                "Restore the file, or move the checkpoint's folder away to continue from an older "
                "one."
            )

    def index(self) -> list[StoredBox]:
        """The boxes that the file holds, from its header.

        Raises CheckpointError when anything in the header does not add up.
        """
        try:
            return self._index()
        # What unpacking, parsing and indexing raise for a header that is not of the form.
        except (
            ValueError,
            KeyError,
            TypeError,
            AttributeError,
            OverflowError,
            RecursionError,
            struct.error,
        ) as error:
            reason = str(error)
            if not isinstance(error, ValueError):
                reason = f"{type(error).__name__}: {error}"
            raise CheckpointError(
                f"{self.path}: not a tensor file of a checkpoint: {reason}"
            ) from None

    def _index(self) -> list[StoredBox]:
        (length,) = struct.unpack("<Q", self.read_header(min(8, self.stored.size)))
        if not 2 <= length <= min(MAX_HEADER_BYTES, self.stored.size - 8):
            raise ValueError(f"header of {length} bytes in a file of {self.stored.size}")
        # The length is checked before it is believed: it says how much memory the header takes.
        header = json.loads(self.read_header(8 + length)[8:])
        header.pop("__metadata__", None)

        data_start = 8 + length
        boxes = []
        for key, entry in header.items():
            boxes.append(_stored_box(self.stored, data_start, key, entry))
        _refuse_shared_bytes(boxes, data_start, self.stored.size)
        return boxes


def _refuse_shared_bytes(boxes: Iterable[StoredBox], data_start: int, size: int) -> None:
    """Raise ValueError unless every byte after the header belongs to one tensor alone."""
    position = data_start
    for box in sorted(boxes, key=lambda b: (b.start, b.stop)):
        if box.start != position:
            fault = f"follow {box.start - position} bytes that are no tensor's"
            if box.start < position:
                fault = "are also another tensor's"
            key = key_of(box.state, box.name, box.box)
            raise ValueError(f"{key}: bytes {box.start} to {box.stop} {fault}")
        position = box.stop
    if position != size:
        raise ValueError(f"bytes {position} to {size} are no tensor's")


def _stored_box(stored: StoredFile, data_start: int, key: str, entry: dict[str, Any]) -> StoredBox:
    """The box that one entry of a header describes. Raises ValueError where it cannot be true."""
    owner, _, offsets = key.rpartition("@")
    state, _, name = owner.partition("/")
    box = Box(tuple(map(int, offsets.split(","))), tuple(map(int, entry["shape"])))
    # Offsets count from the end of the header.
    start, stop = (data_start + int(offset) for offset in entry["data_offsets"])
    dtype = entry["dtype"]
    if dtype not in DTYPES:
        raise ValueError(f"{key}: dtype {dtype}")
    if min(*box.offsets, *box.sizes) < 0 or len(box.offsets) != len(box.sizes):
        raise ValueError(f"{key}: shape {box.sizes}")

    item_size = DTYPES[dtype].itemsize
    inside = data_start <= start <= stop <= stored.size
    if not inside or stop - start != box.numel * item_size:
        raise ValueError(f"{key}: bytes {start} to {stop} of {stored.size} for shape {box.sizes}")
    # A view of the bytes in the tensor's type must be possible wherever a block begins.
    if start % item_size:
        raise ValueError(f"{key}: begins at byte {start}, which is no multiple of its type's size")
    return StoredBox(stored.name, state, name, box, dtype, start, stop)

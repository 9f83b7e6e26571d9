"""Token files in Megatron's format.

PREFIX.bin holds the tokens back to back, PREFIX.idx says where each sequence and document lies. An
optional PREFIX.json beside them holds counts, content hashes and the tokenizer; Megatron ignores
it, so the files are exchangeable both ways.

PREFIX.idx, little-endian, S sequences, D = documents + 1:

    magic[9]  uint64 version  uint8 dtype code  uint64 S  uint64 D
    int32 lengths[S]  int64 pointers[S]  int64 document_indices[D]
    int8 modes[S], in multimodal files only
"""

from __future__ import annotations

import glob
import mmap
import os
import struct
import weakref
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import xxhash

from megatron_completep.data.files import printable, read_json, require_regular
from megatron_completep.errors import DataError

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER = struct.Struct("<9sQBQQ")
DTYPES: dict[int, np.dtype[Any]] = {  # by Megatron's code
    1: np.dtype("u1"),
    2: np.dtype("i1"),
    3: np.dtype("<i2"),
    4: np.dtype("<i4"),
    5: np.dtype("<i8"),
    8: np.dtype("<u2"),
}
FLOAT_CODES = (6, 7)
SIDECAR_FORMAT = "megatron-completep token file"

FULL_CHECK_BYTES = 64 << 20  # an index up to this size is checked entry by entry when it is opened
SPOT_CHECKS = 64  # places at which a larger index is checked
SPOT_ENTRIES = 512  # entries that are checked at each of them
CHUNK = 1 << 18  # entries looked at together: bounds the memory of every pass over an index
BLOCK_BYTES = 8 << 20  # bytes of a .bin handled together

Array = npt.NDArray[Any]


def dtype_for_vocabulary(vocab_size: int) -> np.dtype[Any]:
    """The token type that Megatron chooses: uint16 below 65,500 ids, else int32."""
    return DTYPES[8] if vocab_size < 65500 else DTYPES[4]


class Header(NamedTuple):
    """The fixed part of an index file."""

    dtype: np.dtype[Any]
    num_sequences: int
    document_entries: int  # documents + 1


def read_header(raw: bytes, path: str) -> Header:
    """Decode and check the first 34 bytes of an index. Raises DataError naming the field."""
    if len(raw) < HEADER.size:
        raise DataError(
            f"{path}: header: the file has {len(raw)} bytes, the header takes {HEADER.size}. "
            "It is truncated; build it again."
        )

    # The fields in their order: what another program wrote is wrong from the first one on.
    magic, version, code, sequences, documents = HEADER.unpack_from(raw)
    if magic != MAGIC:
        raise DataError(f"{path}: magic: {magic!r} is not {MAGIC!r}. This is not a token index.")
    if version != VERSION:
        raise DataError(
            f"{path}: version: {version} is not {VERSION}. "
            "Write it again with tools/preprocess_data.py."
        )
    if code in FLOAT_CODES:
        raise DataError(
            f"{path}: dtype code: {code} is a floating-point type; tokens are integers."
        )
    if code not in DTYPES:
        raise DataError(f"{path}: dtype code: {code} is none of {sorted(DTYPES)}.")
    if documents < 1:
        raise DataError(
            f"{path}: document_indices: the length is 0; it must be documents + 1, so at least 1."
        )
    return Header(DTYPES[code], sequences, documents)


class IndexedDataset:
    """Read-only memory-mapped view of a pair of token files.

    Opening checks the header, every size, both ends of each array, and every entry of an index up
    to 64 MB, with its content hash where PREFIX.json has it (a larger index at 64 places:
    `problems` looks at all of it). Raises DataError naming file and field. Without PREFIX.json an
    index whose document_indices were changed to other ascending numbers cannot be told from a good
    one.

    A file that is shortened while it is open is found before its next use: every access to an array
    looks at the file's size first, since a mapped page beyond the end would kill the process. Only
    a pass that is under way at that very moment can still meet one.

    Attributes: `tokens` [num_tokens], `lengths` int32 [S] in tokens, `pointers` int64 [S] in bytes,
    `document_indices` int64 [documents + 1] (first sequence of each document), `modes` int8 [S] or
    None, `dtype`, and the counts.
    """

    def __init__(self, prefix: str | Path) -> None:
        self.prefix = str(prefix)
        self.idx_path = self.prefix + ".idx"
        self.bin_path = self.prefix + ".bin"

        # A few places of a large index are looked at: reading ahead would fetch all of it.
        self._index = _map_file(self.idx_path, self.prefix)
        is_large = len(self._index) > FULL_CHECK_BYTES
        if is_large:
            self._index.madvise(mmap.MADV_RANDOM)
        header = read_header(bytes(self._index[: HEADER.size]), self.idx_path)
        self.dtype = header.dtype
        self.num_sequences = header.num_sequences
        self.num_documents = header.document_entries - 1
        self._map_arrays(header)

        # Sizes first: nothing may be read from arrays that reach beyond their file.
        self._bin = _map_file(self.bin_path, self.prefix)
        self._check_ends()
        self._tokens: Array = np.frombuffer(self._bin, dtype=self.dtype)
        self._descriptor = _open_for_random_reads(self.bin_path)
        weakref.finalize(self, os.close, self._descriptor)
        self.num_tokens = len(self._tokens)

        entries = max(self.num_sequences, header.document_entries)
        if is_large:
            last_start = entries - SPOT_ENTRIES
            for start in np.linspace(0, last_start, SPOT_CHECKS, dtype=np.int64).tolist():
                self._raise_first(self._structure_problems(start, start + SPOT_ENTRIES))
        else:
            self._raise_first(self._structure_problems(0, entries))
        self.sidecar = read_sidecar(self.prefix)
        if self.sidecar is not None:
            self._raise_first(self._sidecar_problems(self.sidecar))
        self._release()

    @property
    def tokens(self) -> Array:
        """[num_tokens], mapped."""
        require_whole(self._bin, self.bin_path)
        return self._tokens

    @property
    def lengths(self) -> Array:
        """int32 [S], in tokens."""
        require_whole(self._index, self.idx_path)
        return self._lengths

    @property
    def pointers(self) -> Array:
        """int64 [S], in bytes."""
        require_whole(self._index, self.idx_path)
        return self._pointers

    @property
    def document_indices(self) -> Array:
        """int64 [documents + 1], the first sequence of each document."""
        require_whole(self._index, self.idx_path)
        return self._document_indices

    def _release(self) -> None:
        """Give back the memory of the index.

        From here on it is used for binary searches. Reading ahead would make much of a huge index
        resident, and so would what the checks have touched.
        """
        self._index.madvise(mmap.MADV_DONTNEED)
        self._index.madvise(mmap.MADV_RANDOM)

    @contextmanager
    def reading_everything(self) -> Iterator[None]:
        """Around a pass over a whole index array: the kernel reads ahead inside the block.

        The memory is given back afterwards.
        """
        self._index.madvise(mmap.MADV_SEQUENTIAL)
        try:
            yield
        finally:
            self._release()

    # Another process opens the files itself: mappings cannot be sent.
    def __reduce__(self) -> tuple[type[IndexedDataset], tuple[str]]:
        return IndexedDataset, (self.prefix,)

    def __len__(self) -> int:
        return self.num_documents

    def _map_arrays(self, header: Header) -> None:
        sequences = header.num_sequences
        documents = header.document_entries
        pointers_at = HEADER.size + 4 * sequences
        documents_at = pointers_at + 8 * sequences
        modes_at = documents_at + 8 * documents
        size = len(self._index)
        if size not in (modes_at, modes_at + sequences):
            raise DataError(
                f"{self.idx_path}: size: {size} bytes, but {sequences} sequences and "
                f"{documents} document_indices take {modes_at}. "
                "The file is truncated or its counts are corrupted; build it again."
            )
        self._lengths: Array = np.frombuffer(self._index, "<i4", sequences, HEADER.size)
        self._pointers: Array = np.frombuffer(self._index, "<i8", sequences, pointers_at)
        self._document_indices: Array = np.frombuffer(self._index, "<i8", documents, documents_at)
        self.modes: Array | None = None
        if size > modes_at:
            self.modes = np.frombuffer(self._index, "i1", sequences, modes_at)

    def _check_ends(self) -> None:
        """Check both ends of each array, and the size of the .bin. Raises DataError."""
        first_sequence = int(self.document_indices[0])
        end_sequence = int(self.document_indices[-1])
        if first_sequence != 0:
            raise DataError(
                f"{self.idx_path}: document_indices: starts with {first_sequence} instead of 0."
            )
        if end_sequence != self.num_sequences:
            raise DataError(
                f"{self.idx_path}: document_indices: ends with {end_sequence} instead of "
                f"the number of sequences, {self.num_sequences}."
            )
        described_bytes = 0
        if self.num_sequences:
            bytes_of_last = int(self.lengths[-1]) * self.dtype.itemsize
            described_bytes = int(self.pointers[-1]) + bytes_of_last
        if described_bytes != len(self._bin):
            raise DataError(
                f"{self.bin_path}: size: {len(self._bin)} bytes, but the index {self.idx_path} "
                f"describes {described_bytes}. One of the two files is truncated or belongs to "
                "another corpus; build or copy both again."
            )

    def _structure_problems(self, start: int, stop: int) -> Iterator[str]:
        """Faults among entries start..stop-1 of the arrays, the first of each kind a chunk.

        Each entry is compared with its successor.
        """
        for begin in range(start, min(stop, self.num_sequences), CHUNK):
            end = min(begin + CHUNK, stop, self.num_sequences)
            yield from self._sequence_problems(begin, end)
        for begin in range(start, min(stop, self.num_documents), CHUNK):
            end = min(begin + CHUNK, stop, self.num_documents)
            falls = np.diff(self.document_indices[begin : end + 1]) < 0
            if falls.any():
                at = begin + int(np.argmax(falls))
                yield (
                    f"{self.idx_path}: document_indices: entry {at + 1} is smaller "
                    "than the entry before it."
                )

    def _sequence_problems(self, begin: int, end: int) -> Iterator[str]:
        """Faults among the lengths and pointers of sequences begin..end-1."""
        itemsize = self.dtype.itemsize
        lengths = self.lengths[begin:end].astype(np.int64)
        is_last = end == self.num_sequences
        successor = len(self._bin) if is_last else self.pointers[end]
        pointers = np.append(self.pointers[begin:end], successor)

        negative = lengths < 0
        if negative.any():
            at = int(np.argmax(negative))
            yield (
                f"{self.idx_path}: lengths: sequence {begin + at} "
                f"has the negative length {lengths[at]}."
            )
        if begin == 0 and pointers[0] != 0:
            yield f"{self.idx_path}: pointers: sequence 0 is at byte {pointers[0]} instead of 0."

        # Tokens lie back to back: every sequence ends where the next one begins.
        wrong = np.diff(pointers) != lengths * itemsize
        if wrong.any():
            at = int(np.argmax(wrong))
            expected = pointers[at] + lengths[at] * itemsize
            yield (
                f"{self.idx_path}: pointers: sequence {begin + at} at byte {pointers[at]} "
                f"with {lengths[at]} tokens of {itemsize} bytes must be followed by "
                f"byte {expected}, found {pointers[at + 1]}."
            )

    def _sidecar_problems(self, sidecar: dict[str, Any]) -> Iterator[str]:
        """Where PREFIX.json contradicts the files."""
        facts = {
            "documents": self.num_documents,
            "sequences": self.num_sequences,
            "tokens": self.num_tokens,
            "dtype": self.dtype.name,
        }
        for field, fact in facts.items():
            if sidecar.get(field) != fact:
                yield (
                    f"{self.prefix}.json: {field}: {sidecar.get(field)!r}, "
                    f"but the token files have {fact!r}. "
                    "It describes other files; remove it, or copy all three again."
                )

        # Hashing a large index at every start would take longer than the rest of it.
        if len(self._index) <= FULL_CHECK_BYTES:
            yield from self._content_problems("idx")

    def _content_problems(self, suffix: str) -> Iterator[str]:
        """Compare a file's hash with the recorded one."""
        record = (self.sidecar or {}).get(suffix) or {}
        recorded_hash = record.get("xxh3_64")
        if recorded_hash is None:
            return
        path = f"{self.prefix}.{suffix}"
        actual_hash = hash_file(path)
        if actual_hash != recorded_hash:
            yield (
                f"{path}: content: xxh3_64 {actual_hash}, "
                f"but {self.prefix}.json records {recorded_hash}. Copy it again."
            )

    @staticmethod
    def _raise_first(problems: Iterator[str]) -> None:
        for problem in problems:
            raise DataError(problem)

    def problems(self) -> list[str]:
        """Everything that is wrong with the files.

        The whole structure is checked, and the content hashes where PREFIX.json has them.
        """
        entries = max(self.num_sequences, self.num_documents + 1)
        with self.reading_everything():
            problems = list(self._structure_problems(0, entries))
        for suffix in ("bin", "idx"):
            problems += self._content_problems(suffix)
        return problems

    def read(self, begin: int, end: int) -> Array:
        """Tokens begin..end-1 of the file in one read of exactly these bytes.

        It is for samples at random places: a page fault on `tokens` would read the device's whole
        read-ahead window around each. Raises DataError where the file has become shorter.
        """
        size = (end - begin) * self.dtype.itemsize
        raw = os.pread(self._descriptor, size, begin * self.dtype.itemsize)
        if len(raw) != size:
            raise DataError(
                f"{self.bin_path}: tokens {begin} to {end - 1} cannot be read: "
                "the file was shortened while in use."
            )
        return np.frombuffer(raw, self.dtype)

    def sequence(self, number: int) -> Array:
        """Tokens of one sequence, a view."""
        begin = int(self.pointers[number]) // self.dtype.itemsize
        return self.tokens[begin : begin + int(self.lengths[number])]

    def document(self, number: int) -> Array:
        """Tokens of one document (all its sequences), a view."""
        return self.tokens[self.token_offset(number) : self.token_offset(number + 1)]

    def token_offset(self, document: int) -> int:
        """Where a document begins in `tokens`; `num_documents` gives the end of the last one."""
        return self.sequence_offset(int(self.document_indices[document]))

    def sequence_offset(self, sequence: int) -> int:
        """Where a sequence begins in `tokens`; `num_sequences` gives the end of the last one."""
        if sequence == self.num_sequences:
            return self.num_tokens
        return int(self.pointers[sequence]) // self.dtype.itemsize

    def sequence_offsets(self, sequences: Array) -> Array:
        """`sequence_offset` of many sequences, int64."""
        if self.num_sequences == 0:
            return np.zeros(len(sequences), np.int64)
        # The end has no pointer: there the last sequence's is read, and then replaced.
        readable = np.minimum(sequences, self.num_sequences - 1)
        offsets = self.pointers[readable] // self.dtype.itemsize
        return np.where(sequences < self.num_sequences, offsets, self.num_tokens)

    def document_at(self, token: int) -> int:
        """Number of the document that holds token `token` of the file."""
        # bisect, not np.searchsorted, which would copy the whole array, as it is not aligned.
        sequence = bisect_right(self.pointers, token * self.dtype.itemsize) - 1
        # Right where every document has one sequence, as almost always.
        guess = min(sequence, self.num_documents - 1)
        if self.document_indices[guess] <= sequence < self.document_indices[guess + 1]:
            return guess
        return bisect_right(self.document_indices, sequence) - 1

    def document_starts(self, begin: int, end: int) -> Array:
        """Offsets in begin < t < end at which a new non-empty document begins, int64, ascending."""
        first_document = self.document_at(begin)
        last_document = self.document_at(end - 1)
        if first_document == last_document:
            return np.empty(0, np.int64)
        sequences = self.document_indices[first_document + 1 : last_document + 1]
        # An empty document begins where the next one does: both count once.
        return np.unique(self.pointers[sequences] // self.dtype.itemsize)


def _map_file(path: str, prefix: str) -> Any:
    """Map a whole file for reading; an empty file gives empty bytes.

    prefix: as the user gave it, to suggest another one. Raises DataError.
    """
    try:
        require_regular(path)
        with open(path, "rb") as file:
            # An empty file cannot be mapped.
            if os.fstat(file.fileno()).st_size == 0:
                return b""
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        remedy = "A corpus is the pair PREFIX.bin and PREFIX.idx; give PREFIX without the suffix."
        meant = [printable(name) for name in _similar_prefixes(prefix)]
        if meant and isinstance(error, FileNotFoundError):
            remedy = f"Did you mean {' or '.join(meant[:5])}?"
        raise DataError(f"{printable(path)}: {error.strerror}. {remedy}") from error


def _similar_prefixes(prefix: str) -> list[str]:
    """Token files that exist and that PREFIX may mean.

    Either PREFIX ends with a suffix, or preprocessing has appended the name of the text's field.
    """
    plain = prefix.removesuffix(".idx").removesuffix(".bin")
    if plain != prefix and Path(f"{plain}.idx").exists():
        return [plain]
    index_paths = sorted(glob.glob(f"{glob.escape(plain)}_*_document.idx"))
    return [path.removesuffix(".idx") for path in index_paths]


def require_whole(mapping: Any, path: str | Path) -> None:
    """Raise DataError where a mapped file has become shorter than its mapping.

    mapping: an mmap, or the bytes of an empty file.
    """
    if isinstance(mapping, mmap.mmap) and mapping.size() < len(mapping):
        raise DataError(
            f"{printable(path)}: was shortened from {len(mapping)} to {mapping.size()} bytes "
            "while in use. Restore the file, and start again."
        )


def _open_for_random_reads(path: str) -> int:
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)
    return descriptor


def hash_file(path: str | Path) -> str:
    """xxh3_64 of a file's bytes, in hexadecimal."""
    digest = xxhash.xxh3_64()
    with open(path, "rb") as file:
        while block := file.read(BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def read_sidecar(prefix: str) -> dict[str, Any] | None:
    """PREFIX.json; None where there is none, or where the file of that name is something else.

    Raises DataError.
    """
    path = prefix + ".json"
    if not Path(path).exists():
        return None
    try:
        content = read_json(Path(path))
    except (ValueError, OSError) as error:
        raise DataError(
            f"{path}: cannot be read as JSON ({error}). "
            "Remove it, or copy it again: the token files work without it."
        ) from error
    if not isinstance(content, dict) or content.get("format") != SIDECAR_FORMAT:
        return None
    return content

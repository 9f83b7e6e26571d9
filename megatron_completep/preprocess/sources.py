"""Which files are read, in which order, and how they are cut into blocks of work.

Order of documents: the inputs in the order given, a folder's files and a glob's matches sorted by path, documents of a file in
file order. It depends on nothing else.
"""

import bz2
import glob
import gzip
import lzma
import os
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, Literal

from megatron_completep.data.files import printable, require_regular
from megatron_completep.errors import DataError

Format = Literal["jsonl", "text", "lines", "parquet"]
STANDARD_INPUT = "-"
INPUT_FORMATS: tuple[str, ...] = ("auto", "jsonl", "text", "lines", "parquet")

_FORMAT_OF_SUFFIX: dict[str, Format] = {
    **dict.fromkeys((".jsonl", ".json", ".ndjson"), "jsonl"),
    **dict.fromkeys((".parquet", ".pq"), "parquet"),
    **dict.fromkeys((".txt", ".text", ".md", ".rst"), "text"),
}
_COMPRESSIONS = {".gz": "gz", ".zst": "zst", ".xz": "xz", ".bz2": "bz2"}
_CHUNK = 1 << 20
_ZSTD_INPUT = (
    1 << 9
)  # bytes unpacked at a time: they become 16 MB at most, a block of 128 KB for every 4 of them
LARGEST_DOCUMENT = (
    1 << 28
)  # bytes of a line, or of a file that is one document, unless another bound is asked for


@dataclass(frozen=True)
class Source:
    """One input file. `size` is its size on disk in bytes; `compression` is "" or gz, zst, xz, bz2."""

    path: str
    format: Format
    compression: str
    size: int
    modified_ns: int


@dataclass(frozen=True)
class Unit:
    """Consecutive sources that are cut into blocks together: one file, or several small one-document files."""

    index: int
    sources: tuple[Source, ...]


@dataclass(frozen=True)
class Block:
    """What a worker tokenizes at a time. (unit, part) orders the output.

    jsonl, lines: `payload` is whole lines, the first of which is line `first_line`; or, for a file that needs no decompression, payload
    is None and the block is the lines that begin in bytes [start, end). parquet: row group `start`. text: all of `sources`.
    too_long: lines of the payload, from 0, that were left out for their length; each stands there as an empty line.
    disk_bytes: its share of the sources' size on disk, for progress. fault: why the file could not be read further.
    """

    unit: int
    part: int
    sources: tuple[Source, ...]
    start: int = 0
    end: int = 0
    payload: bytes | None = None
    first_line: int | None = None
    too_long: tuple[int, ...] = ()
    disk_bytes: int = 0
    fault: str | None = None

    @property
    def format(self) -> Format:
        return self.sources[0].format

    @property
    def path(self) -> str:
        return self.sources[0].path


def find_sources(inputs: Sequence[str | Path], input_format: str = "auto") -> list[Source]:
    """Expand files, folders and globs (`**` included), each file once. Raises DataError listing every input that cannot be used.

    Nothing that is found is passed over in silence: a pipe, a broken link or a folder that cannot be listed is a problem.
    """
    problems: list[str] = []
    sources: list[Source] = []
    seen: dict[
        str, tuple[int, str]
    ] = {}  # real path -> number of the input, and the name it was found by
    for number, given in enumerate(map(str, inputs)):
        try:
            paths = _expand(given, input_format)
        except DataError as error:
            problems.append(str(error))
            continue
        for path in paths:
            real = os.path.realpath(path)
            first = seen.setdefault(real, (number, path))
            if first != (number, path):
                if (
                    first[0] != number
                ):  # a folder or a pattern that holds a file and a link to it means it once
                    by = f"{printable(inputs[first[0]])} and {printable(given)}"
                    problems.append(
                        f"{printable(path)}: named twice (by {by}). Its documents would count double; name it once."
                    )
                continue
            try:
                sources.append(_source(path, input_format))
            except DataError as error:
                problems.append(str(error))
            except OSError as error:
                problems.append(f"{printable(path)}: cannot be read ({error.strerror}).")
    if not problems and not sources:
        problems.append("no input was given. Use --input FILE, FOLDER or GLOB.")
    if problems:
        raise DataError(
            "\n".join(
                problems[:20]
                + ([f"... and {len(problems) - 20} more"] if len(problems) > 20 else [])
            )
        )
    return sources


def _expand(given: str, input_format: str) -> list[str]:
    if given == STANDARD_INPUT:
        raise DataError(
            "-: standard input is not read here: inputs are read in parts, by several processes, and again after an interruption. "
            "Write it to a file, and name that (./- for a file of this name)."
        )
    path = Path(given)
    if path.is_dir():
        chosen = [
            name
            for name in _files_below(given)
            if input_format != "auto" or _split_name(name)[0] in _FORMAT_OF_SUFFIX
        ]
        if not chosen:
            known = " ".join(sorted(_FORMAT_OF_SUFFIX))
            raise DataError(
                f"{printable(given)}: the folder has no file with a known ending ({known}, each perhaps .gz .zst .xz .bz2). "
                f"Use a glob such as '{printable(given)}/**/*.py'."
            )
        return chosen
    if path.exists():
        return [given]
    matches = sorted(name for name in glob.glob(given, recursive=True) if not Path(name).is_dir())
    if not matches:
        raise DataError(
            f"{printable(given)}: no such file or folder, and no file matches it as a glob."
        )
    return matches


def _files_below(folder: str) -> list[str]:
    """Everything in a folder and its folders that is no folder, sorted by path; names that begin with a dot are left out."""

    def refuse(error: OSError) -> None:
        raise DataError(
            f"{printable(error.filename)}: the folder cannot be listed ({error.strerror})."
        )

    files: list[str] = []
    for parent, folders, names in os.walk(folder, onerror=refuse):
        linked = sorted(
            name for name in folders if not name.startswith(".") and Path(parent, name).is_symlink()
        )
        if linked:
            raise DataError(
                f"{printable(Path(parent, linked[0]))}: is a link to a folder, which is not followed. Name that folder as an input, "
                "or remove the link."
            )
        files += [str(Path(parent, name)) for name in names if not name.startswith(".")]
    return sorted(files)


def _split_name(path: str) -> tuple[str, str]:
    """("data.jsonl.gz") -> (".jsonl", "gz")."""
    name = Path(path)
    compression = _COMPRESSIONS.get(name.suffix.lower(), "")
    return (name.with_suffix("") if compression else name).suffix.lower(), compression


def _source(path: str, input_format: str) -> Source:
    suffix, compression = _split_name(path)
    chosen = _FORMAT_OF_SUFFIX.get(suffix, "text") if input_format == "auto" else input_format
    status = require_regular(path)
    if chosen == "parquet" and compression:
        raise DataError(
            f"{printable(path)}: parquet is compressed inside; unpack the {compression} file first."
        )
    with open(path, "rb"):
        pass  # permission is checked before hours of work
    return Source(path, chosen, compression, status.st_size, status.st_mtime_ns)  # type: ignore[arg-type]


def make_units(sources: Iterable[Source], block_bytes: int) -> list[Unit]:
    """One unit a file; runs of text files share a unit up to block_bytes."""
    units: list[Unit] = []
    group: list[Source] = []

    def close() -> None:
        if group:
            units.append(Unit(len(units), tuple(group)))
            group.clear()

    for source in sources:
        if source.format != "text" or (
            group and sum(s.size for s in group) + source.size > block_bytes
        ):
            close()
        group.append(source)
        if source.format != "text":
            close()
    close()
    return units


def blocks_of(
    unit: Unit, block_bytes: int, largest_document: int = LARGEST_DOCUMENT
) -> Iterator[Block]:
    """The blocks of a unit in order. Compressed lines are decompressed here, once; everything else is left to the worker.

    largest_document: no more than this many bytes of one line are held.
    """
    source = unit.sources[0]
    if source.format == "text":
        yield Block(unit.index, 0, unit.sources, disk_bytes=sum(s.size for s in unit.sources))
    elif source.format == "parquet":
        try:
            groups = parquet_file(source.path).num_row_groups
        except DataError as error:
            yield Block(
                unit.index, 0, unit.sources, payload=b"", disk_bytes=source.size, fault=str(error)
            )
            return
        for part in range(groups):
            yield Block(
                unit.index, part, unit.sources, start=part, disk_bytes=source.size // groups
            )
    elif source.compression:
        yield from _stream_blocks(unit, block_bytes, largest_document)
    else:
        for part, start in enumerate(range(0, source.size, block_bytes)):
            end = min(start + block_bytes, source.size)
            yield Block(unit.index, part, unit.sources, start, end, disk_bytes=end - start)


def _stream_blocks(unit: Unit, block_bytes: int, largest_document: int) -> Iterator[Block]:
    """Whole lines, at least block_bytes of them, of a compressed file; what precedes a fault of the archive is used."""
    source = unit.sources[0]
    block = Block(unit.index, 0, unit.sources, payload=b"", first_line=1)
    lines = _Lines(largest_document)
    line = disk = 0
    fault = None
    try:
        with open_input(source.path) as file:
            for chunk in decompress(file, source.path, source.compression):
                lines.add(chunk)
                if lines.complete_bytes < block_bytes:
                    continue
                payload, too_long = lines.take()
                yield replace(
                    block,
                    payload=payload,
                    first_line=line + 1,
                    too_long=too_long,
                    disk_bytes=file.tell() - disk,
                )
                line, disk = line + payload.count(b"\n"), file.tell()
                block = replace(block, part=block.part + 1)
    except DataError as error:
        fault = str(error)
    if fault is None:
        lines.end()
    payload, too_long = lines.take()
    yield replace(
        block,
        payload=payload,
        first_line=line + 1,
        too_long=too_long,
        disk_bytes=source.size - disk,
        fault=fault,
    )


def open_input(path: str) -> BinaryIO:
    """An input that could be read when the run began. Raises DataError where it cannot be any more."""
    try:
        return open(path, "rb")
    except OSError as error:
        raise DataError(f"{printable(path)}: cannot be read any more ({error.strerror}).") from None


class _Lines:
    """Collects whole lines from chunks, and holds at most `longest` bytes (and a chunk) of one that has not ended.

    A longer line becomes an empty one whose number is kept.
    """

    def __init__(self, longest: int):
        self._longest = longest
        self._complete: list[bytes] = []
        self._begun: list[bytes] = []  # of the line after them
        self._begun_bytes = 0
        self._passing_over = False  # inside a line that is too long
        self._too_long: list[int] = []
        self.complete_bytes = 0

    def add(self, chunk: bytes) -> None:
        if self._passing_over:
            newline = chunk.find(b"\n")
            if newline < 0:
                return
            chunk, self._passing_over = chunk[newline:], False
        cut = chunk.rfind(b"\n") + 1
        if cut:
            self._complete += [*self._begun, chunk[:cut]]
            self.complete_bytes += self._begun_bytes + cut
            self._begun, self._begun_bytes = [], 0
        self._begun.append(chunk[cut:])
        self._begun_bytes += len(chunk) - cut
        if self._begun_bytes > self._longest:
            self._too_long.append(sum(part.count(b"\n") for part in self._complete))
            self._begun, self._begun_bytes, self._passing_over = [], 0, True

    def end(self) -> None:
        """The file has ended: what was begun is its last line."""
        self._complete += [*self._begun, b"\n"] if self._passing_over else self._begun
        self._begun, self._begun_bytes, self._passing_over = [], 0, False

    def take(self) -> tuple[bytes, tuple[int, ...]]:
        """The whole lines so far, and which of them were too long."""
        taken = b"".join(self._complete), tuple(self._too_long)
        self._complete, self.complete_bytes, self._too_long = [], 0, []
        if (
            self._passing_over
        ):  # its newline is still to come, so it is the first line of what comes next
            taken, self._too_long = (taken[0], taken[1][:-1]), [0]
        return taken


def decompress(file: BinaryIO, path: str, compression: str) -> Iterator[bytes]:
    """Contents of an open file in chunks of about 1 MB. Raises DataError for a truncated or corrupted archive."""
    try:
        if compression == "zst":
            yield from _decompress_zstd(file)
            return
        openers: dict[str, Any] = {
            "": lambda f: f,
            "gz": gzip.open,
            "xz": lzma.open,
            "bz2": bz2.open,
        }
        stream = openers[compression](file)
        while chunk := stream.read(_CHUNK):
            yield chunk
    except EOFError as error:
        raise DataError(
            f"{printable(path)}: the {compression} archive is truncated. Copy or download it again."
        ) from error
    except (gzip.BadGzipFile, zlib.error, lzma.LZMAError, OSError, ValueError) as error:
        raise DataError(
            f"{printable(path)}: cannot be read as {compression or 'a file'} ({error})."
        ) from error


def _decompress_zstd(file: BinaryIO) -> Iterator[bytes]:
    """zstandard's own stream reader takes a truncated frame for the end of the file, so frames are followed here."""
    import zstandard

    decompressor = zstandard.ZstdDecompressor(max_window_size=1 << 31)
    frame, started = decompressor.decompressobj(), False
    while raw := file.read(_ZSTD_INPUT):
        while raw:
            try:
                chunk = frame.decompress(raw)
            except zstandard.ZstdError as error:
                raise ValueError(error) from error
            started = True
            for start in range(
                0, len(chunk), _CHUNK
            ):  # what compresses very well comes in large pieces
                yield chunk[start : start + _CHUNK]
            raw = b""
            if frame.eof:
                raw, frame, started = frame.unused_data, decompressor.decompressobj(), False
    if started:
        raise EOFError


def parquet_file(path: str) -> Any:
    """An open pyarrow ParquetFile. Raises DataError for a file that is none."""
    import pyarrow
    import pyarrow.parquet

    try:
        named_in_utf8 = (
            printable(path) == path
        )  # the library takes no other name, but it takes an open file
        return pyarrow.parquet.ParquetFile(path if named_in_utf8 else open(path, "rb"))
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{printable(path)}: cannot be read as parquet ({error}).") from error

"""Which files are read, in which order, and how they are cut into blocks of work.

Order of documents: the inputs in the order given, a folder's files and a glob's matches sorted by
path, documents of a file in file order. It depends on nothing else.
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
# Bytes of a line, or of a file that is one document, unless another bound is asked for.
LARGEST_DOCUMENT = 1 << 28

_FORMAT_OF_SUFFIX: dict[str, Format] = {
    **dict.fromkeys((".jsonl", ".json", ".ndjson"), "jsonl"),
    **dict.fromkeys((".parquet", ".pq"), "parquet"),
    **dict.fromkeys((".txt", ".text", ".md", ".rst"), "text"),
}
_COMPRESSIONS = {".gz": "gz", ".zst": "zst", ".xz": "xz", ".bz2": "bz2"}
_CHUNK = 1 << 20  # bytes of text handed on at a time
# Bytes unpacked at a time: they become 16 MB at most, a block of 128 KB for every 4 of them.
_ZSTD_INPUT = 1 << 9
_MOST_PROBLEMS = 20  # that one message lists


@dataclass(frozen=True)
class Source:
    """One input file. `size`: bytes on disk. `compression`: "" or gz, zst, xz, bz2."""

    path: str
    format: Format
    compression: str
    size: int
    modified_ns: int


@dataclass(frozen=True)
class Unit:
    """Consecutive sources that are cut into blocks together.

    That is one file, or several small files of one document each.
    """

    index: int
    sources: tuple[Source, ...]


@dataclass(frozen=True)
class Block:
    """What a worker tokenizes at a time. (unit, part) orders the output.

    jsonl, lines: `payload` is whole lines, the first of which is line `first_line`; or, for a file
    that needs no decompression, payload is None and the block is the lines that begin in bytes
    [start, end). parquet: row group `start`. text: all of `sources`. too_long: lines of the
    payload, from 0, that were left out for their length; each stands there as an empty line.
    disk_bytes: its share of the sources' size on disk, for progress. fault: why the file could not
    be read further.
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
    """Expand files, folders and globs (`**` included), each file once.

    Raises DataError listing every input that cannot be used. Nothing that is found is passed over
    in silence: a pipe, a broken link or a folder that cannot be listed is a problem.
    """
    problems: list[str] = []
    sources: list[Source] = []
    # By real path: number of the input, and the name that the file was found by.
    found_as: dict[str, tuple[int, str]] = {}
    for number, name in enumerate(map(str, inputs)):
        try:
            paths = _expand(name, input_format)
        except DataError as error:
            problems.append(str(error))
            continue
        for path in paths:
            earlier = found_as.setdefault(os.path.realpath(path), (number, path))
            if earlier != (number, path):
                # A folder or a pattern that holds a file and a link to it means it once.
                if earlier[0] != number:
                    names = f"{printable(inputs[earlier[0]])} and {printable(name)}"
                    problems.append(
                        f"{printable(path)}: named twice (by {names}). Its documents would count "
                        "double; name it once."
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
        lines = problems[:_MOST_PROBLEMS]
        if len(problems) > _MOST_PROBLEMS:
            lines.append(f"... and {len(problems) - _MOST_PROBLEMS} more")
        raise DataError("\n".join(lines))
    return sources


def _expand(name: str, input_format: str) -> list[str]:
    """The files that an input names, sorted. Raises DataError where there are none."""
    if name == STANDARD_INPUT:
        raise DataError(
            "-: standard input is not read here: inputs are read in parts, by several processes, "
            "and again after an interruption. Write it to a file, and name that (./- for a file of "
            "this name)."
        )
    path = Path(name)
    if path.is_dir():
        return _files_of_folder(name, input_format)
    # A file's name may look like a pattern.
    if path.exists():
        return [name]
    # `**` twice in a pattern matches a file several times.
    matches = {match for match in glob.glob(name, recursive=True) if not Path(match).is_dir()}
    if not matches:
        raise DataError(
            f"{printable(name)}: no such file or folder, and no file matches it as a glob."
        )
    return sorted(matches)


def _files_of_folder(folder: str, input_format: str) -> list[str]:
    """The files below a folder: all where a format is given, else those with a known ending."""
    files = _files_below(folder)
    if input_format == "auto":
        files = [path for path in files if _split_name(path)[0] in _FORMAT_OF_SUFFIX]
    if not files:
        endings = " ".join(sorted(_FORMAT_OF_SUFFIX))
        raise DataError(
            f"{printable(folder)}: the folder has no file with a known ending ({endings}, each "
            f"perhaps .gz .zst .xz .bz2). Use a glob such as '{printable(folder)}/**/*.py'."
        )
    return files


def _files_below(folder: str) -> list[str]:
    """Everything in a folder and its folders that is no folder, sorted by path.

    Files whose names begin with a dot are left out. Raises DataError.
    """

    def refuse(error: OSError) -> None:
        raise DataError(
            f"{printable(error.filename)}: the folder cannot be listed ({error.strerror})."
        )

    files: list[str] = []
    for parent, folders, names in os.walk(folder, onerror=refuse):
        # os.walk passes over links to folders, which might lead in a circle.
        for name in sorted(folders):
            if not name.startswith(".") and Path(parent, name).is_symlink():
                raise DataError(
                    f"{printable(Path(parent, name))}: is a link to a folder, which is not "
                    "followed. Name that folder as an input, or remove the link."
                )
        files += [str(Path(parent, name)) for name in names if not name.startswith(".")]
    return sorted(files)


def _split_name(path: str) -> tuple[str, str]:
    """("data.jsonl.gz") -> (".jsonl", "gz")."""
    name = Path(path)
    compression = _COMPRESSIONS.get(name.suffix.lower(), "")
    uncompressed = name.with_suffix("") if compression else name
    return uncompressed.suffix.lower(), compression


def _source(path: str, input_format: str) -> Source:
    """One file, which can be opened. Raises DataError or OSError."""
    suffix, compression = _split_name(path)
    file_format: Any = input_format
    if input_format == "auto":
        file_format = _FORMAT_OF_SUFFIX.get(suffix, "text")
    status = require_regular(path)
    if file_format == "parquet" and compression:
        raise DataError(
            f"{printable(path)}: parquet is compressed inside; unpack the {compression} file first."
        )
    with open(path, "rb"):
        pass  # permission is checked before hours of work
    return Source(path, file_format, compression, status.st_size, status.st_mtime_ns)


def make_units(sources: Iterable[Source], block_bytes: int) -> list[Unit]:
    """One unit a file; neighbouring text files share a unit up to block_bytes."""
    units: list[Unit] = []
    texts: list[Source] = []  # text files of the next unit

    def close() -> None:
        if texts:
            units.append(Unit(len(units), tuple(texts)))
            texts.clear()

    for source in sources:
        if source.format != "text":
            close()
            units.append(Unit(len(units), (source,)))
            continue
        size = source.size + sum(text.size for text in texts)
        if size > block_bytes:
            close()
        texts.append(source)
    close()
    return units


def blocks_of(
    unit: Unit, block_bytes: int, largest_document: int = LARGEST_DOCUMENT
) -> Iterator[Block]:
    """The blocks of a unit in order.

    Compressed lines are decompressed here, once; everything else is left to the worker.
    largest_document: no more than this many bytes of one line are held.
    """
    source = unit.sources[0]
    if source.format == "text":
        disk_bytes = sum(text.size for text in unit.sources)
        yield Block(unit.index, 0, unit.sources, disk_bytes=disk_bytes)
    elif source.format == "parquet":
        yield from _parquet_blocks(unit)
    elif source.compression:
        yield from _stream_blocks(unit, block_bytes, largest_document)
    else:
        # Ranges of bytes, which cost nothing to cut: the worker finds the lines that begin there.
        for part, start in enumerate(range(0, source.size, block_bytes)):
            end = min(start + block_bytes, source.size)
            yield Block(unit.index, part, unit.sources, start, end, disk_bytes=end - start)


def _parquet_blocks(unit: Unit) -> Iterator[Block]:
    """A block a row group, or one with the reason why the file has none."""
    source = unit.sources[0]
    try:
        groups = parquet_file(source.path).num_row_groups
    except DataError as error:
        yield Block(
            unit.index, 0, unit.sources, payload=b"", disk_bytes=source.size, fault=str(error)
        )
        return
    for part in range(groups):
        yield Block(unit.index, part, unit.sources, start=part, disk_bytes=source.size // groups)


def _stream_blocks(unit: Unit, block_bytes: int, largest_document: int) -> Iterator[Block]:
    """Whole lines, at least block_bytes of them, of a compressed file.

    What precedes a fault of the archive is used.
    """
    source = unit.sources[0]
    block = Block(unit.index, 0, unit.sources, payload=b"", first_line=1)
    lines = _Lines(largest_document)
    first_line = 1
    read_bytes = 0  # of the compressed file, by the blocks so far
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
                    first_line=first_line,
                    too_long=too_long,
                    disk_bytes=file.tell() - read_bytes,
                )
                first_line += payload.count(b"\n")
                read_bytes = file.tell()
                block = replace(block, part=block.part + 1)
    except DataError as error:
        fault = str(error)

    # Of a line that a fault has torn nothing is used.
    if fault is None:
        lines.end()
    payload, too_long = lines.take()
    yield replace(
        block,
        payload=payload,
        first_line=first_line,
        too_long=too_long,
        disk_bytes=source.size - read_bytes,
        fault=fault,
    )


def open_input(path: str) -> BinaryIO:
    """An input that could be read when the run began.

    Raises DataError where it cannot be any more.
    """
    try:
        return open(path, "rb")
    except OSError as error:
        raise DataError(f"{printable(path)}: cannot be read any more ({error.strerror}).") from None


class _Lines:
    """Collects whole lines from chunks.

    Holds at most `longest` bytes (and a chunk) of a line that has not ended. A longer line becomes
    an empty one whose number is kept.
    """

    def __init__(self, longest: int):
        self._longest = longest
        self._complete: list[bytes] = []  # chunks of whole lines
        self._begun: list[bytes] = []  # chunks of the line after them
        self._begun_bytes = 0
        self._passing_over = False  # inside a line that is too long
        self._too_long: list[int] = []
        self.complete_bytes = 0

    def add(self, chunk: bytes) -> None:
        """Take the next chunk of the file."""
        if self._passing_over:
            newline = chunk.find(b"\n")
            if newline < 0:
                return
            # The newline itself becomes the empty line.
            chunk = chunk[newline:]
            self._passing_over = False
        cut = chunk.rfind(b"\n") + 1
        if cut:
            self._complete += [*self._begun, chunk[:cut]]
            self.complete_bytes += self._begun_bytes + cut
            self._forget_begun()
        self._begun.append(chunk[cut:])
        self._begun_bytes += len(chunk) - cut
        if self._begun_bytes > self._longest:
            self._too_long.append(sum(lines.count(b"\n") for lines in self._complete))
            self._forget_begun()
            self._passing_over = True

    def _forget_begun(self) -> None:
        self._begun = []
        self._begun_bytes = 0

    def end(self) -> None:
        """Take what was begun as the last line: the file has ended."""
        self._complete += [*self._begun, b"\n"] if self._passing_over else self._begun
        self._forget_begun()
        self._passing_over = False

    def take(self) -> tuple[bytes, tuple[int, ...]]:
        """The whole lines so far, and which of them were too long."""
        payload = b"".join(self._complete)
        too_long = self._too_long
        self._complete = []
        self.complete_bytes = 0
        self._too_long = []
        # The newline of such a line is still to come, so it is the first line of what comes next.
        if self._passing_over:
            too_long = too_long[:-1]
            self._too_long = [0]
        return payload, tuple(too_long)


def decompress(file: BinaryIO, path: str, compression: str) -> Iterator[bytes]:
    """Contents of an open file in chunks of about 1 MB.

    Raises DataError for a truncated or corrupted archive.
    """
    openers: dict[str, Any] = {
        "": lambda plain_file: plain_file,
        "gz": gzip.open,
        "xz": lzma.open,
        "bz2": bz2.open,
    }
    # Each library has errors of its own for damage; truncation is EOFError in all of them.
    try:
        if compression == "zst":
            yield from _decompress_zstd(file)
            return
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
    """Contents of a zstd archive. Raises EOFError (a truncated frame) or ValueError (damage).

    zstandard's own stream reader takes a truncated frame for the end of the file, so frames are
    followed here.
    """
    import zstandard

    decompressor = zstandard.ZstdDecompressor(max_window_size=1 << 31)
    frame = decompressor.decompressobj()
    inside_frame = False
    while raw := file.read(_ZSTD_INPUT):
        while raw:
            try:
                unpacked = frame.decompress(raw)
            except zstandard.ZstdError as error:
                raise ValueError(error) from error
            inside_frame = True
            # What compresses very well comes in large pieces.
            for start in range(0, len(unpacked), _CHUNK):
                yield unpacked[start : start + _CHUNK]
            raw = b""
            # An archive may be several frames, one after the other.
            if frame.eof:
                raw = frame.unused_data
                frame = decompressor.decompressobj()
                inside_frame = False
    if inside_frame:
        raise EOFError


def parquet_file(path: str) -> Any:
    """An open pyarrow ParquetFile. Raises DataError for a file that is none."""
    import pyarrow
    import pyarrow.parquet

    # pyarrow takes no name that is not UTF-8, but it takes an open file.
    is_utf8 = printable(path) == path
    try:
        return pyarrow.parquet.ParquetFile(path if is_utf8 else open(path, "rb"))
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{printable(path)}: cannot be read as parquet ({error}).") from error

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

from megatron_completep.errors import DataError

Format = Literal["jsonl", "text", "lines", "parquet"]
INPUT_FORMATS: tuple[str, ...] = ("auto", "jsonl", "text", "lines", "parquet")

_FORMAT_OF_SUFFIX: dict[str, Format] = {
    **dict.fromkeys((".jsonl", ".json", ".ndjson"), "jsonl"),
    **dict.fromkeys((".parquet", ".pq"), "parquet"),
    **dict.fromkeys((".txt", ".text", ".md", ".rst"), "text"),
}
_COMPRESSIONS = {".gz": "gz", ".zst": "zst", ".xz": "xz", ".bz2": "bz2"}
_CHUNK = 1 << 20


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
    disk_bytes: its share of the sources' size on disk, for progress. fault: why the file could not be read further.
    """

    unit: int
    part: int
    sources: tuple[Source, ...]
    start: int = 0
    end: int = 0
    payload: bytes | None = None
    first_line: int | None = None
    disk_bytes: int = 0
    fault: str | None = None

    @property
    def format(self) -> Format:
        return self.sources[0].format

    @property
    def path(self) -> str:
        return self.sources[0].path


def find_sources(inputs: Sequence[str | Path], input_format: str = "auto") -> list[Source]:
    """Expand files, folders and globs (`**` included), each file once. Raises DataError listing every input that cannot be used."""
    problems: list[str] = []
    sources: list[Source] = []
    seen: dict[str, tuple[int, str]] = {}  # real path -> number of the input, and the name it was found by
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
                if first[0] != number:  # a folder or a pattern that holds a file and a link to it means it once
                    by = f"{inputs[first[0]]} and {given}"
                    problems.append(f"{path}: named twice (by {by}). Its documents would count double; name it once.")
                continue
            try:
                sources.append(_source(path, input_format))
            except OSError as error:
                problems.append(f"{path}: cannot be read ({error.strerror}).")
    if not problems and not sources:
        problems.append("no input was given. Use --input FILE, FOLDER or GLOB.")
    if problems:
        raise DataError("\n".join(problems[:20] + ([f"... and {len(problems) - 20} more"] if len(problems) > 20 else [])))
    return sources


def _expand(given: str, input_format: str) -> list[str]:
    path = Path(given)
    if path.is_dir():
        files = sorted(str(Path(folder, name)) for folder, _, names in os.walk(path) for name in names if not name.startswith("."))
        chosen = [name for name in files if input_format != "auto" or _split_name(name)[0] in _FORMAT_OF_SUFFIX]
        if not chosen:
            known = " ".join(sorted(_FORMAT_OF_SUFFIX))
            raise DataError(
                f"{given}: the folder has no file with a known ending ({known}, each perhaps .gz .zst .xz .bz2). "
                f"Use a glob such as '{given}/**/*.py'."
            )
        return chosen
    if path.exists():
        return [given]
    matches = sorted(name for name in glob.glob(given, recursive=True) if Path(name).is_file())
    if not matches:
        raise DataError(f"{given}: no such file or folder, and no file matches it as a glob.")
    return matches


def _split_name(path: str) -> tuple[str, str]:
    """("data.jsonl.gz") -> (".jsonl", "gz")."""
    name = Path(path)
    compression = _COMPRESSIONS.get(name.suffix.lower(), "")
    return (name.with_suffix("") if compression else name).suffix.lower(), compression


def _source(path: str, input_format: str) -> Source:
    suffix, compression = _split_name(path)
    chosen = _FORMAT_OF_SUFFIX.get(suffix, "text") if input_format == "auto" else input_format
    status = os.stat(path)
    if chosen == "parquet" and compression:
        raise DataError(f"{path}: parquet is compressed inside; unpack the {compression} file first.")
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
        if source.format != "text" or (group and sum(s.size for s in group) + source.size > block_bytes):
            close()
        group.append(source)
        if source.format != "text":
            close()
    close()
    return units


def blocks_of(unit: Unit, block_bytes: int) -> Iterator[Block]:
    """The blocks of a unit in order. Compressed lines are decompressed here, once; everything else is left to the worker."""
    source = unit.sources[0]
    if source.format == "text":
        yield Block(unit.index, 0, unit.sources, disk_bytes=sum(s.size for s in unit.sources))
    elif source.format == "parquet":
        try:
            groups = parquet_file(source.path).num_row_groups
        except DataError as error:
            yield Block(unit.index, 0, unit.sources, payload=b"", disk_bytes=source.size, fault=str(error))
            return
        for part in range(groups):
            yield Block(unit.index, part, unit.sources, start=part, disk_bytes=source.size // groups)
    elif source.compression:
        yield from _stream_blocks(unit, block_bytes)
    else:
        for part, start in enumerate(range(0, source.size, block_bytes)):
            end = min(start + block_bytes, source.size)
            yield Block(unit.index, part, unit.sources, start, end, disk_bytes=end - start)


def _stream_blocks(unit: Unit, block_bytes: int) -> Iterator[Block]:
    """Whole lines, at least block_bytes of them, of a compressed file; what precedes a fault of the archive is used."""
    source = unit.sources[0]
    block = Block(unit.index, 0, unit.sources, payload=b"", first_line=1)
    pending: list[bytes] = []
    size = line = disk = 0
    fault = None
    with open(source.path, "rb") as file:
        try:
            for chunk in decompress(file, source.path, source.compression):
                cut = chunk.rfind(b"\n") + 1
                if size + cut < block_bytes or not cut:
                    pending.append(chunk)
                    size += len(chunk)
                    continue
                payload = b"".join([*pending, chunk[:cut]])
                yield replace(block, payload=payload, first_line=line + 1, disk_bytes=file.tell() - disk)
                line, disk = line + payload.count(b"\n"), file.tell()
                block = replace(block, part=block.part + 1)
                pending, size = [chunk[cut:]], len(chunk) - cut
        except DataError as error:
            fault = str(error)
    rest = b"".join(pending)
    if fault:
        rest = rest[: rest.rfind(b"\n") + 1]
    yield replace(block, payload=rest, first_line=line + 1, disk_bytes=source.size - disk, fault=fault)


def decompress(file: BinaryIO, path: str, compression: str) -> Iterator[bytes]:
    """Contents of an open file in chunks of about 1 MB. Raises DataError for a truncated or corrupted archive."""
    try:
        if compression == "zst":
            yield from _decompress_zstd(file)
            return
        openers: dict[str, Any] = {"": lambda f: f, "gz": gzip.open, "xz": lzma.open, "bz2": bz2.open}
        stream = openers[compression](file)
        while chunk := stream.read(_CHUNK):
            yield chunk
    except EOFError as error:
        raise DataError(f"{path}: the {compression} archive is truncated. Copy or download it again.") from error
    except (gzip.BadGzipFile, zlib.error, lzma.LZMAError, OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read as {compression or 'a file'} ({error}).") from error


def _decompress_zstd(file: BinaryIO) -> Iterator[bytes]:
    """zstandard's own stream reader takes a truncated frame for the end of the file, so frames are followed here."""
    import zstandard

    decompressor = zstandard.ZstdDecompressor(max_window_size=1 << 31)
    frame, started = decompressor.decompressobj(), False
    while raw := file.read(_CHUNK // 16):
        while raw:
            try:
                chunk = frame.decompress(raw)
            except zstandard.ZstdError as error:
                raise ValueError(error) from error
            started = True
            for start in range(0, len(chunk), _CHUNK):  # what compresses very well comes in large pieces
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
        return pyarrow.parquet.ParquetFile(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: cannot be read as parquet ({error}).") from error

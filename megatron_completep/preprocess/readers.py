"""From a block to documents: parsing, decoding, and the reasons why a document is bad."""

import json
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import orjson

from megatron_completep.data.files import printable
from megatron_completep.errors import DataError
from megatron_completep.preprocess.quality import clean_text, decode_bytes
from megatron_completep.preprocess.sources import (
    LARGEST_DOCUMENT,
    Block,
    Source,
    decompress,
    open_input,
    parquet_file,
)

_PARQUET_ROWS = 1024  # decoded at a time
_CHUNK = 1 << 20  # bytes read at a time to count lines
_MOST_NAMES = 12  # of keys or columns, in a message
# JSON's own names for its types.
_KIND: dict[type, str] = {
    dict: "an object",
    list: "an array",
    str: "a string",
    int: "a number",
    float: "a number",
    bool: "true or false",
    type(None): "null",
}


class Document(NamedTuple):
    """The texts of one document, one a key.

    `place` is its line in the block (from 0), its row in the row group, or its file's number.
    """

    place: int
    texts: tuple[str, ...]


class BadDocument(NamedTuple):
    """A document that cannot be read. `place` as in Document."""

    place: int
    reason: str


class TextError(ValueError):
    """One document is bad; becomes a BadDocument."""


def read_documents(
    block: Block, keys: Sequence[str], unicode: str, largest_document: int = LARGEST_DOCUMENT
) -> Iterator[Document | BadDocument]:
    """Documents of a block in order; a blank line is none.

    largest_document: bytes of a line, of a file that is one document, or of a row's texts; a larger
    one is bad. Raises DataError where the file itself cannot be read (further).
    """
    if block.format == "parquet" and not block.fault:
        yield from _parquet_documents(block, keys, unicode, largest_document)
    elif block.format == "text":
        yield from _text_documents(block.sources, unicode, largest_document)
    else:
        yield from _line_documents(block, keys, unicode, largest_document)
    # What precedes the fault of a damaged file was read.
    if block.fault:
        raise DataError(block.fault)


def _line_documents(
    block: Block, keys: Sequence[str], unicode: str, largest_document: int
) -> Iterator[Document | BadDocument]:
    """Documents of a jsonl or lines block."""
    for place, line in enumerate(block_lines(block, largest_document)):
        if place in block.too_long or len(line) > largest_document:
            yield BadDocument(place, f"the line is {_too_long(largest_document)}")
            continue
        if not line.strip():
            continue
        try:
            if block.format == "jsonl":
                texts = _json_texts(line, keys, unicode)
            else:
                texts = (decode_bytes(line.removesuffix(b"\r"), unicode),)
        except ValueError as error:
            yield BadDocument(place, str(error))
        else:
            yield Document(place, texts)


def _too_long(largest_document: int) -> str:
    megabytes = largest_document / (1 << 20)
    return f"longer than {megabytes:,.10g} MB, the largest document (--max-document-megabytes)"


def block_lines(block: Block, largest_document: int) -> list[bytes]:
    """The lines of a jsonl or lines block, without their newlines.

    The last one may be cut where it is longer than is allowed.
    """
    raw = block.payload if block.payload is not None else _read_range(block, largest_document)
    lines = raw.split(b"\n")
    # Behind the last newline there is no line.
    if not lines[-1]:
        lines.pop()
    return lines


def _read_range(block: Block, largest_document: int) -> bytes:
    """The lines that begin in [start, end) of the file.

    A line belongs to the block that holds its first byte.
    """
    with open_input(block.path) as file:
        if block.start:
            file.seek(block.start - 1)
            # No newline in the whole range: a line of another block goes through it, and none
            # begins here.
            begun_line = file.readline(block.end - block.start + 1)
            if not begun_line.endswith(b"\n"):
                return b""
        begin = file.tell()
        if begin >= block.end:
            return b""
        raw = file.read(block.end - begin)
        # The last line may go on into the next block's range.
        return raw if raw.endswith(b"\n") else raw + file.readline(largest_document + 1)


def line_number(block: Block, place: int) -> int:
    """Line of the file, from 1, of line `place` of the block.

    Counts the newlines before the block where it must.
    """
    if block.first_line is not None:
        return block.first_line + place
    newlines = 0
    with open_input(block.path) as file:
        # A newline just before `start` makes the block begin with a line of its own; any other
        # newline before `start` ends a line before the block.
        remaining = block.start - 1
        while remaining > 0 and (chunk := file.read(min(remaining, _CHUNK))):
            newlines += chunk.count(b"\n")
            remaining -= len(chunk)
    first_line = newlines + (2 if block.start else 1)
    return first_line + place


def _listed(names: Sequence[str]) -> str:
    """The first of the names with commas between them, for a message."""
    listed = ", ".join(names[:_MOST_NAMES]) or "none"
    return f"{listed} ..." if len(names) > _MOST_NAMES else listed


def _json_texts(line: bytes, keys: Sequence[str], unicode: str) -> tuple[str, ...]:
    """The texts of a JSON object, one a key. Raises ValueError with the reason."""
    try:
        record = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        record = _parse_again(line, unicode, error)
    if not isinstance(record, dict):
        raise TextError(f"expected a JSON object, found {_KIND[type(record)]}")
    return tuple(_text_of(record, key, unicode) for key in keys)


def _parse_again(line: bytes, unicode: str, error: ValueError) -> Any:
    """Parse a line that orjson refuses, with `error`.

    orjson refuses invalid UTF-8 and lone surrogates; decoding says which it is, or repairs it under
    that policy.
    """
    # Of depth: Python's own parser has another limit in every version.
    if "limit" in str(error):
        raise TextError("invalid JSON (nested too deeply)") from None
    text = decode_bytes(line, unicode)
    try:
        return json.loads(text)
    except RecursionError:
        raise TextError("invalid JSON (nested too deeply)") from None
    except ValueError:
        raise TextError(f"invalid JSON ({error})") from error


def _text_of(record: dict[str, Any], key: str, unicode: str) -> str:
    """The text under a key. Raises ValueError with the reason."""
    if key not in record:
        raise TextError(f"key {key} is missing; the keys are {_listed(sorted(record))}")
    text = record[key]
    if not isinstance(text, str):
        raise TextError(f"key {key} holds {_KIND[type(text)]}, expected a string")
    return clean_text(text, unicode)


def _text_documents(
    sources: Sequence[Source], unicode: str, largest_document: int
) -> Iterator[Document | BadDocument]:
    """Files that are one document each."""
    for number, source in enumerate(sources):
        try:
            content = _content(source, largest_document)
            document = Document(number, (decode_bytes(content, unicode),))
        except (ValueError, DataError) as error:
            yield BadDocument(number, str(error))
        else:
            yield document


def _content(source: Source, largest_document: int) -> bytes:
    """A whole file, unpacked. Raises TextError as soon as it is larger than a document may be."""
    content = bytearray()
    with open_input(source.path) as file:
        for chunk in decompress(file, source.path, source.compression):
            content += chunk
            if len(content) > largest_document:
                raise TextError(f"the text is {_too_long(largest_document)}")
    return bytes(content)


def _parquet_documents(
    block: Block, keys: Sequence[str], unicode: str, largest_document: int
) -> Iterator[Document | BadDocument]:
    """Documents of a row group. Raises DataError where it has no column of a key, or is damaged."""
    import pyarrow

    file = parquet_file(block.path)
    names = file.schema_arrow.names
    missing_keys = [key for key in keys if key not in names]
    if missing_keys:
        raise DataError(
            f"{printable(block.path)}: no column {missing_keys[0]}; the columns are "
            f"{_listed(names)}. Choose with --json-keys."
        )
    place = 0
    try:
        # Memory holds some rows at a time, since a row group may be a whole file.
        batches = file.iter_batches(
            batch_size=_PARQUET_ROWS, row_groups=[block.start], columns=list(keys)
        )
        for batch in batches:
            columns = []
            for key in keys:
                column = batch.column(batch.schema.get_field_index(key))
                columns.append(column.to_pylist())
            for cells in zip(*columns, strict=True):
                row = dict(zip(keys, cells, strict=True))
                yield _parquet_document(place, row, unicode, largest_document)
                place += 1
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"{printable(block.path)}: row group {block.start} cannot be read ({error})."
        ) from error


def _parquet_document(
    place: int, row: dict[str, Any], unicode: str, largest_document: int
) -> Document | BadDocument:
    """One row, whose cells are named by the keys."""
    size = sum(len(cell) for cell in row.values() if isinstance(cell, str))
    if size > largest_document:
        return BadDocument(place, f"the row is {_too_long(largest_document)}")
    try:
        return Document(place, tuple(_text_of(row, key, unicode) for key in row))
    except ValueError as error:
        return BadDocument(place, str(error))


def describe_place(block: Block, place: int) -> str:
    """Where a document is, for messages: `FILE, line 7`, `FILE, row group 2, row 7`, or `FILE`."""
    if block.format == "text":
        return printable(block.sources[place].path)
    if block.format == "parquet":
        return f"{printable(block.path)}, row group {block.start}, row {place}"
    return f"{printable(block.path)}, line {line_number(block, place)}"

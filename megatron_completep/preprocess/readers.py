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

_PARQUET_ROWS = 1024


class Document(NamedTuple):
    """The texts of one document, one a key. `place` is its line in the block (from 0), its row in the row group, or its file's number."""

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
    """Documents of a block in order; a blank line is none. Raises DataError where the file itself cannot be read (further).

    largest_document: bytes of a line, of a file that is one document, or of a row's texts; a larger one is bad.
    """
    if block.format == "parquet" and not block.fault:
        yield from _parquet_documents(block, keys, unicode, largest_document)
    elif block.format == "text":
        yield from _text_documents(block.sources, unicode, largest_document)
    else:
        for place, line in enumerate(block_lines(block, largest_document)):
            if place in block.too_long or len(line) > largest_document:
                yield BadDocument(place, f"the line is {_too_long(largest_document)}")
                continue
            if not line.strip():
                continue
            try:
                if block.format == "jsonl":
                    yield Document(place, _json_texts(line, keys, unicode))
                else:
                    yield Document(place, (decode_bytes(line.removesuffix(b"\r"), unicode),))
            except ValueError as error:
                yield BadDocument(place, str(error))
    if block.fault:
        raise DataError(block.fault)


def _too_long(largest_document: int) -> str:
    return f"longer than {largest_document / (1 << 20):,.10g} MB, the largest document (--max-document-megabytes)"


def block_lines(block: Block, largest_document: int) -> list[bytes]:
    """The lines of a jsonl or lines block, without their newlines; the last one may be cut where it is longer than is allowed."""
    raw = block.payload if block.payload is not None else _read_range(block, largest_document)
    lines = raw.split(b"\n")
    if not lines[-1]:
        lines.pop()
    return lines


def _read_range(block: Block, largest_document: int) -> bytes:
    """The lines that begin in [start, end): a line belongs to the block that holds its first byte."""
    with open_input(block.path) as file:
        if block.start:
            file.seek(block.start - 1)
            # No newline in the whole range: a line of another block goes through it, and none begins here.
            if not file.readline(block.end - block.start + 1).endswith(b"\n"):
                return b""
        begin = file.tell()
        if begin >= block.end:
            return b""
        raw = file.read(block.end - begin)
        return raw if raw.endswith(b"\n") else raw + file.readline(largest_document + 1)


def line_number(block: Block, place: int) -> int:
    """Line of the file, from 1, of line `place` of the block. Counts the newlines before the block when it must."""
    if block.first_line is not None:
        return block.first_line + place
    count = 0
    with open_input(block.path) as file:
        left = (
            block.start - 1
        )  # a newline just before `start` makes the block begin with a line of its own
        while left > 0 and (chunk := file.read(min(left, 1 << 20))):
            count += chunk.count(b"\n")
            left -= len(chunk)
    return count + (2 if block.start else 1) + place


# Values of JSON, by the names that JSON gives them.
_KIND: dict[type, str] = {
    dict: "an object",
    list: "an array",
    str: "a string",
    int: "a number",
    float: "a number",
    bool: "true or false",
    type(None): "null",
}
_MOST_NAMES = 12


def _listed(names: Sequence[str]) -> str:
    """The first names with commas between them, for a message."""
    return (", ".join(names[:_MOST_NAMES]) or "none") + (" ..." if len(names) > _MOST_NAMES else "")


def _json_texts(line: bytes, keys: Sequence[str], unicode: str) -> tuple[str, ...]:
    try:
        record = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        record = _parse_again(line, unicode, error)
    if not isinstance(record, dict):
        raise TextError(f"expected a JSON object, found {_KIND[type(record)]}")
    return tuple(_text_of(record, key, unicode) for key in keys)


def _parse_again(line: bytes, unicode: str, error: ValueError) -> Any:
    """orjson refuses invalid UTF-8 and lone surrogates; find out which it was, and repair it when that is wished."""
    if "limit" in str(error):  # of depth: Python's own parser has another one in every version
        raise TextError("invalid JSON (nested too deeply)") from None
    text = decode_bytes(line, unicode)
    try:
        return json.loads(text)
    except RecursionError:
        raise TextError("invalid JSON (nested too deeply)") from None
    except ValueError:
        raise TextError(f"invalid JSON ({error})") from error


def _text_of(record: dict[str, Any], key: str, unicode: str) -> str:
    if key not in record:
        raise TextError(f"key {key} is missing; the keys are {_listed(sorted(record))}")
    text = record[key]
    if not isinstance(text, str):
        raise TextError(f"key {key} holds {_KIND[type(text)]}, expected a string")
    return clean_text(text, unicode)


def _text_documents(
    sources: Sequence[Source], unicode: str, largest_document: int
) -> Iterator[Document | BadDocument]:
    for number, source in enumerate(sources):
        try:
            yield Document(number, (decode_bytes(_content(source, largest_document), unicode),))
        except (ValueError, DataError) as error:
            yield BadDocument(number, str(error))


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
    import pyarrow

    file = parquet_file(block.path)
    names = file.schema_arrow.names
    missing = [key for key in keys if key not in names]
    if missing:
        raise DataError(
            f"{printable(block.path)}: no column {missing[0]}; the columns are {_listed(names)}. Choose with --json-keys."
        )
    place = 0
    try:
        for batch in file.iter_batches(
            batch_size=_PARQUET_ROWS, row_groups=[block.start], columns=list(keys)
        ):
            columns = [batch.column(batch.schema.get_field_index(key)).to_pylist() for key in keys]
            for row in zip(*columns, strict=True):
                yield _parquet_document(
                    place, dict(zip(keys, row, strict=True)), unicode, largest_document
                )
                place += 1
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"{printable(block.path)}: row group {block.start} cannot be read ({error})."
        ) from error


def _parquet_document(
    place: int, row: dict[str, Any], unicode: str, largest_document: int
) -> Document | BadDocument:
    try:
        if sum(len(text) for text in row.values() if isinstance(text, str)) > largest_document:
            raise TextError(f"the row is {_too_long(largest_document)}")
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

"""A worker's task: read, clean and tokenize a block, and append it to the worker's own shard.

A shard is three kinds of append-only files in the work folder.

- `NAME.KEY.bin`: tokens.
- `NAME.meta`: for each block, arrays over its documents: text size in bytes (uint64), token count
  (uint32, one array per JSON key), and a 16-byte hash if documents are de-duplicated.
- `NAME.journal`: one line per finished block, written last, with the offsets and checksums of its
  data (see journal.py).

Blocks without a complete journal line are ignored, so a killed worker leaves nothing that could be
taken for a result.
"""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np
import xxhash

from megatron_completep.data.tokenizer import build_tokenizer
from megatron_completep.errors import DataError
from megatron_completep.preprocess.journal import Record, journal_line
from megatron_completep.preprocess.quality import content_hash
from megatron_completep.preprocess.readers import (
    BadDocument,
    Document,
    describe_place,
    read_documents,
)
from megatron_completep.preprocess.settings import PreprocessSettings
from megatron_completep.preprocess.sources import Block

__all__ = ["Encoder", "Record"]

_BATCH_CHARACTERS = 1 << 20
_BAD_EXAMPLES = 10  # at most this many per block are described; all are counted


class _Extent:
    """One block's bytes in one file: appends them and returns their offset, size and hash."""

    def __init__(self, file: BinaryIO):
        self._file = file
        self._digest = xxhash.xxh3_64()
        self._offset = file.tell()

    def write(self, raw: bytes) -> None:
        self._file.write(raw)
        self._digest.update(raw)

    def finish(self) -> tuple[int, int, str]:
        """(offset, size, xxh3 as 16 hexadecimal digits)."""
        # Flush to the OS before the journal refers to these bytes, so that they survive kill -9.
        self._file.flush()
        size = self._file.tell() - self._offset
        return self._offset, size, self._digest.hexdigest()


@dataclass
class _Result:
    """Accumulated results of a block; tokens are written as they come."""

    token_extents: list[_Extent]  # [key]
    token_counts: list[list[int]]  # [key][document]
    text_sizes: list[int] = field(default_factory=list)  # [document], bytes
    hashes: list[bytes] = field(default_factory=list)
    bad: list[str] = field(default_factory=list)
    bad_count: int = 0
    documents_outside_character_limits: int = 0
    documents_outside_token_limits: int = 0


class Encoder:
    """Tokenizes blocks into one shard. Used by one process."""

    def __init__(self, settings: PreprocessSettings, shard: Path):
        self.settings = settings
        self.tokenizer = build_tokenizer(settings.tokenizer)
        self._name = shard.name
        self._beginning = np.array(self.tokenizer.beginning, self.tokenizer.dtype)
        eod_ids = [self.tokenizer.eod_id] if settings.append_eod else []
        self._eod = np.array(eod_ids, self.tokenizer.dtype)
        self._stack = ExitStack()
        self._bins = [
            self._create(f"{shard}.{number}.bin") for number in range(len(settings.json_keys))
        ]
        self._meta = self._create(f"{shard}.meta")
        self._journal = self._create(f"{shard}.journal")

    def _create(self, path: str) -> BinaryIO:
        """Create a file, open until `close`.

        Raises FileExistsError if it exists, since it would be another worker's.
        """
        return self._stack.enter_context(open(path, "xb"))

    def close(self) -> None:
        """Close the shard's files."""
        self._stack.close()

    def encode(self, block: Block) -> Record:
        """Tokenize a block, append it to the shard, and return its journal record.

        Holds about a megabyte of text in memory at a time.
        """
        extents = [_Extent(file) for file in self._bins]
        result = _Result(extents, token_counts=[[] for _ in extents])
        for batch in _batches(self._good_documents(block, result)):
            self._encode_batch(batch, result)
        return self._finish(block, result)

    def _good_documents(self, block: Block, result: _Result) -> Iterator[Document]:
        """Yield documents within the length limits; count the rest in `result`."""
        settings = self.settings
        documents = read_documents(
            block, settings.json_keys, settings.unicode, settings.largest_document
        )
        try:
            for document in documents:
                if isinstance(document, BadDocument):
                    result.bad_count += 1
                    if len(result.bad) < _BAD_EXAMPLES:
                        place = describe_place(block, document.place)
                        result.bad.append(f"{place}: {document.reason}")
                elif settings.limits.refuses_text(document.texts):
                    result.documents_outside_character_limits += 1
                else:
                    yield document
        except DataError as error:
            # The remainder of the file is unreadable; count it as one bad document.
            result.bad_count += 1
            result.bad.append(str(error))

    def _encode_batch(self, batch: list[Document], result: _Result) -> None:
        """Tokenize documents together, and write the tokens of those within the limits."""
        ids_by_key = []
        for key in range(len(self.settings.json_keys)):
            texts = [document.texts[key] for document in batch]
            ids_by_key.append(self.tokenizer.encode_batch(texts))

        # Drop a document under all keys, to keep the keys aligned.
        accepted: list[list[np.ndarray]] = [[] for _ in ids_by_key]  # ids [key][document]
        for row, document in enumerate(batch):
            document_ids = [ids[row] for ids in ids_by_key]
            if self.settings.limits.refuses_tokens([len(ids) for ids in document_ids]):
                result.documents_outside_token_limits += 1
                continue
            result.text_sizes.append(sum(map(_utf8_size, document.texts)))
            if self.settings.deduplicate:
                result.hashes.append(content_hash(document.texts))
            for column, ids in zip(accepted, document_ids, strict=True):
                column.append(ids)

        for extent, counts, column in zip(
            result.token_extents, result.token_counts, accepted, strict=True
        ):
            arrays = []
            for ids in column:
                # An empty document stays empty: neither a beginning nor an end is added.
                if len(ids):
                    arrays += [self._beginning, ids, self._eod]
                    counts.append(len(self._beginning) + len(ids) + len(self._eod))
                else:
                    counts.append(0)
            extent.write(np.concatenate(arrays).tobytes() if arrays else b"")

    def _finish(self, block: Block, result: _Result) -> Record:
        """Write the block's metadata, then its journal line; returns the record."""
        meta = _Extent(self._meta)
        meta.write(np.array(result.text_sizes, "<u8").tobytes())
        for counts in result.token_counts:
            meta.write(np.array(counts, "<u4").tobytes())
        meta.write(b"".join(result.hashes))
        record: Record = {
            "unit": block.unit,
            "part": block.part,
            "shard": self._name,
            "documents": len(result.text_sizes),
            "text_bytes": sum(result.text_sizes),
            "disk_bytes": block.disk_bytes,
            "tokens": sum(map(sum, result.token_counts)),
            "bad_count": result.bad_count,
            "bad": result.bad,
            # These two keys count documents, not characters or tokens.
            "dropped_characters": result.documents_outside_character_limits,
            "dropped_tokens": result.documents_outside_token_limits,
            "meta": meta.finish(),
            "bins": [extent.finish() for extent in result.token_extents],
        }
        # This line commits the block; all data that it refers to is already flushed.
        self._journal.write(journal_line(record))
        self._journal.flush()
        return record


def _utf8_size(text: str) -> int:
    """Bytes of a text in UTF-8."""
    # An ASCII text need not be encoded to be measured.
    return len(text) if text.isascii() else len(text.encode())


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Group documents into batches of about _BATCH_CHARACTERS characters."""
    batch: list[Document] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += sum(map(len, document.texts))
        if size >= _BATCH_CHARACTERS:
            yield batch
            batch = []
            size = 0
    if batch:
        yield batch

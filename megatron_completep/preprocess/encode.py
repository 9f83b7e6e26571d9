"""What a worker does with a block: read, clean, tokenize, and append the result to its own shard.

A shard is three kinds of append-only files in the work folder. `NAME.KEY.bin`: tokens. `NAME.meta`: per block, for its documents,
text sizes (uint64 bytes), token counts (uint32 a key), and hashes (16 bytes) when documents are de-duplicated. `NAME.journal`: one line
a finished block, written last, that says where the block's pieces lie and their checksums (see journal.py). A block without a
whole journal line does not exist, so a killed worker leaves nothing that could be taken for a result.
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

_BATCH_CHARACTERS = 1 << 20
_BAD_EXAMPLES = 10  # described a block; all are counted


class _Piece:
    """What one block appends to one file: written as it comes, described by offset, size and xxh3 at the end."""

    def __init__(self, file: BinaryIO):
        self._file = file
        self._digest = xxhash.xxh3_64()
        self._offset = file.tell()

    def write(self, raw: bytes) -> None:
        self._file.write(raw)
        self._digest.update(raw)

    def finish(self) -> tuple[int, int, str]:
        self._file.flush()  # in the kernel's hands before the journal names it: kill -9 cannot take it back
        return self._offset, self._file.tell() - self._offset, self._digest.hexdigest()


@dataclass
class _Result:
    """What is known of a block's documents so far; tokens are on disk already."""

    bins: list[_Piece]
    counts: list[list[int]]  # tokens [key][document]
    sizes: list[int] = field(default_factory=list)
    hashes: list[bytes] = field(default_factory=list)
    bad: list[str] = field(default_factory=list)
    bad_count: int = 0
    dropped_characters: int = 0
    dropped_tokens: int = 0


class Encoder:
    """Tokenizes blocks into one shard. Used by one process."""

    def __init__(self, settings: PreprocessSettings, shard: Path):
        self.settings = settings
        self.tokenizer = build_tokenizer(settings.tokenizer)
        self._name = shard.name
        self._eod = np.array(
            [self.tokenizer.eod_id] if settings.append_eod else [], self.tokenizer.dtype
        )
        self._stack = ExitStack()
        names = [f"{shard}.{number}.bin" for number in range(len(settings.json_keys))] + [
            f"{shard}.meta",
            f"{shard}.journal",
        ]
        *self._bins, self._meta, self._journal = [
            self._stack.enter_context(open(name, "xb")) for name in names  # noqa: SIM115
        ]

    def close(self) -> None:
        self._stack.close()

    def encode(self, block: Block) -> Record:
        """Tokenize a block, append it to the shard, and return its journal line. Memory: one batch of about a megabyte of text."""
        result = _Result([_Piece(file) for file in self._bins], [[] for _ in self._bins])
        for batch in _batches(self._good_documents(block, result)):
            self._encode_batch(batch, result)
        return self._finish(block, result)

    def _good_documents(self, block: Block, result: _Result) -> Iterator[Document]:
        """Documents within the limits of length; counts the others."""
        documents = read_documents(
            block, self.settings.json_keys, self.settings.unicode, self.settings.largest_document
        )
        try:
            for document in documents:
                if isinstance(document, BadDocument):
                    result.bad_count += 1
                    if len(result.bad) < _BAD_EXAMPLES:
                        result.bad.append(
                            f"{describe_place(block, document.place)}: {document.reason}"
                        )
                elif self.settings.limits.refuses_text(document.texts):
                    result.dropped_characters += 1
                else:
                    yield document
        except DataError as error:  # the rest of the file is lost: counts as one
            result.bad_count += 1
            result.bad.append(str(error))

    def _encode_batch(self, batch: list[Document], result: _Result) -> None:
        columns = [
            self.tokenizer.encode_batch([document.texts[key] for document in batch])
            for key in range(len(self.settings.json_keys))
        ]
        kept: list[list[np.ndarray]] = [[] for _ in columns]
        for document, ids in zip(batch, zip(*columns, strict=True), strict=True):
            if self.settings.limits.refuses_tokens([len(i) for i in ids]):
                result.dropped_tokens += 1
                continue
            result.sizes.append(
                sum(len(text) if text.isascii() else len(text.encode()) for text in document.texts)
            )
            if self.settings.deduplicate:
                result.hashes.append(content_hash(document.texts))
            for column, tokens in zip(kept, ids, strict=True):
                column.append(tokens)
        for piece, counts, column in zip(result.bins, result.counts, kept, strict=True):
            # As in Megatron, an empty document stays empty: it gets no end-of-document token.
            counts += [len(tokens) + len(self._eod) if len(tokens) else 0 for tokens in column]
            parts = [part for tokens in column if len(tokens) for part in (tokens, self._eod)]
            piece.write(np.concatenate(parts).tobytes() if parts else b"")

    def _finish(self, block: Block, result: _Result) -> Record:
        meta = _Piece(self._meta)
        meta.write(np.array(result.sizes, "<u8").tobytes())
        for counts in result.counts:
            meta.write(np.array(counts, "<u4").tobytes())
        meta.write(b"".join(result.hashes))
        record: Record = {
            "unit": block.unit,
            "part": block.part,
            "shard": self._name,
            "documents": len(result.sizes),
            "text_bytes": sum(result.sizes),
            "disk_bytes": block.disk_bytes,
            "tokens": sum(map(sum, result.counts)),
            "bad_count": result.bad_count,
            "bad": result.bad,
            "dropped_characters": result.dropped_characters,
            "dropped_tokens": result.dropped_tokens,
            "meta": meta.finish(),
            "bins": [piece.finish() for piece in result.bins],
        }
        self._journal.write(journal_line(record))
        self._journal.flush()
        return record


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += sum(map(len, document.texts))
        if size >= _BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch

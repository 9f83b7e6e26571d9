"""From finished blocks to token files: pieces are checked, copied in document order, and duplicates left out."""

import os
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_completep.data.tokenizer import Tokenizer, lasting_model
from megatron_completep.data.writer import IndexedWriter
from megatron_completep.preprocess.encode import Record
from megatron_completep.preprocess.quality import first_occurrences
from megatron_completep.preprocess.report import LengthStatistics
from megatron_completep.preprocess.work import Meta, WorkFolder

Mask = npt.NDArray[np.bool_]
OnBlock = Callable[[int], None]


def merge(
    work: WorkFolder, tokenizer: Tokenizer, on_block: OnBlock
) -> tuple[list[dict[str, Any]], LengthStatistics, int]:
    """Write each key's token files. Returns their PREFIX.json contents, statistics of the kept documents, and the number of duplicates.

    on_block is told the number of tokens copied. Memory: one block, and while duplicates are looked for one byte a document.
    """
    keep = _without_duplicates(work) if work.settings.deduplicate else None
    statistics = LengthStatistics(len(work.settings.json_keys))
    sidecars = []
    for key, prefix in enumerate(work.settings.output_prefixes()):
        writer = IndexedWriter(prefix, tokenizer.dtype)
        try:
            for record, meta, kept in _kept(work, keep):
                counts = meta.tokens[key].astype(np.int64)
                for run, tokens in work.read_tokens(record, key, counts, tokenizer.dtype):
                    _copy(writer, tokens, counts[run], kept[run])
                if key == 0:
                    statistics.add(meta.text_bytes[kept], meta.tokens[:, kept])
                on_block(int(counts.sum()))
            settings = work.settings
            more = {
                "tokenizer_path": lasting_model(settings.tokenizer),
                "append_eod": settings.append_eod,
            }
            sidecars.append(writer.close(tokenizer=dict(tokenizer.identity()), **more))
        except BaseException:
            writer.abort()
            raise
    return sidecars, statistics, 0 if keep is None else int((~keep).sum())


def _without_duplicates(work: WorkFolder) -> Mask:
    """One entry a document. The hashes go through a file, since they may be larger than memory."""
    with tempfile.TemporaryFile(dir=work.path) as file:
        for record in work.ordered():
            hashes = work.read_meta(record).hashes
            assert hashes is not None
            file.write(hashes.tobytes())
        file.flush()
        if not os.fstat(file.fileno()).st_size:
            return np.ones(0, bool)
        return first_occurrences(np.memmap(file, "<u8", "r").reshape(-1, 2))


def _kept(work: WorkFolder, keep: Mask | None) -> Iterator[tuple[Record, Meta, Mask]]:
    start = 0
    for record in work.ordered():
        end = start + record["documents"]
        yield (
            record,
            work.read_meta(record),
            np.ones(end - start, bool) if keep is None else keep[start:end],
        )
        start = end


def _copy(
    writer: IndexedWriter, tokens: npt.NDArray[Any], counts: npt.NDArray[np.int64], kept: Mask
) -> None:
    """Append the kept documents among these."""
    if not kept.all():
        tokens, counts = tokens[np.repeat(kept, counts)], counts[kept]
    if counts.all():
        writer.add_documents(tokens, counts)
        return
    for count, end in zip(
        counts, np.cumsum(counts), strict=True
    ):  # as in Megatron, an empty document has no sequence
        writer.add_document([tokens[end - count : end]] if count else [])

"""From finished blocks to token files.

The blocks are checked and copied in document order, and duplicates are left out.
"""

import os
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_completep.data.beginning import FIELD
from megatron_completep.data.tokenizer import Tokenizer, lasting_model
from megatron_completep.data.writer import IndexedWriter
from megatron_completep.preprocess.journal import Record
from megatron_completep.preprocess.quality import first_occurrences
from megatron_completep.preprocess.report import LengthStatistics
from megatron_completep.preprocess.work import Meta, WorkFolder

Mask = npt.NDArray[np.bool_]
OnBlock = Callable[[int], None]


def merge(
    work: WorkFolder, tokenizer: Tokenizer, on_block: OnBlock
) -> tuple[list[dict[str, Any]], LengthStatistics, int]:
    """Write each key's token files.

    Returns (the files' PREFIX.json contents, statistics of the kept documents, the number of
    duplicates). on_block is told the number of tokens copied. Memory: one block, and while
    duplicates are looked for one byte a document.
    """
    # Documents are the same under all keys: one mask serves every token file.
    settings = work.settings
    keep = _without_duplicates(work) if settings.deduplicate else None
    statistics = LengthStatistics(len(settings.json_keys))
    sidecars = []
    for key, prefix in enumerate(settings.output_prefixes()):
        writer = IndexedWriter(prefix, tokenizer.dtype)
        try:
            for record, meta, mask in _masked_blocks(work, keep):
                counts = meta.tokens[key].astype(np.int64)
                for run, tokens in work.read_tokens(record, key, counts, tokenizer.dtype):
                    _copy(writer, tokens, counts[run], mask[run])
                # Each pass over the blocks sees the lengths under all keys: one pass counts.
                if key == 0:
                    statistics.add(meta.text_bytes[mask], meta.tokens[:, mask])
                on_block(int(counts.sum()))
            sidecar = writer.close(
                tokenizer=dict(tokenizer.identity()),
                tokenizer_path=lasting_model(settings.tokenizer),
                append_eod=settings.append_eod,
                **{FIELD: list(tokenizer.beginning)},
            )
            sidecars.append(sidecar)
        except BaseException:
            writer.abort()
            raise
    duplicates = 0 if keep is None else int((~keep).sum())
    return sidecars, statistics, duplicates


def _without_duplicates(work: WorkFolder) -> Mask:
    """Which documents are the first with their texts; one entry a document.

    The hashes go through a file, since they may be larger than memory.
    """
    with tempfile.TemporaryFile(dir=work.path) as file:
        for record in work.ordered():
            hashes = work.read_meta(record).hashes
            assert hashes is not None
            file.write(hashes.tobytes())
        file.flush()
        # An empty file cannot be mapped.
        if not os.fstat(file.fileno()).st_size:
            return np.ones(0, bool)
        return first_occurrences(np.memmap(file, "<u8", "r").reshape(-1, 2))


def _masked_blocks(work: WorkFolder, keep: Mask | None) -> Iterator[tuple[Record, Meta, Mask]]:
    """(record, meta, which documents are kept) of each block, in document order."""
    start = 0
    for record in work.ordered():
        end = start + record["documents"]
        mask = np.ones(end - start, bool) if keep is None else keep[start:end]
        yield record, work.read_meta(record), mask
        start = end


def _copy(
    writer: IndexedWriter, tokens: npt.NDArray[Any], counts: npt.NDArray[np.int64], mask: Mask
) -> None:
    """Append the kept documents among these, which have `counts` tokens each."""
    if not mask.all():
        tokens = tokens[np.repeat(mask, counts)]
        counts = counts[mask]
    # The fast way takes documents of one sequence each.
    if counts.all():
        writer.add_documents(tokens, counts)
        return
    for count, end in zip(counts, np.cumsum(counts), strict=True):
        # As in Megatron, an empty document has no sequence.
        writer.add_document([tokens[end - count : end]] if count else [])

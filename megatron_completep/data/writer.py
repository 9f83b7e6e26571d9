"""Writes, merges and splits token files; nothing that looks valid exists before the last rename."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from megatron_completep.data.beginning import FIELD, common_beginning
from megatron_completep.data.files import printable
from megatron_completep.data.indexed import (
    BLOCK_BYTES,
    CHUNK,
    DTYPES,
    HEADER,
    MAGIC,
    SIDECAR_FORMAT,
    VERSION,
    Array,
    IndexedDataset,
    hash_file,
)
from megatron_completep.errors import DataError

INT32_MAX = np.iinfo(np.int32).max
# What is said of two recorded tokenizers that differ, beside their types and models.
_IDENTIFYING = ("vocab_size", "hash", "eod_id")


class IndexedWriter:
    """Streams documents into PREFIX.bin, PREFIX.idx and PREFIX.json.

    Memory does not grow with the corpus. Everything goes to `*.partial` files. `close` completes
    and renames them, the index last: a reader sees all or nothing. As a context manager it closes
    at the end of the block and removes the partial files when the block raises. Raises DataError
    for a token that the dtype cannot hold and for a sequence longer than int32 counts.
    """

    def __init__(self, prefix: str | Path, dtype: npt.DTypeLike) -> None:
        self.prefix = str(prefix)
        self.dtype = np.dtype(dtype).newbyteorder("<")
        codes = [code for code, storable in DTYPES.items() if storable == self.dtype]
        if not codes:
            names = [storable.name for storable in DTYPES.values()]
            raise DataError(
                f"{self.prefix}: dtype {self.dtype} cannot be stored; use one of {names}."
            )
        self._code = codes[0]

        # All three stay open until `close` or `abort`. The third counts the sequences of each
        # document, int64: the index needs them after the lengths and pointers of all sequences.
        Path(self.prefix).parent.mkdir(parents=True, exist_ok=True)
        self._bin = open(self.prefix + ".bin.partial", "wb")  # noqa: SIM115
        self._idx = open(self.prefix + ".idx.partial", "w+b")  # noqa: SIM115
        self._counts = open(self.prefix + ".documents.partial", "w+b")  # noqa: SIM115
        # The header comes last: without it the file is no index.
        self._idx.write(bytes(HEADER.size))
        self._digest = xxhash.xxh3_64()
        self.num_documents = 0
        self.num_sequences = 0
        self.num_tokens = 0
        self.longest_document = 0
        self.largest_id = -1

    def __enter__(self) -> IndexedWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()

    def add_document(self, sequences: Iterable[npt.ArrayLike]) -> None:
        """Append one document: a list of sequences, each 1-D token ids.

        No sequence at all is an empty document.
        """
        arrays = [self._cast(np.asarray(sequence)) for sequence in sequences]
        lengths = np.fromiter((len(array) for array in arrays), np.int64, len(arrays))
        self._append(arrays, lengths, np.array([len(arrays)], np.int64))
        self.longest_document = max(self.longest_document, int(lengths.sum()))

    def add_documents(self, tokens: npt.ArrayLike, lengths: npt.ArrayLike) -> None:
        """Append many documents of one sequence each.

        tokens: of all documents, one after another. lengths: of each, in tokens.
        """
        flat = self._cast(np.asarray(tokens))
        sizes = np.asarray(lengths, dtype=np.int64)
        if len(sizes) == 0:
            return
        total = int(sizes.sum())
        if total != len(flat) or int(sizes.min()) < 0:
            raise DataError(
                f"{self.prefix}: {len(flat)} tokens were handed over, "
                f"but the documents' lengths sum to {total}."
            )
        self._append([flat], sizes, np.ones(len(sizes), np.int64))
        self.longest_document = max(self.longest_document, int(sizes.max()))

    def append(
        self, dataset: IndexedDataset, first_document: int = 0, last_document: int | None = None
    ) -> None:
        """Copy documents first..last-1 of other token files, without looking at single tokens."""
        if dataset.dtype != self.dtype:
            raise DataError(
                f"{dataset.idx_path}: dtype code: {dataset.dtype.name} tokens cannot go into "
                f"{self.prefix}, which has {self.dtype.name}."
            )
        if dataset.modes is not None:
            raise DataError(
                f"{dataset.idx_path}: modes: multimodal token files cannot be merged or split."
            )
        if last_document is None:
            last_document = dataset.num_documents

        # Block by block, so that memory does not grow with the corpus.
        begin = dataset.token_offset(first_document)
        end = dataset.token_offset(last_document)
        block_tokens = BLOCK_BYTES // self.dtype.itemsize
        for start in range(begin, end, block_tokens):
            self._write_tokens(dataset.tokens[start : min(start + block_tokens, end)])

        first_sequence = int(dataset.document_indices[first_document])
        end_sequence = int(dataset.document_indices[last_document])
        with dataset.reading_everything():
            for start in range(first_sequence, end_sequence, CHUNK):
                stop = min(start + CHUNK, end_sequence)
                self._idx.write(dataset.lengths[start:stop].tobytes())
            for start in range(first_document, last_document, CHUNK):
                stop = min(start + CHUNK, last_document)
                indices = dataset.document_indices[start : stop + 1]
                self._counts.write(np.diff(indices).astype("<i8").tobytes())
                document_lengths = np.diff(dataset.sequence_offsets(indices))
                self.longest_document = max(self.longest_document, int(document_lengths.max()))
        self.num_sequences += end_sequence - first_sequence
        self.num_documents += last_document - first_document

    def _cast(self, tokens: Array) -> Array:
        """Tokens in the stored type; refuses what does not fit instead of wrapping it."""
        if tokens.ndim != 1:
            raise DataError(
                f"{self.prefix}: document {self.num_documents}: "
                f"a sequence must be 1-D token ids, found shape {tokens.shape}."
            )
        if tokens.dtype == self.dtype or len(tokens) == 0:
            return tokens.astype(self.dtype, copy=False)
        bounds = np.iinfo(self.dtype)
        # The cast would wrap around without a word, so the extremes are compared first.
        largest = int(tokens.max())
        worst = largest if largest > bounds.max else int(tokens.min())
        if not bounds.min <= worst <= bounds.max:
            raise DataError(
                f"{self.prefix}: document {self.num_documents}: "
                f"token id {worst} does not fit {self.dtype.name}. Choose a wider dtype."
            )
        return tokens.astype(self.dtype)

    def _append(
        self, arrays: Sequence[Array], lengths: Array, sequences_per_document: Array
    ) -> None:
        """Write documents; lengths: of every sequence, in tokens."""
        if len(lengths) and int(lengths.max()) > INT32_MAX:
            raise DataError(
                f"{self.prefix}: document {self.num_documents}: "
                f"a sequence of {int(lengths.max())} tokens; at most {INT32_MAX} fit."
            )
        for tokens in arrays:
            self._write_tokens(tokens)
        self._idx.write(lengths.astype("<i4").tobytes())
        self._counts.write(sequences_per_document.astype("<i8").tobytes())
        self.num_sequences += len(lengths)
        self.num_documents += len(sequences_per_document)

    def _write_tokens(self, tokens: Array) -> None:
        if len(tokens) == 0:
            return
        raw = np.ascontiguousarray(tokens).view(np.uint8).data
        self._bin.write(raw)
        self._digest.update(raw)
        self.num_tokens += len(tokens)
        self.largest_id = max(self.largest_id, int(tokens.max()))

    def close(self, tokenizer: dict[str, Any] | None = None, **extra: Any) -> dict[str, Any]:
        """Complete the files and rename them into place; returns the content of PREFIX.json.

        tokenizer: what describes the tokenizer (type, model, hash, vocab_size, ...). extra: further
        JSON fields.
        """
        self._write_pointers()
        self._write_document_indices()
        entries = self.num_documents + 1
        header = HEADER.pack(MAGIC, VERSION, self._code, self.num_sequences, entries)
        self._idx.seek(0)
        self._idx.write(header)
        # On the disk before they are renamed: a power cut must not leave names without content.
        for file in (self._bin, self._idx):
            file.flush()
            os.fsync(file.fileno())
            file.close()
        self._counts.close()
        Path(self._counts.name).unlink()

        bin_record = {
            "bytes": self.num_tokens * self.dtype.itemsize,
            "xxh3_64": self._digest.hexdigest(),
        }
        idx_record = {
            "bytes": Path(self._idx.name).stat().st_size,
            "xxh3_64": hash_file(self._idx.name),
        }
        sidecar = {
            "format": SIDECAR_FORMAT,
            "version": 1,
            "documents": self.num_documents,
            "sequences": self.num_sequences,
            "tokens": self.num_tokens,
            "longest_document": self.longest_document,
            "largest_id": self.largest_id,
            "dtype": self.dtype.name,
            "bin": bin_record,
            "idx": idx_record,
            "tokenizer": tokenizer,
            **extra,
        }
        self._publish(sidecar)
        return sidecar

    def abort(self) -> None:
        """Remove the partial files."""
        for file in (self._bin, self._idx, self._counts):
            file.close()
            with suppress(FileNotFoundError):
                Path(file.name).unlink()

    def _write_pointers(self) -> None:
        """Append the byte at which each sequence begins, from the lengths that are written."""
        itemsize = self.dtype.itemsize
        offset = 0
        for start in range(0, self.num_sequences, CHUNK):
            count = min(CHUNK, self.num_sequences - start)
            lengths = np.fromfile(self._at(HEADER.size + 4 * start), "<i4", count)
            sizes = lengths.astype(np.int64) * itemsize
            ends = offset + np.cumsum(sizes)
            # Reading and writing share one position in the file.
            self._idx.seek(0, os.SEEK_END)
            self._idx.write((ends - sizes).astype("<i8").tobytes())
            offset = int(ends[-1])

    def _at(self, position: int) -> Any:
        """The index, flushed and ready to be read at a position."""
        self._idx.flush()
        self._idx.seek(position)
        return self._idx

    def _write_document_indices(self) -> None:
        """Append the first sequence of each document, and the end of the last one."""
        self._counts.seek(0)
        self._idx.seek(0, os.SEEK_END)
        self._idx.write(np.zeros(1, "<i8").tobytes())
        total = 0
        while block := self._counts.read(8 * CHUNK):
            indices = total + np.cumsum(np.frombuffer(block, "<i8"))
            self._idx.write(indices.astype("<i8").tobytes())
            total = int(indices[-1])

    def _publish(self, sidecar: dict[str, Any]) -> None:
        """Rename into place, so that no moment shows a pair of old and new files.

        The old index goes first and the new one comes last.
        """
        json_path = self.prefix + ".json"
        with open(json_path + ".partial", "w", encoding="utf-8") as file:
            json.dump(sidecar, file, indent=1, sort_keys=False)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        # From here to the last rename there is no index, so a reader finds no corpus.
        for stale in (self.prefix + ".idx", json_path):
            with suppress(FileNotFoundError):
                Path(stale).unlink()
        Path(self._bin.name).replace(self.prefix + ".bin")
        Path(json_path + ".partial").replace(json_path)
        Path(self._idx.name).replace(self.prefix + ".idx")
        # The folder holds the names: only with it on the disk do the renames survive a power cut.
        folder = os.open(Path(self.prefix).parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)


def merge(prefixes: Sequence[str | Path], output: str | Path) -> dict[str, Any]:
    """Concatenate token files in the given order; returns the new PREFIX.json.

    Raises DataError where types, recorded tokenizers or recorded beginnings differ, and where the
    output is one of the inputs.
    """
    datasets = [IndexedDataset(prefix) for prefix in prefixes]
    if not datasets:
        raise DataError("merge: no input prefix was given.")
    _refuse_overwrite(datasets, [output])
    tokenizer = _common_tokenizer(datasets)
    extra = _common_extra(datasets)
    # `close` needs the sidecar's fields, so the writer is no context manager here.
    writer = IndexedWriter(output, datasets[0].dtype)
    try:
        for dataset in datasets:
            writer.append(dataset)
        return writer.close(tokenizer=tokenizer, **extra)
    except BaseException:
        writer.abort()
        raise


def split(
    prefix: str | Path, shares: Sequence[float], outputs: Sequence[str | Path]
) -> list[dict[str, Any]]:
    """Cut token files into consecutive runs of whole documents with the given shares.

    Returns the new PREFIX.json contents. Raises DataError where shares and outputs do not fit each
    other, and where an output is the input.
    """
    dataset = IndexedDataset(prefix)
    if len(shares) != len(outputs) or not shares or min(shares) < 0 or sum(shares) <= 0:
        shares_text = ", ".join(f"{share:g}" for share in shares)
        raise DataError(
            f"split: {len(outputs)} outputs for the shares {shares_text}. "
            "Give one share of at least 0 for each output, not all of them 0."
        )
    _refuse_overwrite([dataset], outputs)

    # Cumulative shares are rounded, not single ones: together the outputs hold every document once.
    edges = np.cumsum([0.0, *shares]) / sum(shares)
    bounds = [round(float(edge) * dataset.num_documents) for edge in edges]
    tokenizer = _common_tokenizer([dataset])
    extra = _common_extra([dataset])
    contents = []
    for output, (begin, end) in zip(outputs, pairwise(bounds), strict=True):
        writer = IndexedWriter(output, dataset.dtype)
        try:
            writer.append(dataset, begin, end)
            contents.append(writer.close(tokenizer=tokenizer, **extra))
        except BaseException:
            writer.abort()
            raise
    return contents


def _refuse_overwrite(datasets: Sequence[IndexedDataset], outputs: Sequence[str | Path]) -> None:
    sources = {os.path.realpath(dataset.idx_path) for dataset in datasets}
    for output in outputs:
        if os.path.realpath(f"{output}.idx") in sources:
            raise DataError(
                f"{output}: is an input as well as an output. Choose another output prefix."
            )


def _common_tokenizer(datasets: Sequence[IndexedDataset]) -> dict[str, Any] | None:
    """The tokenizer that all files record; None where one of them records none.

    Raises DataError where two record different ones.
    """
    recorded = []
    for dataset in datasets:
        tokenizer = (dataset.sidecar or {}).get("tokenizer")
        if tokenizer:
            recorded.append((dataset.prefix, tokenizer))
    if not recorded:
        return None

    first_prefix, first_tokenizer = recorded[0]
    for prefix, tokenizer in recorded[1:]:
        # The same tokenizer may lie at several paths.
        if {**tokenizer, "model": None} != {**first_tokenizer, "model": None}:
            raise DataError(
                f"{prefix}.json: tokenizer: {_described(tokenizer)}, but {first_prefix} was made "
                f"with {_described(first_tokenizer)}. Token ids of two tokenizers cannot be mixed."
            )
    return first_tokenizer if len(recorded) == len(datasets) else None


def _described(tokenizer: dict[str, Any]) -> str:
    """A recorded tokenizer in words; a record of another program may lack any of the fields."""
    model = tokenizer.get("model")
    of_model = "" if model is None else f" {printable(str(model))}"
    fields = [f"{name} {tokenizer[name]}" for name in _IDENTIFYING if name in tokenizer]
    return f"{tokenizer.get('type', 'unknown type')}{of_model} ({', '.join(fields)})"


def _common_extra(datasets: Sequence[IndexedDataset]) -> dict[str, Any]:
    """Further fields of PREFIX.json that hold for all files: where the tokenizer lay, beginnings.

    Raises DataError where documents begin differently.
    """
    extra: dict[str, Any] = {}
    for dataset in datasets:
        path = (dataset.sidecar or {}).get("tokenizer_path")
        if path is not None:
            extra.setdefault("tokenizer_path", path)
    beginning = common_beginning([(dataset.prefix, dataset.sidecar) for dataset in datasets])
    if beginning is not None:
        extra[FIELD] = list(beginning)
    ends = {(dataset.sidecar or {}).get("append_eod") for dataset in datasets}
    if len(ends) == 1 and ends != {None}:
        extra["append_eod"] = ends.pop()
    return extra

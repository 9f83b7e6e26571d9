"""Megatron-Core's sample order: exactly the samples, in the order, of its GPTDataset and BlendedDataset (checked against 0.16.1).

Unlike the order of `samples.py` this one shuffles documents before packing and needs tables proportional to the run: which sequence
comes when (document_index), where each sample begins (sample_index), and in which order samples are read (shuffle_index). They are built in
memory, or mapped from the folder PREFIX_indices that `prebuild` (tools/dataset.py) has filled on this machine.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Sequence
from itertools import pairwise
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from megatron_completep.config.schema import SourceConfig
from megatron_completep.data.indexed import Array, IndexedDataset
from megatron_completep.data.samples import Sample, Span
from megatron_completep.errors import DataError

SEPARATE_BELOW = 0.80  # a last epoch that is needed to less than this share is shuffled by itself
SURPLUS = 0.005  # a blend's sources are built this much longer than their share
Tables = dict[str, Array]


class MegatronSource:
    """Samples of one token file as GPTDataset gives them. num_samples None: one epoch. sequences: the range first..last-1 of the split."""

    def __init__(
        self, dataset: IndexedDataset, seq_length: int, seed: int, num_samples: int | None, sequences: tuple[int, int] | None = None
    ) -> None:
        first, last = sequences or (0, dataset.num_sequences)
        self.dataset, self.seq_length = dataset, seq_length
        self.tokens_per_epoch = dataset.sequence_offset(last) - dataset.sequence_offset(first)
        self.samples_per_epoch = max(0, self.tokens_per_epoch - 1) // seq_length
        if self.tokens_per_epoch < 2 or (num_samples is None and self.samples_per_epoch == 0):
            raise DataError(
                f"{dataset.bin_path}: sequences {first} to {last - 1} hold {self.tokens_per_epoch} tokens, too few for a sample of "
                f"seq_length + 1 = {seq_length + 1}. Use a larger corpus, a larger split, or a smaller model.seq_length."
            )
        self._sequences, self._seed, self._num_samples = (first, last), seed, num_samples
        self.description: dict[str, Any] = {
            "sequences": [first, last],
            "seq_length": seq_length,
            "seed": seed,
            "num_samples": num_samples,
            "file": {"sequences": dataset.num_sequences, "tokens": dataset.num_tokens, "index": _index_identity(dataset)},
        }

    def build(self) -> Tables:
        """The three tables, as numpy arrays."""
        with self.dataset.reading_everything():
            return build_tables(self.dataset.lengths, *self._sequences, self.seq_length, self._num_samples, self._seed)

    def open(self) -> MegatronSource:
        """Get the tables: mapped where they are prebuilt, else built. Returns self."""
        self.tables = load_prebuilt(self.dataset.prefix, self.description) or self.build()
        return self

    def __len__(self) -> int:
        return len(self.tables["shuffle_index"])

    def locate(self, index: int) -> tuple[int, int]:
        """(epoch in which the sample begins, its number in the stream of all epochs)."""
        number = int(self.tables["shuffle_index"][index])
        return number * self.seq_length // self.tokens_per_epoch, number

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < len(self):
            raise DataError(f"{self.dataset.prefix}: order megatron has {len(self)} samples for this run, sample {index} was asked for.")
        number = self.locate(index)[1]
        (first, offset), (last, end) = self.tables["sample_index"][number : number + 2].tolist()
        spans = []
        for place in range(first, last + 1):
            sequence = int(self.tables["document_index"][place])
            begin = self.dataset.sequence_offset(sequence)
            stop = begin + (end + 1 if place == last else int(self.dataset.lengths[sequence]))
            spans.append(Span(begin + (offset if place == first else 0), stop))
        spans = [span for span in spans if span.end > span.begin]
        tokens = np.concatenate([self.dataset.read(span.begin, span.end) for span in spans])
        starts = np.cumsum([span.end - span.begin for span in spans[:-1]], dtype=np.int64)
        return Sample(tokens, tuple(spans), starts)


def build_tables(lengths: Array, first: int, last: int, seq_length: int, num_samples: int | None, seed: int) -> Tables:
    """document_index int32 [epochs * sequences], sample_index [n + 1, 2] (place in document_index, offset), shuffle_index [n]."""
    tokens = int(lengths[first:last].sum(dtype=np.int64))
    epochs = 1 if num_samples is None else max(1, ceil_div(num_samples * seq_length + 1, tokens))
    whole_epochs = ((epochs - 1) * tokens - 1) // seq_length  # samples of all epochs but the last
    separate = epochs > 1 and num_samples is not None and num_samples - whole_epochs < int(SEPARATE_BELOW * ((tokens - 1) // seq_length))
    random = np.random.RandomState(seed)

    sequences = np.arange(first, last, dtype=np.int32)
    document_index = np.tile(sequences, epochs - 1 if separate else epochs)
    random.shuffle(document_index)
    if separate:
        random.shuffle(sequences)
        document_index = np.concatenate([document_index, sequences])

    n = (epochs * tokens - 1) // seq_length
    sample_index = _sample_index(lengths[document_index], seq_length, n)

    dtype = np.int64 if n >= np.iinfo(np.uint32).max - 1 else np.uint32
    bounds = [0, whole_epochs, n] if separate else [0, n]
    shuffled = [np.arange(low, high, dtype=dtype) for low, high in pairwise(bounds)]
    for part in shuffled:
        random.shuffle(part)
    return {"document_index": document_index, "sample_index": sample_index, "shuffle_index": np.concatenate(shuffled)}


def _sample_index(lengths: Array, seq_length: int, n: int) -> Array:
    """Place and offset of token k * seq_length for k = 0 .. n, in the sequences as they follow one another."""
    ends = np.cumsum(lengths, dtype=np.int64)
    tokens = np.arange(n + 1, dtype=np.int64) * seq_length
    places = np.searchsorted(ends, tokens, side="right")
    offsets = tokens - (ends[places] - lengths[places])
    rows = np.stack([places, offsets], axis=1)
    rows[0] = 0  # Megatron starts at the first sequence even where that one is empty
    return rows.astype(np.int32 if rows.max(initial=0) <= np.iinfo(np.int32).max else np.int64)


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def blend_indices(weights: Sequence[float], size: int) -> tuple[Array, Array]:
    """Source and number within the source of every sample of a blend: at step k the source that is furthest behind weight * max(k, 1)."""
    sources, numbers = np.zeros(size, np.int16), np.zeros(size, np.int64)
    counts = [0] * len(weights)
    others = list(enumerate(weights))[1:]
    for step in range(size):
        place = float(step) if step else 1.0
        best, worst_error = 0, weights[0] * place - counts[0]
        for source, weight in others:
            error = weight * place - counts[source]
            if error > worst_error:
                best, worst_error = source, error
        sources[step], numbers[step] = best, counts[best]
        counts[best] += 1
    return sources, numbers


class MegatronBlend:
    """`blend[k]` -> (source, number within it), from the tables of `blend_indices`."""

    def __init__(self, weights: Sequence[float], size: int, prefix: str) -> None:
        self.weights, self.size, self.prefix = list(weights), size, prefix
        self.description = {"weights": self.weights, "size": size}

    def build(self) -> Tables:
        """The two tables."""
        sources, numbers = blend_indices(self.weights, self.size)
        return {"dataset_index": sources, "dataset_sample_index": numbers}

    def open(self) -> MegatronBlend:
        """Get the tables: mapped where they are prebuilt, else built. Returns self."""
        self.tables = load_prebuilt(self.prefix, self.description) or self.build()
        return self

    def __getitem__(self, index: int) -> tuple[int, int]:
        return int(self.tables["dataset_index"][index]), int(self.tables["dataset_sample_index"][index])


class SingleSource:
    """The blend of one source: its samples as they come."""

    def __getitem__(self, index: int) -> tuple[int, int]:
        return 0, index


def plan(
    configured: Sequence[SourceConfig], share: tuple[float, float] | None, *, seq_length: int, seed: int, num_samples: int
) -> tuple[list[MegatronSource], MegatronBlend | SingleSource]:
    """What Megatron-Core's dataset builder would build for these sources; no table is built yet.

    share: bounds of the split within each source (its `--split`), None where the sources belong to this split alone. A single source
    is not blended, unless it has a weight and a split. Raises DataError for sources in epochs, which Megatron does not have.
    """
    if any(source.epochs is not None for source in configured):
        raise DataError("data.order = megatron: a source is given in epochs. Give weights, or use data.order = permutation.")
    datasets = [IndexedDataset(source.prefix) for source in configured]
    sequences = [None if share is None else (round(share[0] * d.num_sequences), round(share[1] * d.num_sequences)) for d in datasets]
    if len(configured) == 1 and (share is None or configured[0].weight is None):
        return [MegatronSource(datasets[0], seq_length, seed, num_samples, sequences[0])], SingleSource()
    weights = normalize([1.0 if source.weight is None else source.weight for source in configured])
    targets = [ceil(num_samples * weight) for weight in weights]
    sources = [
        MegatronSource(dataset, seq_length, seed, ceil(target * (1 + SURPLUS)), bounds)
        for dataset, target, bounds in zip(datasets, targets, sequences, strict=True)
    ]
    return sources, MegatronBlend(normalize(weights), sum(targets), datasets[0].prefix)


def normalize(weights: Sequence[float]) -> list[float]:
    """Weights over their sum, with numpy's rounding: Megatron does it twice, and the last bit decides ties."""
    array = np.array(weights, dtype=np.float64)
    result: list[float] = (array / np.sum(array)).tolist()
    return result


def _index_identity(dataset: IndexedDataset) -> Any:
    """A hash of the index where it is known, else its lengths at a few places: tells a prebuilt table of other files."""
    recorded = ((dataset.sidecar or {}).get("idx") or {}).get("xxh3_64")
    places = np.linspace(0, dataset.num_sequences - 1, 64, dtype=np.int64)
    return recorded or xxhash.xxh3_64_hexdigest(dataset.lengths[places].tobytes())


def _prebuilt_folder(prefix: str, description: dict[str, Any]) -> Path:
    return Path(f"{prefix}_indices") / xxhash.xxh3_64_hexdigest(json.dumps(description, sort_keys=True).encode())


def load_prebuilt(prefix: str, description: dict[str, Any]) -> Tables | None:
    """Map prebuilt tables, or None where there are none for this description. Raises DataError for ones that cannot be read."""
    folder = _prebuilt_folder(prefix, description)
    if not folder.is_dir():
        return None
    try:
        content = json.loads((folder / "description.json").read_text("utf-8"))
        tables = {name: np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in content["tables"]}
        good = content["description"] == description and {n: [list(t.shape), t.dtype.name] for n, t in tables.items()} == content["tables"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{folder}: the prebuilt index cannot be read ({error}). Remove the folder, or prebuild it again.") from error
    if not good:
        raise DataError(f"{folder}: the prebuilt index is not the one its name stands for. Remove the folder, or prebuild it again.")
    return tables


def save_prebuilt(prefix: str, description: dict[str, Any], build: Callable[[], Tables]) -> tuple[Path, bool]:
    """Build tables and put them beside the token files in one rename; returns the folder and whether it was built now."""
    folder = _prebuilt_folder(prefix, description)
    if load_prebuilt(prefix, description) is not None:
        return folder, False
    partial = folder.with_name(f"{folder.name}.partial-{os.getpid()}")
    partial.mkdir(parents=True)
    try:
        tables = build()
        for name, table in tables.items():
            np.save(partial / f"{name}.npy", table, allow_pickle=False)
        shapes = {name: [list(table.shape), table.dtype.name] for name, table in tables.items()}
        (partial / "description.json").write_text(json.dumps({"description": description, "tables": shapes}, indent=1), "utf-8")
        partial.replace(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder, True

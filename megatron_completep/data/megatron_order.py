"""Megatron-Core's sample order: exactly the samples, in the order, of its GPTDataset and BlendedDataset (checked against 0.16.1).

Unlike the order of `samples.py` this one shuffles documents before packing and needs tables proportional to the run: which sequence
comes when (document_index), where each sample begins (sample_index), and in which order samples are read (shuffle_index). They are built in
memory, or mapped from the folder PREFIX_indices that `prebuild` (tools/dataset.py) has filled on this machine.

The tables depend on the number of samples that they are planned for. A run that goes on beyond it reads a second pass of as many
samples, from tables with the next seed, and so on.
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
from megatron_completep.data.files import printable, read_json, require_regular
from megatron_completep.data.indexed import Array, IndexedDataset, hash_file, require_whole
from megatron_completep.data.samples import Sample, Span
from megatron_completep.errors import DataError

SEPARATE_BELOW = 0.80  # a last epoch that is needed to less than this share is shuffled by itself
SURPLUS = 0.005  # a blend's sources are built this much longer than their share
Tables = dict[str, Array]


class MegatronSource:
    """Samples of one token file as GPTDataset gives them. num_samples None: one epoch. sequences: the range first..last-1 of the split.

    passes: tables with the seeds seed, seed + 1, ... follow one another; each gives `samples_per_pass` samples.
    """

    def __init__(
        self,
        dataset: IndexedDataset,
        seq_length: int,
        seed: int,
        num_samples: int | None,
        sequences: tuple[int, int] | None = None,
        passes: int = 1,
    ) -> None:
        first, last = sequences or (0, dataset.num_sequences)
        self.dataset, self.seq_length, self.passes = dataset, seq_length, passes
        self.tokens_per_epoch = dataset.sequence_offset(last) - dataset.sequence_offset(first)
        self.samples_per_epoch = max(0, self.tokens_per_epoch - 1) // seq_length
        if self.tokens_per_epoch < 2 or (num_samples is None and self.samples_per_epoch == 0):
            raise DataError(
                f"{dataset.bin_path}: sequences {first} to {last - 1} hold {self.tokens_per_epoch} tokens, too few for a sample of "
                f"seq_length + 1 = {seq_length + 1}. Use a larger corpus, a larger split, or a smaller model.seq_length."
            )
        self._sequences, self._seed, self._num_samples = (first, last), seed, num_samples
        self.epochs, self.separate = epochs_for(num_samples, self.tokens_per_epoch, seq_length)
        self.samples_per_pass = (self.epochs * self.tokens_per_epoch - 1) // seq_length

    def description(self, number: int = 0) -> dict[str, Any]:
        """What the tables of pass `number` (from 0) are built from."""
        file = {
            "sequences": self.dataset.num_sequences,
            "tokens": self.dataset.num_tokens,
            "index": _index_identity(self.dataset),
        }
        return {
            "sequences": list(self._sequences),
            "seq_length": self.seq_length,
            "seed": self._seed + number,
            "num_samples": self._num_samples,
            "file": file,
        }

    def order(self) -> dict[str, Any]:
        """What decides the order of the samples: two lengths of a run that agree here give the same tables."""
        return {
            "sequences": list(self._sequences),
            "seq_length": self.seq_length,
            "seed": self._seed,
            "epochs": self.epochs,
            "separate": self.separate,
        }

    def build(self, number: int = 0) -> Tables:
        """The three tables of a pass, as numpy arrays."""
        with self.dataset.reading_everything():
            lengths, seed = self.dataset.lengths, self._seed + number
            return build_tables(lengths, *self._sequences, self.seq_length, self._num_samples, seed)

    def open(self) -> MegatronSource:
        """Get the tables of the first pass: mapped where they are prebuilt, else built. Returns self."""
        self._pass = (0, self._tables_of(0))
        return self

    def _tables_of(self, number: int) -> Tables:
        return load_prebuilt(self.dataset.prefix, self.description(number)) or self.build(number)

    @property
    def tables(self) -> Tables:
        """Those of the pass that was read last."""
        return self._pass[1]

    def __len__(self) -> int:
        return self.passes * self.samples_per_pass

    def locate(self, index: int) -> tuple[int, int]:
        """(epoch in which the sample begins, its number in the stream of all epochs), counted over all passes."""
        number_of_pass, number, _ = self._find(index)
        epoch = number * self.seq_length // self.tokens_per_epoch
        return number_of_pass * self.epochs + epoch, number_of_pass * self.samples_per_pass + number

    def _find(self, index: int) -> tuple[int, int, Tables]:
        """(pass, number in the stream of its epochs, its tables)."""
        if not 0 <= index < len(self):
            raise DataError(
                f"{self.dataset.prefix}: order megatron has {len(self)} samples for this run, sample {index} was asked for."
            )
        wanted, within = divmod(index, self.samples_per_pass)
        number, tables = self._pass
        if number != wanted:
            number, tables = wanted, self._tables_of(wanted)
            self._pass = (number, tables)  # one tuple, so a second thread never sees half of it
        require_whole_tables(self.dataset.prefix, tables)
        return number, int(tables["shuffle_index"][within]), tables

    def __getitem__(self, index: int) -> Sample:
        _, number, tables = self._find(index)
        (first, offset), (last, end) = tables["sample_index"][number : number + 2].tolist()
        spans = []
        for place in range(first, last + 1):
            sequence = int(tables["document_index"][place])
            begin = self.dataset.sequence_offset(sequence)
            stop = begin + (end + 1 if place == last else int(self.dataset.lengths[sequence]))
            spans.append(Span(begin + (offset if place == first else 0), stop))
        spans = [span for span in spans if span.end > span.begin]
        tokens = np.concatenate([self.dataset.read(span.begin, span.end) for span in spans])
        starts = np.cumsum([span.end - span.begin for span in spans[:-1]], dtype=np.int64)
        return Sample(tokens, tuple(spans), starts)


def build_tables(
    lengths: Array, first: int, last: int, seq_length: int, num_samples: int | None, seed: int
) -> Tables:
    """document_index int32 [epochs * sequences], sample_index [n + 1, 2] (place in document_index, offset), shuffle_index [n]."""
    tokens = int(lengths[first:last].sum(dtype=np.int64))
    epochs, separate = epochs_for(num_samples, tokens, seq_length)
    whole_epochs = ((epochs - 1) * tokens - 1) // seq_length  # samples of all epochs but the last
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
    return {
        "document_index": document_index,
        "sample_index": sample_index,
        "shuffle_index": np.concatenate(shuffled),
    }


def epochs_for(num_samples: int | None, tokens: int, seq_length: int) -> tuple[int, bool]:
    """(epochs that hold num_samples samples of a source of `tokens` tokens, whether the last one is shuffled by itself)."""
    if num_samples is None:
        return 1, False
    epochs = max(1, ceil_div(num_samples * seq_length + 1, tokens))
    whole_epochs = ((epochs - 1) * tokens - 1) // seq_length
    return epochs, epochs > 1 and num_samples - whole_epochs < int(
        SEPARATE_BELOW * ((tokens - 1) // seq_length)
    )


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

    passes = 1

    def __init__(self, weights: Sequence[float], size: int, prefix: str) -> None:
        self.weights, self.size, self.prefix = list(weights), size, prefix

    def description(self, number: int = 0) -> dict[str, Any]:
        """What the tables are built from; every pass has the same ones."""
        return {"weights": self.weights, "size": self.size}

    def order(self, consumed_samples: int) -> dict[str, Any]:
        """What decides the first samples: each step looks at the steps before it only, so a longer blend begins like a shorter one."""
        return {"weights": self.weights}

    def build(self, number: int = 0) -> Tables:
        """The two tables."""
        sources, numbers = blend_indices(self.weights, self.size)
        return {"dataset_index": sources, "dataset_sample_index": numbers}

    def open(self) -> MegatronBlend:
        """Get the tables: mapped where they are prebuilt, else built. Returns self."""
        self.tables = load_prebuilt(self.prefix, self.description()) or self.build()
        return self

    def __getitem__(self, index: int) -> tuple[int, int]:
        require_whole_tables(self.prefix, self.tables)
        return int(self.tables["dataset_index"][index]), int(
            self.tables["dataset_sample_index"][index]
        )


class SingleSource:
    """The blend of one source: its samples as they come."""

    def order(self, consumed_samples: int) -> dict[str, Any]:
        """Nothing that decides anything."""
        return {}

    def __getitem__(self, index: int) -> tuple[int, int]:
        return 0, index


class Repeated:
    """A blend of `planned` samples, over and over: each time with the next pass of its sources."""

    def __init__(
        self, blend: MegatronBlend | SingleSource, planned: int, sources: Sequence[MegatronSource]
    ) -> None:
        self._blend, self._planned, self._sources = blend, planned, sources

    def order(self, consumed_samples: int) -> dict[str, Any]:
        """As of the blend; where a pass ends counts as soon as a run has gone beyond it."""
        passes = {"planned": self._planned} if consumed_samples > self._planned else {}
        return {**self._blend.order(consumed_samples), **passes}

    def __getitem__(self, index: int) -> tuple[int, int]:
        number_of_pass, within = divmod(index, self._planned)
        source, number = self._blend[within]
        return source, number_of_pass * self._sources[source].samples_per_pass + number


def plan(
    configured: Sequence[SourceConfig],
    share: tuple[float, float] | None,
    *,
    seq_length: int,
    seed: int,
    num_samples: int,
    passes: int = 1,
) -> tuple[list[MegatronSource], MegatronBlend | SingleSource]:
    """What Megatron-Core's dataset builder would build for these sources; no table is built yet.

    share: bounds of the split within each source (its `--split`), None where the sources belong to this split alone. A single source
    is not blended, unless it has a weight and a split. passes: how often num_samples samples are read.

    Raises DataError for sources in epochs, which Megatron does not have.
    """
    if any(source.epochs is not None for source in configured):
        raise DataError(
            "data.order = megatron: a source is given in epochs. Give weights, or use data.order = permutation."
        )
    datasets = [IndexedDataset(source.prefix) for source in configured]
    sequences = [
        None
        if share is None
        else (round(share[0] * d.num_sequences), round(share[1] * d.num_sequences))
        for d in datasets
    ]
    if len(configured) == 1 and (share is None or configured[0].weight is None):
        return [
            MegatronSource(datasets[0], seq_length, seed, num_samples, sequences[0], passes)
        ], SingleSource()
    weights = normalize([1.0 if source.weight is None else source.weight for source in configured])
    targets = [ceil(num_samples * weight) for weight in weights]
    sources = [
        MegatronSource(dataset, seq_length, seed, ceil(target * (1 + SURPLUS)), bounds, passes)
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
    return Path(f"{prefix}_indices") / xxhash.xxh3_64_hexdigest(
        json.dumps(description, sort_keys=True).encode()
    )


def load_prebuilt(prefix: str, description: dict[str, Any]) -> Tables | None:
    """Map prebuilt tables, or None where there are none for this description. Every byte of them is compared with its recorded hash.

    Raises DataError for tables that cannot be read or are not what was written.
    """
    folder = _prebuilt_folder(prefix, description)
    if not folder.is_dir():
        return None
    try:
        content = read_json(folder / "description.json")
        if content["description"] != description:
            raise DataError(
                f"{printable(folder)}: the prebuilt index is not the one its name stands for. {_REMEDY}"
            )
        if "hashes" not in content:
            raise DataError(
                f"{printable(folder)}: the prebuilt index is of an earlier version, which kept no hashes. {_REMEDY}"
            )
        return {
            name: _load_table(_table_file(folder, name), content["hashes"][name], shape)
            for name, shape in content["tables"].items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{printable(folder)}: the prebuilt index cannot be read ({error}). {_REMEDY}"
        ) from error


def _load_table(path: Path, expected: str, shape: list[Any]) -> Array:
    """Map one table. shape: its [shape, dtype]. The hash comes first: numpy reads a header by parsing it as Python."""
    require_regular(path)
    if (actual := hash_file(path)) != expected:
        raise DataError(
            f"{printable(path)}: content: xxh3_64 {actual}, but {expected} was written. {_REMEDY}"
        )
    table: Array = np.load(path, mmap_mode="r", allow_pickle=False)
    if [list(table.shape), table.dtype.name] != shape:
        raise DataError(
            f"{printable(path)}: holds {list(table.shape)} {table.dtype.name}, expected {shape}. {_REMEDY}"
        )
    return table


_REMEDY = "Remove the folder, or prebuild it again (tools/dataset.py prebuild)."


def _table_file(folder: Path, name: str) -> Path:
    return folder / f"{name}.npy"


def require_whole_tables(prefix: str, tables: Tables) -> None:
    """Raise DataError where a file that tables are mapped from has become shorter."""
    for name, table in tables.items():
        if isinstance(table, np.memmap):
            require_whole(table.base, f"{prefix}_indices: {name}.npy")


def save_prebuilt(
    prefix: str, description: dict[str, Any], build: Callable[[], Tables]
) -> tuple[Path, bool]:
    """Build tables and put them beside the token files in one rename; returns the folder and whether it was built now.

    Tables that are there are kept where they are whole, else replaced.
    """
    folder = _prebuilt_folder(prefix, description)
    try:
        if load_prebuilt(prefix, description) is not None:
            return folder, False
    except DataError:
        shutil.rmtree(folder)
    partial = folder.with_name(f"{folder.name}.partial-{os.getpid()}")
    partial.mkdir(parents=True)
    try:
        tables = build()
        for name, table in tables.items():
            np.save(_table_file(partial, name), table, allow_pickle=False)
        shapes = {name: [list(table.shape), table.dtype.name] for name, table in tables.items()}
        hashes = {name: hash_file(_table_file(partial, name)) for name in tables}
        content = {"description": description, "tables": shapes, "hashes": hashes}
        (partial / "description.json").write_text(json.dumps(content, indent=1), "utf-8")
        partial.replace(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder, True

"""Megatron-Core's sample order: the samples of its GPTDataset and BlendedDataset, in their order.

They are exactly the same (checked against 0.16.1). Unlike the order of `samples.py` this one
shuffles documents before packing and needs tables proportional to the run: which sequence comes
when (document_index), where each sample begins (sample_index), and in which order samples are read
(shuffle_index). They are built in memory, or mapped from the folder PREFIX_indices that `prebuild`
(tools/dataset.py) has filled on this machine.

The tables depend on the number of samples that they are planned for. A run that goes on beyond it
reads a second pass of as many samples, from tables with the next seed, and so on.
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

# Both numbers are Megatron's.
SEPARATE_BELOW = 0.80  # a last epoch of which less than this share is needed is shuffled by itself
SURPLUS = 0.005  # a blend's sources are built longer than their share by this fraction
Tables = dict[str, Array]

_REMEDY = "Remove the folder, or prebuild it again (tools/dataset.py prebuild)."


class MegatronSource:
    """Samples of one token file as GPTDataset gives them.

    num_samples: None: one epoch. sequences: the range first..last-1 of the split. passes: tables
    with the seeds seed, seed + 1, ... follow one another; each gives `samples_per_pass` samples.
    Raises DataError where the sequences hold no sample.
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
        self._sequences = sequences or (0, dataset.num_sequences)
        begin, end = self._sequences
        self.dataset = dataset
        self.seq_length = seq_length
        self.passes = passes
        self.tokens_per_epoch = dataset.sequence_offset(end) - dataset.sequence_offset(begin)
        self.samples_per_epoch = max(0, self.tokens_per_epoch - 1) // seq_length
        # Over several epochs even fewer tokens than a sample's make one.
        no_sample = num_samples is None and self.samples_per_epoch == 0
        if self.tokens_per_epoch < 2 or no_sample:
            raise DataError(
                f"{dataset.bin_path}: sequences {begin} to {end - 1} hold "
                f"{self.tokens_per_epoch} tokens, too few for a sample of "
                f"seq_length + 1 = {seq_length + 1}. "
                "Use a larger corpus, a larger split, or a smaller model.seq_length."
            )
        self._seed = seed
        self._num_samples = num_samples
        self.epochs, self.separate = epochs_for(num_samples, self.tokens_per_epoch, seq_length)
        self.samples_per_pass = (self.epochs * self.tokens_per_epoch - 1) // seq_length

    def description(self, number: int = 0) -> dict[str, Any]:
        """What the tables of pass `number` (from 0) are built from."""
        # The tables are kept beside the files: they must not be taken for those of other files.
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
        """What decides the order of the samples.

        Two lengths of a run that agree here give the same tables.
        """
        return {
            "sequences": list(self._sequences),
            "seq_length": self.seq_length,
            "seed": self._seed,
            "epochs": self.epochs,
            "separate": self.separate,
        }

    def build(self, number: int = 0) -> Tables:
        """The three tables of a pass, as numpy arrays."""
        begin, end = self._sequences
        seed = self._seed + number
        with self.dataset.reading_everything():
            lengths = self.dataset.lengths
            return build_tables(lengths, begin, end, self.seq_length, self._num_samples, seed)

    def open(self) -> MegatronSource:
        """Get the tables of the first pass: mapped where they are prebuilt, else built.

        Returns self. Raises DataError for prebuilt tables that are damaged.
        """
        self._pass = (0, self._tables_of(0))  # (number of the pass, its tables)
        return self

    def _tables_of(self, number: int) -> Tables:
        return load_prebuilt(self.dataset.prefix, self.description(number)) or self.build(number)

    @property
    def tables(self) -> Tables:
        """The tables of the pass that was read last."""
        return self._pass[1]

    def __len__(self) -> int:
        return self.passes * self.samples_per_pass

    def locate(self, index: int) -> tuple[int, int]:
        """(epoch in which the sample begins, its number in the stream of all epochs).

        Both are counted over all passes.
        """
        pass_number, number, _ = self._find(index)
        epoch_in_pass = number * self.seq_length // self.tokens_per_epoch
        epoch = pass_number * self.epochs + epoch_in_pass
        return epoch, pass_number * self.samples_per_pass + number

    def _find(self, index: int) -> tuple[int, int, Tables]:
        """(pass, number in the stream of its epochs, its tables). Raises DataError."""
        if not 0 <= index < len(self):
            raise DataError(
                f"{self.dataset.prefix}: order megatron has {len(self)} samples for this run, "
                f"sample {index} was asked for."
            )
        pass_number, index_in_pass = divmod(index, self.samples_per_pass)
        cached_number, tables = self._pass
        if cached_number != pass_number:
            tables = self._tables_of(pass_number)
            # One tuple, so that a second thread never sees a number with another pass's tables.
            self._pass = (pass_number, tables)
        require_whole_tables(self.dataset.prefix, tables)
        return pass_number, int(tables["shuffle_index"][index_in_pass]), tables

    def __getitem__(self, index: int) -> Sample:
        _, number, tables = self._find(index)
        # A sample lasts from its own entry to the next one, whose first token is its last label.
        entries = tables["sample_index"][number : number + 2].tolist()
        (begin_place, begin_offset), (end_place, end_offset) = entries
        spans = []
        for place in range(begin_place, end_place + 1):
            sequence = int(tables["document_index"][place])
            sequence_begin = self.dataset.sequence_offset(sequence)
            begin = sequence_begin + (begin_offset if place == begin_place else 0)
            if place == end_place:
                end = sequence_begin + end_offset + 1
            else:
                end = sequence_begin + int(self.dataset.lengths[sequence])
            # Empty sequences begin no document.
            if end > begin:
                spans.append(Span(begin, end))

        tokens = np.concatenate([self.dataset.read(span.begin, span.end) for span in spans])
        lengths = [span.end - span.begin for span in spans]
        starts = np.cumsum(lengths[:-1], dtype=np.int64)
        return Sample(tokens, tuple(spans), starts)


def build_tables(
    lengths: Array, first: int, last: int, seq_length: int, num_samples: int | None, seed: int
) -> Tables:
    """The tables of one pass over sequences first..last-1 of a token file.

    document_index: int32 [epochs * sequences]. sample_index: [n + 1, 2], (place in document_index,
    offset in tokens). shuffle_index: [n], n samples. lengths: of all sequences, in tokens.
    """
    tokens = int(lengths[first:last].sum(dtype=np.int64))
    epochs, separate = epochs_for(num_samples, tokens, seq_length)
    random = np.random.RandomState(seed)

    # The calls of the generator, and what they shuffle, must be Megatron's, one by one.
    sequences = np.arange(first, last, dtype=np.int32)
    document_index = np.tile(sequences, epochs - 1 if separate else epochs)
    random.shuffle(document_index)
    if separate:
        random.shuffle(sequences)
        document_index = np.concatenate([document_index, sequences])

    n = (epochs * tokens - 1) // seq_length
    sample_index = _sample_index(lengths[document_index], seq_length, n)

    # Samples of a last epoch that is shuffled by itself all come after those of the others.
    earlier_samples = ((epochs - 1) * tokens - 1) // seq_length
    dtype = np.int64 if n >= np.iinfo(np.uint32).max - 1 else np.uint32
    bounds = [0, earlier_samples, n] if separate else [0, n]
    ranges = [np.arange(low, high, dtype=dtype) for low, high in pairwise(bounds)]
    for samples in ranges:
        random.shuffle(samples)
    return {
        "document_index": document_index,
        "sample_index": sample_index,
        "shuffle_index": np.concatenate(ranges),
    }


def epochs_for(num_samples: int | None, tokens: int, seq_length: int) -> tuple[int, bool]:
    """(epochs that hold num_samples samples, whether the last one is shuffled by itself).

    tokens: of one epoch of the source.
    """
    if num_samples is None:
        return 1, False
    epochs = max(1, ceil_div(num_samples * seq_length + 1, tokens))
    earlier_samples = ((epochs - 1) * tokens - 1) // seq_length
    samples_of_last = num_samples - earlier_samples
    few = int(SEPARATE_BELOW * ((tokens - 1) // seq_length))
    return epochs, epochs > 1 and samples_of_last < few


def _sample_index(lengths: Array, seq_length: int, n: int) -> Array:
    """Place and offset of token k * seq_length for k = 0 .. n, [n + 1, 2].

    A place counts the sequences in the order in which `lengths` (in tokens) lists them.
    """
    ends = np.cumsum(lengths, dtype=np.int64)
    tokens = np.arange(n + 1, dtype=np.int64) * seq_length
    places = np.searchsorted(ends, tokens, side="right")
    offsets = tokens - (ends[places] - lengths[places])
    rows = np.stack([places, offsets], axis=1)
    rows[0] = 0  # Megatron starts at the first sequence even where that one is empty
    fits_int32 = rows.max(initial=0) <= np.iinfo(np.int32).max
    return rows.astype(np.int32 if fits_int32 else np.int64)


def ceil_div(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def blend_indices(weights: Sequence[float], size: int) -> tuple[Array, Array]:
    """Source and number within the source of every sample of a blend, [size] each.

    At step k it is the source that is furthest behind weight * max(k, 1).
    """
    sources = np.zeros(size, np.int16)
    numbers = np.zeros(size, np.int64)
    counts = [0] * len(weights)
    later_sources = list(enumerate(weights))[1:]
    for step in range(size):
        target = float(step) if step else 1.0
        furthest = 0
        largest_error = weights[0] * target - counts[0]
        # Of equal errors the first source's counts, as in Megatron.
        for source, weight in later_sources:
            error = weight * target - counts[source]
            if error > largest_error:
                furthest = source
                largest_error = error
        sources[step] = furthest
        numbers[step] = counts[furthest]
        counts[furthest] += 1
    return sources, numbers


class MegatronBlend:
    """`blend[k]` -> (source, number within it), from the tables of `blend_indices`."""

    passes = 1

    def __init__(self, weights: Sequence[float], size: int, prefix: str) -> None:
        self.weights = list(weights)
        self.size = size
        self.prefix = prefix

    def description(self, number: int = 0) -> dict[str, Any]:
        """What the tables are built from; every pass has the same ones."""
        return {"weights": self.weights, "size": self.size}

    def order(self, consumed_samples: int) -> dict[str, Any]:
        """What decides the first samples.

        Each step depends on the steps before it only, so a longer blend begins like a shorter one.
        """
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
        source = int(self.tables["dataset_index"][index])
        return source, int(self.tables["dataset_sample_index"][index])


class SingleSource:
    """The blend of one source: its samples as they come."""

    def order(self, consumed_samples: int) -> dict[str, Any]:
        """What decides the first samples: nothing."""
        return {}

    def __getitem__(self, index: int) -> tuple[int, int]:
        return 0, index


class Repeated:
    """A blend of `planned` samples, again and again, each time with its sources' next pass."""

    def __init__(
        self, blend: MegatronBlend | SingleSource, planned: int, sources: Sequence[MegatronSource]
    ) -> None:
        self._blend = blend
        self._planned = planned
        self._sources = sources

    def order(self, consumed_samples: int) -> dict[str, Any]:
        """As of the blend; the end of a pass counts as soon as a run has gone beyond it."""
        passes = {"planned": self._planned} if consumed_samples > self._planned else {}
        return {**self._blend.order(consumed_samples), **passes}

    def __getitem__(self, index: int) -> tuple[int, int]:
        pass_number, index_in_pass = divmod(index, self._planned)
        source, number = self._blend[index_in_pass]
        return source, pass_number * self._sources[source].samples_per_pass + number


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

    share: bounds of the split within each source (its `--split`), None where the sources belong to
    this split alone. A single source is not blended, unless it has a weight and a split. passes:
    how often num_samples samples are read.

    Raises DataError for sources in epochs, which Megatron does not have.
    """
    if any(source.epochs is not None for source in configured):
        raise DataError(
            "data.order = megatron: a source is given in epochs. "
            "Give weights, or use data.order = permutation."
        )
    datasets = [IndexedDataset(source.prefix) for source in configured]
    bounds = [split_bounds(share, dataset.num_sequences) for dataset in datasets]
    if len(configured) == 1 and (share is None or configured[0].weight is None):
        source = MegatronSource(datasets[0], seq_length, seed, num_samples, bounds[0], passes)
        return [source], SingleSource()

    # The surplus keeps a blend, whose counts deviate from the shares, within its sources.
    weights = normalize([1.0 if source.weight is None else source.weight for source in configured])
    targets = [ceil(num_samples * weight) for weight in weights]
    sources = []
    for dataset, target, sequences in zip(datasets, targets, bounds, strict=True):
        length = ceil(target * (1 + SURPLUS))
        sources.append(MegatronSource(dataset, seq_length, seed, length, sequences, passes))
    return sources, MegatronBlend(normalize(weights), sum(targets), datasets[0].prefix)


def split_bounds(share: tuple[float, float] | None, count: int) -> tuple[int, int] | None:
    """The range first..last-1 of `count` documents or sequences in a share; None: all of them."""
    if share is None:
        return None
    return round(share[0] * count), round(share[1] * count)


def normalize(weights: Sequence[float]) -> list[float]:
    """Weights over their sum, with numpy's rounding.

    Megatron does it twice for a blend, and the last bit decides ties.
    """
    array = np.array(weights, dtype=np.float64)
    normalized: list[float] = (array / np.sum(array)).tolist()
    return normalized


def _index_identity(dataset: IndexedDataset) -> Any:
    """The hash of the index where it is recorded, else one of its lengths at a few places.

    It tells the tables of these files from those of others.
    """
    recorded = ((dataset.sidecar or {}).get("idx") or {}).get("xxh3_64")
    if recorded:
        return recorded
    places = np.linspace(0, dataset.num_sequences - 1, 64, dtype=np.int64)
    return xxhash.xxh3_64_hexdigest(dataset.lengths[places].tobytes())


def _prebuilt_folder(prefix: str, description: dict[str, Any]) -> Path:
    described = json.dumps(description, sort_keys=True).encode()
    return Path(f"{prefix}_indices") / xxhash.xxh3_64_hexdigest(described)


def load_prebuilt(prefix: str, description: dict[str, Any]) -> Tables | None:
    """Map prebuilt tables, or None where there are none for this description.

    Every byte of them is compared with its recorded hash. Raises DataError for tables that cannot
    be read or are not what was written.
    """
    folder = _prebuilt_folder(prefix, description)
    if not folder.is_dir():
        return None
    name = printable(folder)
    try:
        content = read_json(folder / "description.json")
        if content["description"] != description:
            raise DataError(
                f"{name}: the prebuilt index is not the one its name stands for. {_REMEDY}"
            )
        if "hashes" not in content:
            raise DataError(
                f"{name}: the prebuilt index is of an earlier version, which kept no hashes. "
                f"{_REMEDY}"
            )
        tables = {}
        for table_name, shape in content["tables"].items():
            expected_hash = content["hashes"][table_name]
            path = _table_file(folder, table_name)
            tables[table_name] = _load_table(path, expected_hash, shape)
        return tables
    # The description may hold anything: a list in place of an object, or a name that is missing.
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{name}: the prebuilt index cannot be read ({error}). {_REMEDY}"
        ) from error


def _load_table(path: Path, expected_hash: str, shape: list[Any]) -> Array:
    """Map one table. shape: its [shape, dtype]. Raises DataError."""
    require_regular(path)
    # The hash comes first: numpy reads a header by parsing it as Python.
    actual_hash = hash_file(path)
    if actual_hash != expected_hash:
        raise DataError(
            f"{printable(path)}: content: xxh3_64 {actual_hash}, "
            f"but {expected_hash} was written. {_REMEDY}"
        )
    table: Array = np.load(path, mmap_mode="r", allow_pickle=False)
    if [list(table.shape), table.dtype.name] != shape:
        raise DataError(
            f"{printable(path)}: holds {list(table.shape)} {table.dtype.name}, "
            f"expected {shape}. {_REMEDY}"
        )
    return table


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
    """Build tables and put them beside the token files in one rename.

    Returns the folder and whether it was built now. Tables that exist are kept where they are
    whole, else replaced.
    """
    folder = _prebuilt_folder(prefix, description)
    try:
        if load_prebuilt(prefix, description) is not None:
            return folder, False
    except DataError:
        shutil.rmtree(folder)
    # Under a name of its own until everything is written: another process may look for the folder.
    partial = folder.with_name(f"{folder.name}.partial-{os.getpid()}")
    partial.mkdir(parents=True)
    try:
        tables = build()
        shapes = {}
        hashes = {}
        for name, table in tables.items():
            path = _table_file(partial, name)
            np.save(path, table, allow_pickle=False)
            shapes[name] = [list(table.shape), table.dtype.name]
            hashes[name] = hash_file(path)
        content = {"description": description, "tables": shapes, "hashes": hashes}
        (partial / "description.json").write_text(json.dumps(content, indent=1), "utf-8")
        partial.replace(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder, True

"""The samples of a run: sample i of the blend of its sources, checked against the model."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from megatron_completep.config.schema import DataConfig, SourceConfig
from megatron_completep.data import megatron_order
from megatron_completep.data.beginning import FIELD, check_beginnings
from megatron_completep.data.blend import Blend
from megatron_completep.data.indexed import BLOCK_BYTES, Array, IndexedDataset
from megatron_completep.data.megatron_order import (
    MegatronBlend,
    MegatronSource,
    Repeated,
    SingleSource,
)
from megatron_completep.data.samples import PermutedSource, Sample, Source
from megatron_completep.data.tokenizer import Tokenizer, build_tokenizer
from megatron_completep.errors import DataError, for_all

# Stream numbers from here on are those of the validation sources, so that no source of a run draws
# its order from the stream of another.
VALIDATION_STREAM = 1 << 32


@dataclass(frozen=True)
class SampleOrigin:
    """Where sample `index` of a run comes from."""

    index: int
    source: int
    prefix: str
    epoch: int
    number: int  # of the sample within its source
    sample: Sample


class Corpus:
    """Sample i of a run, over all its sources.

    It is a pure function of (seed, data, i), the same at every layout. sources: one a token file.
    blend: anything with `blend[i]` -> (source, number of the sample within it). planned_samples:
    the length that the order was planned for.
    """

    def __init__(
        self, sources: Sequence[Source], blend: Any, vocab_size: int, planned_samples: int
    ) -> None:
        self.sources = list(sources)
        self.blend = blend
        self.vocab_size = vocab_size
        self.planned_samples = planned_samples

    def __getitem__(self, index: int) -> Sample:
        """Sample `index` of the run.

        Raises DataError naming file, document and position of a token id that the model has no
        embedding for.
        """
        source_number, number = self.blend[index]
        source = self.sources[source_number]
        sample: Sample = source[number]
        # PREFIX.json may be absent, so that nothing was known of the ids when the run began.
        if sample.tokens.max() >= self.vocab_size or sample.tokens.min() < 0:
            position = int(np.argmax(outside(sample.tokens, self.vocab_size)))
            raise self._unknown_token(source.dataset, _file_position(sample, position))
        return sample

    def origin(self, index: int) -> SampleOrigin:
        """Sample `index` with its source, epoch and place."""
        source_number, number = self.blend[index]
        source = self.sources[source_number]
        epoch, place = source.locate(number)
        return SampleOrigin(
            index=index,
            source=source_number,
            prefix=source.dataset.prefix,
            epoch=epoch,
            number=place,
            sample=source[number],
        )

    @property
    def num_samples(self) -> int:
        """Samples of one epoch of every source together."""
        return sum(source.samples_per_epoch for source in self.sources)

    def order_digest(self, consumed_samples: int) -> str:
        """A hash, in hexadecimal, of the order of the first `consumed_samples` samples.

        It is equal for two planned lengths whose first `consumed_samples` samples are the same. It
        is taken over what decides them (seeds, epochs, shares, counts of each source), so it costs
        the same at any length.
        """
        source_orders = [source.order() for source in self.sources]
        described = [self.blend.order(consumed_samples), source_orders]
        return xxhash.xxh3_64_hexdigest(json.dumps(described, sort_keys=True).encode())

    def fingerprint(self) -> list[dict[str, Any]]:
        """What identifies the data, to compare those of a resumed run with its checkpoint's."""
        return [identity_of_files(source.dataset) for source in self.sources]

    def check_vocabulary(self) -> None:
        """Refuse files whose PREFIX.json shows ids or a tokenizer beyond the model's vocabulary.

        This happens before training, on every rank alike. Raises DataError.
        """
        datasets = [source.dataset for source in self.sources]
        for_all(datasets, self._check_vocabulary_of)

    def _check_vocabulary_of(self, dataset: IndexedDataset) -> None:
        sidecar = dataset.sidecar or {}
        if sidecar.get("largest_id", -1) >= self.vocab_size:
            raise self._unknown_token(dataset, first_outside(dataset, self.vocab_size))
        # Ids that do not occur in this corpus may occur in what its tokenizer encodes later.
        tokenizer = sidecar.get("tokenizer") or {}
        size = tokenizer.get("vocab_size") or 0
        if size > self.vocab_size:
            raise DataError(
                f"{dataset.prefix}.json: tokenizer: it has {size} ids, "
                f"model.vocab_size = {self.vocab_size} has fewer. "
                f"Set model.vocab_size to {size}, "
                "or tokenize the corpus with the model's tokenizer."
            )

    def check_tokenizer(self, data: DataConfig) -> None:
        """Refuse files that were written with another tokenizer than `data.tokenizer`.

        So are sources of which some begin their documents with a token and others do not, and a
        beginning that is not the tokenizer's. Files without a record are accepted. Raises
        DataError.
        """
        datasets = [source.dataset for source in self.sources]
        recorded = [dataset for dataset in datasets if _recorded_tokenizer(dataset)]
        tokenizer = None
        if data.tokenizer is not None and recorded:
            tokenizer = build_tokenizer(data.tokenizer)
            for_all(recorded, partial(refuse_other_tokenizer, tokenizer=tokenizer))
        refuse_several_tokenizers(recorded)
        check_beginnings(data, tokenizer)

    def _unknown_token(self, dataset: IndexedDataset, at: int) -> DataError:
        document = dataset.document_at(at)
        position = at - dataset.token_offset(document)
        return DataError(
            f"{dataset.bin_path}: document {document}, position {position}: "
            f"token id {dataset.tokens[at]} is outside the model's vocabulary, "
            f"0 to {self.vocab_size - 1}. "
            "The corpus belongs to another tokenizer, or model.vocab_size is too small."
        )


def _recorded_tokenizer(dataset: IndexedDataset) -> dict[str, Any]:
    """What PREFIX.json says of the tokenizer; empty where it says nothing."""
    return (dataset.sidecar or {}).get("tokenizer") or {}


def refuse_other_tokenizer(dataset: IndexedDataset, tokenizer: Tokenizer) -> None:
    """Raise DataError unless the tokenizer is the one recorded with the files.

    Files without a record are accepted.
    """
    recorded = _recorded_tokenizer(dataset)
    if not tokenizer.is_recorded_in(recorded):
        raise DataError(
            f"{dataset.prefix}.json: tokenizer: the files were written with "
            f"{recorded.get('type')} {recorded.get('model')} (hash {recorded['hash']}), "
            f"not with {tokenizer.type} {tokenizer.model_name} (hash {tokenizer.hash}). "
            "Use the tokenizer of the corpus."
        )
    ended_by = recorded.get("eod_id")
    if (dataset.sidecar or {}).get("append_eod") and ended_by != tokenizer.eod_id:
        raise DataError(
            f"{dataset.prefix}.json: tokenizer: its documents end with the token {ended_by}, for "
            f"{tokenizer.type} {tokenizer.model_name} a document ends with {tokenizer.eod_id}. "
            "Name the token of the corpus in data.tokenizer.eod_token."
        )


def refuse_several_tokenizers(datasets: Sequence[IndexedDataset]) -> None:
    """Raise DataError where corpora of one run were written with different tokenizers.

    Their ids would mean different texts. datasets: those that record a tokenizer.
    """
    for dataset in datasets[1:]:
        first = _recorded_tokenizer(datasets[0])
        other = _recorded_tokenizer(dataset)
        fields = ["type", "vocab_size"]
        both_end = all((d.sidecar or {}).get("append_eod") for d in (datasets[0], dataset))
        if both_end:
            fields.append("eod_id")
        for field in fields:
            if first.get(field) != other.get(field):
                raise DataError(
                    f"{dataset.prefix}.json: tokenizer: {field} = {other.get(field)}, that of "
                    f"{datasets[0].prefix} is {first.get(field)}. Tokenize all corpora of a run "
                    "with one tokenizer."
                )


def outside(tokens: Array, vocab_size: int) -> Array:
    """Which tokens are no id of the vocabulary, bool."""
    return (tokens >= vocab_size) | (tokens < 0)


def first_outside(dataset: IndexedDataset, vocab_size: int) -> int:
    """Position in the file of the first id outside the vocabulary; -1: there is none."""
    # Block by block, so that a corpus larger than memory can be searched.
    for start in range(0, dataset.num_tokens, BLOCK_BYTES):
        wrong = outside(dataset.tokens[start : start + BLOCK_BYTES], vocab_size)
        if wrong.any():
            return start + int(np.argmax(wrong))
    return -1


def _file_position(sample: Sample, position: int) -> int:
    """The place in the token file of a position within a sample."""
    for span in sample.spans:
        if position < span.end - span.begin:
            return span.begin + position
        position -= span.end - span.begin
    raise AssertionError("a position beyond the sample")


def identity_of_files(dataset: IndexedDataset) -> dict[str, Any]:
    """What tells the files of one source from others, ready for JSON."""
    # Without PREFIX.json there is no hash, and only the counts can tell two corpora apart.
    sidecar = dataset.sidecar or {}
    return {
        "prefix": dataset.prefix,
        "documents": dataset.num_documents,
        "sequences": dataset.num_sequences,
        "tokens": dataset.num_tokens,
        "dtype": dataset.dtype.name,
        "bin_xxh3_64": (sidecar.get("bin") or {}).get("xxh3_64"),
        FIELD: sidecar.get(FIELD),
    }


def parse_split(split: str) -> list[float]:
    """'969,30,1' -> shares of training, validation and test that sum to 1. Raises DataError."""
    try:
        shares = [float(share) for share in split.split(",")]
    except ValueError:
        shares = []
    if not 1 <= len(shares) <= 3 or min(shares) < 0 or not 0 < sum(shares) < math.inf:
        raise DataError(
            f"data.split = {split!r}: give up to three numbers >= 0 for training, validation "
            "and test, such as '969,30,1'."
        )
    zeros = [0.0] * (3 - len(shares))
    return megatron_order.normalize(shares + zeros)


def has_validation(data: DataConfig) -> bool:
    """Whether there is anything to validate on.

    It has sources of its own, or a share of the training sources above 0.
    """
    if data.validation is not None:
        return True
    return data.split is not None and parse_split(data.split)[1] > 0


def sources_of(
    data: DataConfig, split: str
) -> tuple[Sequence[SourceConfig], tuple[float, float] | None]:
    """The configured sources of "train" or "validation", and the share of each that belongs to it.

    The share is a pair of bounds from 0 to 1; None: all of it. Raises DataError where there is
    nothing to validate on.
    """
    if split == "train":
        # Beside validation sources of their own, all of the training sources is for training.
        if data.split is None or data.validation is not None:
            return data.train, None
        return data.train, (0.0, parse_split(data.split)[0])
    if data.validation is not None:
        return data.validation, None
    if data.split is None:
        raise DataError(
            "data.validation and data.split are both null: there is nothing to validate on. "
            "Set one of them."
        )
    if not has_validation(data):
        raise DataError(
            f"data.split = '{data.split}' leaves nothing to validate on. "
            "Give its second part a share, such as '969,30,1'."
        )
    train_share, validation_share, _ = parse_split(data.split)
    return data.train, (train_share, train_share + validation_share)


def open_corpus(
    data: DataConfig, *, seq_length: int, total_samples: int, vocab_size: int, split: str = "train"
) -> Corpus:
    """Open the sources of one split.

    total_samples: samples of the whole run, for which the order is planned (epochs beside weights,
    and the order megatron, depend on it) unless data.order_samples says another number.

    Raises DataError for files that cannot be used, sources too small for one sample, and ids beyond
    the vocabulary.
    """
    planned = planned_samples(data, total_samples, split)
    sources: Sequence[Source]
    blend: Any
    if data.order == "megatron":
        sources, blend = _open_megatron(data, split, seq_length, total_samples, planned)
    else:
        sources, blend = _open_permuted(data, split, seq_length, planned)
    corpus = Corpus(sources, blend, vocab_size, planned)
    corpus.check_vocabulary()
    corpus.check_tokenizer(data)
    return corpus


def _open_permuted(
    data: DataConfig, split: str, seq_length: int, planned: int
) -> tuple[list[PermutedSource], Blend]:
    """The sources in this project's own order, and their blend."""
    # Each source draws its order from a stream of its own, even where two are the same file.
    configured, share = sources_of(data, split)
    first_stream = 0 if split == "train" else VALIDATION_STREAM

    def open_source(number: int) -> PermutedSource:
        dataset = IndexedDataset(configured[number].prefix)
        documents = megatron_order.split_bounds(share, dataset.num_documents)
        return PermutedSource(dataset, seq_length, data.seed, first_stream + number, documents)

    sources = for_all(range(len(configured)), open_source)
    return sources, Blend(blend_weights(configured, sources, planned))


def _open_megatron(
    data: DataConfig, split: str, seq_length: int, total_samples: int, planned: int
) -> tuple[list[MegatronSource], MegatronBlend | SingleSource | Repeated]:
    """The sources in Megatron's order with their tables, and their blend."""
    configured, share = sources_of(data, split)
    passes = megatron_order.ceil_div(total_samples, planned)
    closed_sources, order = megatron_order.plan(
        configured,
        share,
        seq_length=seq_length,
        seed=data.seed,
        num_samples=planned,
        passes=passes,
    )
    sources = [source.open() for source in closed_sources]
    blend = order.open() if isinstance(order, MegatronBlend) else order
    # Megatron's tables end with the planned samples: a longer run reads further passes.
    if passes > 1:
        return sources, Repeated(blend, planned, sources)
    return sources, blend


def planned_samples(data: DataConfig, total_samples: int, split: str) -> int:
    """Samples that the order of a split is planned for; data.order_samples is about training."""
    if split == "train" and data.order_samples:
        return data.order_samples
    return total_samples


def blend_weights(
    configured: Sequence[SourceConfig], sources: Sequence[PermutedSource], total_samples: int
) -> list[Fraction]:
    """Shares of the sources, exact.

    All by weight, or all by epochs (then in proportion to epochs * samples of an epoch): that
    ratio, whatever the run's length. Mixed: sources with epochs get exactly those in the whole run,
    the others share the remaining samples by weight. Raises DataError where none remain, and for a
    source with both.
    """
    by_epochs: dict[int, Fraction] = {}  # source -> its samples in the whole run
    by_weight: dict[int, Fraction] = {}  # source -> its weight
    prefixes_with_both = []
    for i, source in enumerate(configured):
        if source.epochs is None:
            by_weight[i] = _decimal(source.weight or 1.0)
        else:
            by_epochs[i] = _decimal(source.epochs) * sources[i].samples_per_epoch
            if source.weight is not None:
                prefixes_with_both.append(source.prefix)
    if prefixes_with_both:
        raise DataError(
            f"data: {', '.join(prefixes_with_both)}: both weight and epochs are given. "
            "Give one of the two a source."
        )

    if not by_epochs or not by_weight:
        shares = by_epochs or by_weight
        return [shares[i] for i in range(len(configured))]
    samples_by_epochs = sum(by_epochs.values())
    remaining = total_samples - samples_by_epochs
    if remaining <= 0:
        raise DataError(
            f"data: the sources given in epochs take {float(samples_by_epochs):.0f} samples, "
            f"the whole run has {total_samples}; nothing is left for the "
            "sources given by weight. Lower the epochs, or train longer."
        )
    # Weights become samples too, so that all shares have one unit.
    total_weight = sum(by_weight.values())
    shares = dict(by_epochs)
    for i, weight in by_weight.items():
        shares[i] = weight * remaining / total_weight
    return [shares[i] for i in range(len(configured))]


def _decimal(number: float) -> Fraction:
    """A float as the decimal number that it prints as: 0.3 is 3/10."""
    return Fraction(repr(number))


def prebuild(
    data: DataConfig, *, seq_length: int, total_samples: int, split: str = "train"
) -> list[tuple[Path, bool]]:
    """Build the tables of `order: megatron` beside the token files.

    Every later run on this machine maps them from there. Returns each folder and whether it was
    built now. The order `permutation` has no tables: an empty list. Raises DataError.
    """
    if data.order != "megatron":
        return []
    configured, share = sources_of(data, split)
    planned = planned_samples(data, total_samples, split)
    sources, order = megatron_order.plan(
        configured,
        share,
        seq_length=seq_length,
        seed=data.seed,
        num_samples=planned,
        passes=megatron_order.ceil_div(total_samples, planned),
    )
    # Every pass has tables of its own, with a seed of its own; the blend repeats the same ones.
    folders = []
    for source in sources:
        prefix = source.dataset.prefix
        for number in range(source.passes):
            description = source.description(number)
            build = partial(source.build, number)
            folders.append(megatron_order.save_prebuilt(prefix, description, build))
    if isinstance(order, MegatronBlend):
        folders.append(megatron_order.save_prebuilt(order.prefix, order.description(), order.build))
    return folders

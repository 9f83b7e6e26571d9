"""The samples of a run: opens the sources, checks them against the model, and gives sample i of the blend."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from megatron_completep.config.schema import DataConfig, SourceConfig, TokenizerConfig
from megatron_completep.data import megatron_order
from megatron_completep.data.blend import Blend
from megatron_completep.data.indexed import BLOCK_BYTES, Array, IndexedDataset
from megatron_completep.data.megatron_order import MegatronBlend, Repeated
from megatron_completep.data.samples import PermutedSource, Sample, Source
from megatron_completep.data.tokenizer import Tokenizer, build_tokenizer
from megatron_completep.errors import DataError, for_all

VALIDATION_STREAM = (
    1 << 32
)  # sources of the validation blend draw their orders from stream numbers of their own


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
    """Sample i of a run, over all its sources: a pure function of (seed, data, i), the same at every layout.

    sources: one a token file; blend: anything with `blend[i]` -> (source, number of the sample within it). planned_samples: the length
    that the order was planned for.
    """

    def __init__(
        self, sources: Sequence[Source], blend: Any, vocab_size: int, planned_samples: int
    ) -> None:
        self.sources, self.blend, self.vocab_size = list(sources), blend, vocab_size
        self.planned_samples = planned_samples

    def __getitem__(self, index: int) -> Sample:
        """Raises DataError naming file, document and position of a token id that the model has no embedding for."""
        source, number = self.blend[index]
        sample = self.sources[source][number]
        if sample.tokens.max() >= self.vocab_size or sample.tokens.min() < 0:
            position = int(np.argmax(outside(sample.tokens, self.vocab_size)))
            raise self._unknown_token(
                self.sources[source].dataset, _file_position(sample, position)
            )
        return sample

    def origin(self, index: int) -> SampleOrigin:
        """Sample `index` with its source, epoch and place."""
        source, number = self.blend[index]
        epoch, place = self.sources[source].locate(number)
        return SampleOrigin(
            index,
            source,
            self.sources[source].dataset.prefix,
            epoch,
            place,
            self.sources[source][number],
        )

    @property
    def num_samples(self) -> int:
        """Samples of one epoch of every source together."""
        return sum(source.samples_per_epoch for source in self.sources)

    def order_digest(self, consumed_samples: int) -> str:
        """A hash that is equal for two planned lengths whose first `consumed_samples` samples are the same, in hexadecimal.

        It is over what decides them (seeds, epochs, shares, counts of each source), so it costs the same at any length.
        """
        described = [
            self.blend.order(consumed_samples),
            [source.order() for source in self.sources],
        ]
        return xxhash.xxh3_64_hexdigest(json.dumps(described, sort_keys=True).encode())

    def fingerprint(self) -> list[dict[str, Any]]:
        """What identifies the data, for comparing a resumed run's with its checkpoint's."""
        return [_identity(source.dataset) for source in self.sources]

    def check_vocabulary(self) -> None:
        """Refuse, before training and on every rank alike, files whose PREFIX.json shows ids or a tokenizer beyond the vocabulary."""
        for_all([source.dataset for source in self.sources], self._check_vocabulary_of)

    def _check_vocabulary_of(self, dataset: IndexedDataset) -> None:
        sidecar = dataset.sidecar or {}
        if sidecar.get("largest_id", -1) >= self.vocab_size:
            raise self._unknown_token(dataset, first_outside(dataset, self.vocab_size))
        tokenizer = sidecar.get("tokenizer") or {}
        if (size := tokenizer.get("vocab_size") or 0) > self.vocab_size:
            raise DataError(
                f"{dataset.prefix}.json: tokenizer: it has {size} ids, model.vocab_size = {self.vocab_size} has fewer. "
                f"Set model.vocab_size to {size}, or tokenize the corpus with the model's tokenizer."
            )

    def check_tokenizer(self, chosen: TokenizerConfig | None) -> None:
        """Refuse files that were written with another tokenizer than `data.tokenizer`; files without a record are let pass."""
        recorded = [
            source.dataset
            for source in self.sources
            if (source.dataset.sidecar or {}).get("tokenizer")
        ]
        if chosen is None or not recorded:
            return
        tokenizer = build_tokenizer(chosen)
        for_all(recorded, lambda dataset: refuse_other_tokenizer(dataset, tokenizer))

    def _unknown_token(self, dataset: IndexedDataset, at: int) -> DataError:
        document = dataset.document_at(at)
        position = at - dataset.token_offset(document)
        return DataError(
            f"{dataset.bin_path}: document {document}, position {position}: token id {dataset.tokens[at]} is outside the model's "
            f"vocabulary, 0 to {self.vocab_size - 1}. The corpus belongs to another tokenizer, or model.vocab_size is too small."
        )


def refuse_other_tokenizer(dataset: IndexedDataset, tokenizer: Tokenizer) -> None:
    """Raise DataError unless the tokenizer is the one recorded with the files (files without a record are let pass)."""
    recorded = (dataset.sidecar or {}).get("tokenizer") or {}
    if recorded.get("hash") not in (None, tokenizer.hash):
        raise DataError(
            f"{dataset.prefix}.json: tokenizer: the files were written with {recorded.get('type')} {recorded.get('model')} "
            f"(hash {recorded['hash']}), not with {tokenizer.type} {tokenizer.model_name} (hash {tokenizer.hash}). "
            "Use the tokenizer of the corpus."
        )


def outside(tokens: Array, vocab_size: int) -> Array:
    """Which tokens are no id of the vocabulary, bool."""
    return (tokens >= vocab_size) | (tokens < 0)


def first_outside(dataset: IndexedDataset, vocab_size: int) -> int:
    """Position of the first id outside the vocabulary, -1: none; block by block, so that a corpus larger than memory can be searched."""
    for start in range(0, dataset.num_tokens, BLOCK_BYTES):
        wrong = outside(dataset.tokens[start : start + BLOCK_BYTES], vocab_size)
        if wrong.any():
            return start + int(np.argmax(wrong))
    return -1


def _file_position(sample: Sample, position: int) -> int:
    for span in sample.spans:
        if position < span.end - span.begin:
            return span.begin + position
        position -= span.end - span.begin
    raise AssertionError("a position beyond the sample")


def _identity(dataset: IndexedDataset) -> dict[str, Any]:
    sidecar = dataset.sidecar or {}
    return {
        "prefix": dataset.prefix,
        "documents": dataset.num_documents,
        "sequences": dataset.num_sequences,
        "tokens": dataset.num_tokens,
        "dtype": dataset.dtype.name,
        "bin_xxh3_64": (sidecar.get("bin") or {}).get("xxh3_64"),
    }


def parse_split(split: str) -> list[float]:
    """'969,30,1' -> shares of training, validation and test that sum to 1."""
    try:
        shares = [float(part) for part in split.split(",")]
    except ValueError:
        shares = []
    if not 1 <= len(shares) <= 3 or min(shares) < 0 or not 0 < sum(shares) < float("inf"):
        raise DataError(
            f"data.split = {split!r}: give up to three numbers >= 0 for training, validation and test, such as '969,30,1'."
        )
    return megatron_order.normalize(shares + [0.0] * (3 - len(shares)))


def has_validation(data: DataConfig) -> bool:
    """Whether there is anything to validate on: sources of its own, or a part of the training sources above 0."""
    return data.validation is not None or (
        data.split is not None and parse_split(data.split)[1] > 0
    )


def sources_of(
    data: DataConfig, split: str
) -> tuple[Sequence[SourceConfig], tuple[float, float] | None]:
    """The configured sources of "train" or "validation", and which share of each (None: all of it)."""
    if split == "train":
        shares = (
            parse_split(data.split) if data.split is not None and data.validation is None else None
        )
        return data.train, None if shares is None else (0.0, shares[0])
    if data.validation is not None:
        return data.validation, None
    if data.split is None:
        raise DataError(
            "data.validation and data.split are both null: there is nothing to validate on. Set one of them."
        )
    if not has_validation(data):
        raise DataError(
            f"data.split = '{data.split}' leaves nothing to validate on. Give its second part a share, such as '969,30,1'."
        )
    shares = parse_split(data.split)
    return data.train, (shares[0], shares[0] + shares[1])


def open_corpus(
    data: DataConfig, *, seq_length: int, total_samples: int, vocab_size: int, split: str = "train"
) -> Corpus:
    """Open the sources of one split. total_samples: samples of the whole run, for which the order is planned (epochs beside weights, and
    the order megatron, depend on it) unless data.order_samples says another number.

    Raises DataError for files that cannot be used, sources too small for one sample, and ids beyond the vocabulary.
    """
    configured, share = sources_of(data, split)
    planned = planned_samples(data, total_samples, split)
    if data.order == "megatron":
        passes = -(-total_samples // planned)
        tables, order = megatron_order.plan(
            configured,
            share,
            seq_length=seq_length,
            seed=data.seed,
            num_samples=planned,
            passes=passes,
        )
        opened = [source.open() for source in tables]
        blend = order.open() if isinstance(order, MegatronBlend) else order
        corpus = Corpus(
            opened, blend if passes == 1 else Repeated(blend, planned, opened), vocab_size, planned
        )
    else:
        first_stream = 0 if split == "train" else VALIDATION_STREAM

        def open_source(number: int) -> PermutedSource:
            dataset = IndexedDataset(configured[number].prefix)
            documents = (
                None
                if share is None
                else (
                    round(share[0] * dataset.num_documents),
                    round(share[1] * dataset.num_documents),
                )
            )
            return PermutedSource(dataset, seq_length, data.seed, first_stream + number, documents)

        sources = for_all(range(len(configured)), open_source)
        corpus = Corpus(
            sources, Blend(blend_weights(configured, sources, planned)), vocab_size, planned
        )
    corpus.check_vocabulary()
    corpus.check_tokenizer(data.tokenizer)
    return corpus


def planned_samples(data: DataConfig, total_samples: int, split: str) -> int:
    """Samples that the order of a split is planned for; data.order_samples is about training."""
    return data.order_samples or total_samples if split == "train" else total_samples


def blend_weights(
    configured: Sequence[SourceConfig], sources: Sequence[PermutedSource], total_samples: int
) -> list[Fraction]:
    """Shares of the sources, exact.

    All by weight, or all by epochs (then in proportion to epochs * samples of an epoch): that ratio, whatever the run's length. Mixed:
    sources with epochs get exactly those in the whole run, the others share the rest by weight.
    """
    by_epochs = {
        i: _decimal(source.epochs) * sources[i].samples_per_epoch
        for i, source in enumerate(configured)
        if source.epochs is not None
    }
    by_weight = {
        i: _decimal(source.weight or 1.0)
        for i, source in enumerate(configured)
        if source.epochs is None
    }
    both = [
        source.prefix
        for source in configured
        if source.epochs is not None and source.weight is not None
    ]
    if both:
        raise DataError(
            f"data: {', '.join(both)}: both weight and epochs are given. Give one of the two a source."
        )
    if not by_epochs or not by_weight:
        return [(by_epochs or by_weight)[i] for i in range(len(configured))]
    rest = total_samples - sum(by_epochs.values())
    if rest <= 0:
        taken = float(sum(by_epochs.values()))
        raise DataError(
            f"data: the sources given in epochs take {taken:.0f} samples, the whole run has {total_samples}; nothing is left for the "
            "sources given by weight. Lower the epochs, or train longer."
        )
    by_weight = {i: weight * rest / sum(by_weight.values()) for i, weight in by_weight.items()}
    return [{**by_epochs, **by_weight}[i] for i in range(len(configured))]


def _decimal(number: float) -> Fraction:
    return Fraction(repr(number))


def prebuild(
    data: DataConfig, *, seq_length: int, total_samples: int, split: str = "train"
) -> list[tuple[Path, bool]]:
    """Build the tables of `order: megatron` beside the token files, where every later run on this machine maps them.

    Returns each folder and whether it was built now. The order `permutation` has no tables: an empty list. Raises DataError.
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
        passes=-(-total_samples // planned),
    )
    folders = [
        megatron_order.save_prebuilt(
            source.dataset.prefix, source.description(number), partial(source.build, number)
        )
        for source in sources
        for number in range(source.passes)
    ]
    if isinstance(order, MegatronBlend):
        folders.append(megatron_order.save_prebuilt(order.prefix, order.description(), order.build))
    return folders

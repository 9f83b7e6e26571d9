"""What a person wants to know of token files and of the samples of a step: the library behind tools/dataset.py."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from megatron_completep.config.derived import batch_size, total_samples
from megatron_completep.config.schema import Config, TokenizerConfig
from megatron_completep.data.corpus import (
    Corpus,
    SampleOrigin,
    first_outside,
    open_corpus,
    refuse_other_tokenizer,
)
from megatron_completep.data.files import printable
from megatron_completep.data.indexed import CHUNK, IndexedDataset
from megatron_completep.data.left_out import LeftOut, first_sample_of
from megatron_completep.data.run_tokenizer import copy_in, with_readable_tokenizer
from megatron_completep.data.tokenizer import Tokenizer, build_tokenizer, guess_type
from megatron_completep.errors import DataError


def tokenizer_for(dataset: IndexedDataset, chosen: TokenizerConfig | None) -> Tokenizer | None:
    """The chosen tokenizer, else the one recorded in PREFIX.json where its model is still the same; None: no way to decode.

    The recorded one is looked for where it lay when the files were written, beside them, and in the present folder. Raises DataError
    when a chosen tokenizer is not the one the files were written with.
    """
    sidecar = dataset.sidecar or {}
    if chosen is not None:
        tokenizer = build_tokenizer(chosen)
        refuse_other_tokenizer(dataset, tokenizer)
        return tokenizer
    recorded = sidecar.get("tokenizer") or {}
    name = recorded.get("model")
    beside = None if name is None else str(Path(dataset.prefix).parent / name)
    for model in dict.fromkeys([sidecar.get("tokenizer_path"), beside, name]):
        try:
            tokenizer = build_tokenizer(TokenizerConfig(type=recorded["type"], model=model))
        except (DataError, KeyError, ValueError):
            continue
        if tokenizer.hash == recorded.get("hash"):
            return tokenizer
    return None


def choose_tokenizer(
    dataset: IndexedDataset, type: str | None, model: str | None
) -> TokenizerConfig | None:
    """What a user names by type, by model, or by both; None: neither. A model alone is of the recorded type, else of what it looks like.

    model: also a folder in which a run keeps its tokenizer. Raises DataError for a damaged one.
    """
    if type is None and model is not None:
        if (kept := copy_in(Path(model))) is not None:
            return kept
        recorded = ((dataset.sidecar or {}).get("tokenizer") or {}).get("type")
        type = recorded if recorded not in (None, "bytes") else guess_type(model)
    return None if type is None else TokenizerConfig.model_validate({"type": type, "model": model})


def describe_files(
    dataset: IndexedDataset, tokenizer: Tokenizer | None, documents: int, characters: int = 400
) -> dict[str, Any]:
    """Counts, lengths and the first documents (as text where a tokenizer is given), ready for JSON."""
    with dataset.reading_everything():
        lengths = document_lengths(dataset)
    first = []
    for number in range(min(documents, dataset.num_documents)):
        tokens = dataset.document(number)
        head = tokens[
            : characters + 1
        ].tolist()  # a token holds at least one byte, so these are enough
        text = None if tokenizer is None else tokenizer.decode(head)[:characters]
        first.append({"document": number, "tokens": len(tokens), "ids": head[:16], "text": text})
    return {
        "prefix": printable(dataset.prefix),
        "dtype": dataset.dtype.name,
        "documents": dataset.num_documents,
        "sequences": dataset.num_sequences,
        "tokens": dataset.num_tokens,
        "bytes": dataset.num_tokens * dataset.dtype.itemsize,
        **lengths,
        "multimodal": dataset.modes is not None,
        "sidecar": dataset.sidecar,
        "first_documents": first,
    }


def document_lengths(dataset: IndexedDataset) -> dict[str, Any]:
    """Longest, shortest, mean and empty documents, in tokens; chunk by chunk."""
    longest, longest_at, shortest, empty = 0, None, None, 0
    for start in range(0, dataset.num_documents, CHUNK):
        stop = min(start + CHUNK, dataset.num_documents)
        lengths = np.diff(dataset.sequence_offsets(dataset.document_indices[start : stop + 1]))
        empty += int((lengths == 0).sum())
        shortest = int(lengths.min()) if shortest is None else min(shortest, int(lengths.min()))
        if int(lengths.max()) > longest:
            longest, longest_at = int(lengths.max()), start + int(lengths.argmax())
    mean = dataset.num_tokens / dataset.num_documents if dataset.num_documents else 0.0
    return {
        "longest_document": longest,
        "longest_document_number": longest_at,
        "shortest_document": shortest or 0,
        "mean_document": round(mean, 2),
        "empty_documents": empty,
    }


def problems_of(dataset: IndexedDataset, vocab_size: int | None) -> list[str]:
    """`IndexedDataset.problems`, and the first token id outside the vocabulary when one is given."""
    found = dataset.problems()
    if vocab_size is not None and (at := first_outside(dataset, vocab_size)) >= 0:
        document = dataset.document_at(at)
        found.append(
            f"{dataset.bin_path}: document {document}, position {at - dataset.token_offset(document)}: token id {dataset.tokens[at]} is "
            f"outside a vocabulary of {vocab_size}."
        )
    return found


def describe_step(
    config: Config,
    step: int,
    split: str = "train",
    left_out: Sequence[LeftOut] = (),
    samples: range | None = None,
) -> Iterator[dict[str, Any]]:
    """The samples of optimizer step `step` (from 1, as in metrics.jsonl), in order, each with its source, documents and text.

    split "validation": the fixed validation samples, whatever the step. left_out: what the run's rollbacks left out. samples: their
    numbers within the run, where they are known; else they follow from the configuration. Text is null without a tokenizer.
    Raises DataError.
    """
    training, steps = config.training, config.training.train_steps
    if split == "train" and not 1 <= step <= steps:
        raise DataError(
            f"step {step} is outside this run, which has the steps 1 to {steps} (training.train_steps)."
        )
    total = total_samples(training) if split == "train" else training.validation_samples
    data = with_readable_tokenizer(config.data, Path(training.output_dir))
    corpus = open_corpus(
        data,
        seq_length=config.model.seq_length,
        total_samples=total,
        vocab_size=config.model.vocab_size,
        split=split,
    )
    if split != "train":
        samples = range(min(total, corpus.num_samples))
    elif samples is None:
        first = first_sample_of(training, step, left_out)
        samples = range(first, first + batch_size(training, step))
    tokenizers = [tokenizer_for(source.dataset, data.tokenizer) for source in corpus.sources]
    for index in samples:
        origin = corpus.origin(index)
        yield describe_sample(corpus, origin, tokenizers[origin.source])


def describe_sample(
    corpus: Corpus, origin: SampleOrigin, tokenizer: Tokenizer | None
) -> dict[str, Any]:
    """One sample, ready for JSON: where it comes from and its documents with their places in the file."""
    dataset, sample = corpus.sources[origin.source].dataset, origin.sample
    places = np.concatenate([np.arange(span.begin, span.end) for span in sample.spans])
    bounds = [0, *sample.starts.tolist(), len(sample.tokens)]
    documents = []
    for begin, end in pairwise(bounds):
        number = dataset.document_at(int(places[begin]))
        tokens = sample.tokens[begin:end].tolist()
        documents.append(
            {
                "document": number,
                "position": int(places[begin]) - dataset.token_offset(number),
                "tokens": tokens,
                "text": tokenizer.decode(tokens)
                if tokenizer is not None and max(tokens) < tokenizer.vocab_size
                else None,
            }
        )
    return {
        "sample": origin.index,
        "prefix": printable(origin.prefix),
        "epoch": origin.epoch,
        "number": origin.number,
        "documents": documents,
    }

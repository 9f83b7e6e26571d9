"""What people want to know of token files and of the samples of a step, for tools/dataset.py."""

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
    """The chosen tokenizer, else the one recorded in PREFIX.json where its model is still the same.

    The recorded one is looked for where it lay when the files were written, beside them, and in the
    present folder. None: there is no way to decode. Raises DataError when a chosen tokenizer is not
    the one that the files were written with.
    """
    if chosen is not None:
        tokenizer = build_tokenizer(chosen)
        refuse_other_tokenizer(dataset, tokenizer)
        return tokenizer

    # A model at the recorded place may be another one by now: only its hash decides.
    sidecar = dataset.sidecar or {}
    recorded = sidecar.get("tokenizer") or {}
    name = recorded.get("model")
    beside = None if name is None else str(Path(dataset.prefix).parent / name)
    for model in dict.fromkeys([sidecar.get("tokenizer_path"), beside, name]):
        try:
            tokenizer = build_tokenizer(TokenizerConfig(type=recorded["type"], model=model))
        except (DataError, KeyError, ValueError):
            continue
        if recorded.get("hash") is not None and tokenizer.is_recorded_in(recorded):
            return tokenizer
    return None


def choose_tokenizer(
    dataset: IndexedDataset, type: str | None, model: str | None
) -> TokenizerConfig | None:
    """The tokenizer that a user names by type, by model, or by both; None: by neither.

    A model alone is of the recorded type, else of the type that it looks like. It may also be a
    folder in which a run keeps its tokenizer. Raises DataError for a damaged one.
    """
    if type is None and model is not None:
        run_copy = copy_in(Path(model))
        if run_copy is not None:
            return run_copy
        # The type bytes has no model: a model that is named is of another type.
        recorded = ((dataset.sidecar or {}).get("tokenizer") or {}).get("type")
        type = recorded if recorded not in (None, "bytes") else guess_type(model)
    return None if type is None else TokenizerConfig.model_validate({"type": type, "model": model})


def describe_files(
    dataset: IndexedDataset, tokenizer: Tokenizer | None, documents: int, characters: int = 400
) -> dict[str, Any]:
    """Counts, lengths and the first documents, ready for JSON.

    documents: how many are shown. characters: of the text of each, where a tokenizer is given.
    """
    with dataset.reading_everything():
        lengths = document_lengths(dataset)
    first_documents = []
    for number in range(min(documents, dataset.num_documents)):
        tokens = dataset.document(number)
        # A token holds at least one byte, so these are enough.
        ids = tokens[: characters + 1].tolist()
        decoded = None if tokenizer is None else tokenizer.decode(ids)[:characters]
        first_documents.append(
            {"document": number, "tokens": len(tokens), "ids": ids[:16], "text": decoded}
        )
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
        "first_documents": first_documents,
    }


def document_lengths(dataset: IndexedDataset) -> dict[str, Any]:
    """Longest, shortest, mean and empty documents, in tokens."""
    longest = 0
    longest_at = None
    shortest = None
    empty = 0
    # Chunk by chunk, so that memory does not grow with the corpus.
    for start in range(0, dataset.num_documents, CHUNK):
        stop = min(start + CHUNK, dataset.num_documents)
        offsets = dataset.sequence_offsets(dataset.document_indices[start : stop + 1])
        lengths = np.diff(offsets)
        empty += int((lengths == 0).sum())
        chunk_shortest = int(lengths.min())
        shortest = chunk_shortest if shortest is None else min(shortest, chunk_shortest)
        chunk_longest = int(lengths.max())
        if chunk_longest > longest:
            longest = chunk_longest
            longest_at = start + int(lengths.argmax())
    mean = dataset.num_tokens / dataset.num_documents if dataset.num_documents else 0.0
    return {
        "longest_document": longest,
        "longest_document_number": longest_at,
        "shortest_document": shortest or 0,
        "mean_document": round(mean, 2),
        "empty_documents": empty,
    }


def problems_of(dataset: IndexedDataset, vocab_size: int | None) -> list[str]:
    """`IndexedDataset.problems`, and the first token id outside the vocabulary if one is given."""
    problems = dataset.problems()
    if vocab_size is not None and (at := first_outside(dataset, vocab_size)) >= 0:
        document = dataset.document_at(at)
        position = at - dataset.token_offset(document)
        problems.append(
            f"{dataset.bin_path}: document {document}, position {position}: "
            f"token id {dataset.tokens[at]} is outside a vocabulary of {vocab_size}."
        )
    return problems


def describe_step(
    config: Config,
    step: int,
    split: str = "train",
    left_out: Sequence[LeftOut] = (),
    samples: range | None = None,
) -> Iterator[dict[str, Any]]:
    """The samples of optimizer step `step` (from 1, as in metrics.jsonl), in order.

    Each comes with its source, documents and text; text is null without a tokenizer. split
    "validation": the fixed validation samples, whatever the step. left_out: what the run's
    rollbacks left out. samples: their numbers within the run, where they are known; else they
    follow from the configuration. Raises DataError.
    """
    training = config.training
    steps = training.train_steps
    is_training = split == "train"
    if is_training and not 1 <= step <= steps:
        raise DataError(
            f"step {step} is outside this run, which has the steps 1 to {steps} "
            "(training.train_steps)."
        )
    total = total_samples(training) if is_training else training.validation_samples
    # The original tokenizer may be gone; the run has kept a copy.
    data = with_readable_tokenizer(config.data, Path(training.output_dir))
    corpus = open_corpus(
        data,
        seq_length=config.model.seq_length,
        total_samples=total,
        vocab_size=config.model.vocab_size,
        split=split,
    )
    if not is_training:
        samples = range(min(total, corpus.num_samples))
    elif samples is None:
        first_sample = first_sample_of(training, step, left_out)
        samples = range(first_sample, first_sample + batch_size(training, step))
    tokenizers = [tokenizer_for(source.dataset, data.tokenizer) for source in corpus.sources]
    for index in samples:
        origin = corpus.origin(index)
        yield describe_sample(corpus, origin, tokenizers[origin.source])


def describe_sample(
    corpus: Corpus, origin: SampleOrigin, tokenizer: Tokenizer | None
) -> dict[str, Any]:
    """One sample, ready for JSON: where it comes from, and its documents with their places."""
    dataset = corpus.sources[origin.source].dataset
    sample = origin.sample
    # The place in the file of every token of the sample, and the documents' bounds within it.
    places = np.concatenate([np.arange(span.begin, span.end) for span in sample.spans])
    bounds = [0, *sample.starts.tolist(), len(sample.tokens)]
    documents = []
    for begin, end in pairwise(bounds):
        place = int(places[begin])
        number = dataset.document_at(place)
        tokens = sample.tokens[begin:end].tolist()
        # Ids beyond the tokenizer's are those of another one: no text is better than a wrong one.
        decoded = None
        if tokenizer is not None and max(tokens) < tokenizer.vocab_size:
            decoded = tokenizer.decode(tokens)
        position = place - dataset.token_offset(number)
        documents.append(
            {"document": number, "position": position, "tokens": tokens, "text": decoded}
        )
    return {
        "sample": origin.index,
        "prefix": printable(origin.prefix),
        "epoch": origin.epoch,
        "number": origin.number,
        "documents": documents,
    }

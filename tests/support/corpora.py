"""Token files that tests read."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_completep.config.schema import DataConfig
from megatron_completep.data.indexed import IndexedDataset
from megatron_completep.data.writer import IndexedWriter

END_OF_DOCUMENT = 256  # of the bytes tokenizer


def write_documents(
    prefix: Path | str,
    documents: Iterable[Sequence[Sequence[int] | np.ndarray]],
    dtype: Any = "uint16",
    **closing: Any,
) -> IndexedDataset:
    """Write documents, each a list of sequences, and open what was written.

    closing: arguments of `IndexedWriter.close`, such as the tokenizer's identity.
    """
    writer = IndexedWriter(prefix, dtype)
    for document in documents:
        writer.add_document(document)
    writer.close(**closing)
    return IndexedDataset(prefix)


def write_random(
    prefix: Path | str, lengths: Iterable[int], seed: int = 0, vocabulary: int = 1000
) -> IndexedDataset:
    """Documents of the given lengths, each token drawn from 0 to `vocabulary` - 1."""
    generator = np.random.default_rng(seed)
    return write_documents(
        prefix, ([generator.integers(0, vocabulary, size=length)] for length in lengths)
    )


def write_texts(prefix: Path | str, texts: Iterable[str]) -> str:
    """Texts as the bytes tokenizer encodes them, each closed; returns the prefix."""
    write_documents(prefix, ([np.array([*text.encode(), END_OF_DOCUMENT])] for text in texts))
    return str(prefix)


def write_ramps(prefix: Path, documents: int, seed: int, vocabulary: int = 64) -> None:
    """Documents that count up in steps of 1 to 3: easy to learn."""
    generator = np.random.default_rng(seed)
    with IndexedWriter(prefix, np.uint16) as writer:
        for _ in range(documents):
            ramp = np.arange(generator.integers(5, 60)) * generator.integers(1, 4)
            writer.add_document([(ramp + generator.integers(0, vocabulary)) % vocabulary])


def write_markov_chain(prefix: Path, tokens: int = 40_000, vocabulary: int = 32) -> None:
    """20 documents of a Markov chain of second order, which takes a model a while to learn."""
    random = np.random.default_rng(0)
    likely = random.integers(0, vocabulary, size=(vocabulary, vocabulary, 3))
    choices = random.integers(0, 3, tokens)
    surprises = random.random(tokens) < 0.1
    text = random.integers(0, vocabulary, tokens)
    for i in range(2, tokens):
        if not surprises[i]:
            text[i] = likely[text[i - 2], text[i - 1], choices[i]]
    with IndexedWriter(prefix, np.uint16) as writer:
        for document in np.split(text, 20):
            writer.add_document([document])


def two_sources(folder: Path, **changes: Any) -> DataConfig:
    """`data` over the token files a and b of a folder, mixed 7 to 3."""
    sources = [
        {"prefix": str(folder / "a"), "weight": 0.7},
        {"prefix": str(folder / "b"), "weight": 0.3},
    ]
    return DataConfig.model_validate({"train": sources, "prefetch": 0, **changes})

"""Fixed-length samples from one pair of token files, in a seeded order.

The documents of a source, one after another as they lie in the file, form one stream of tokens.
Sample k is the seq_length + 1 tokens that start at k * seq_length, so neighbours share one token
(the last label of one is the first input of the next); what remains at the end is not used. Every
epoch visits all samples in a new seeded permutation. Nothing is built: sample i of a run is found
in O(log documents).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from megatron_completep.data.indexed import Array, IndexedDataset
from megatron_completep.data.permutation import Permutation, derive_key
from megatron_completep.errors import DataError


@dataclass(frozen=True)
class Span:
    """Neighbouring tokens begin..end-1 of a token file."""

    begin: int
    end: int


@dataclass(frozen=True)
class Sample:
    """seq_length + 1 tokens, and where in the file they come from.

    There is one span, or one a document in Megatron's order.
    """

    tokens: Array  # [seq_length + 1], the file's dtype
    spans: tuple[Span, ...]
    # Positions in (0, seq_length] at which a new document begins, ascending.
    starts: npt.NDArray[np.int64]


class Source(Protocol):
    """Samples of one token file in the order of a run."""

    dataset: IndexedDataset
    seq_length: int
    samples_per_epoch: int

    def __getitem__(self, index: int) -> Sample:
        """Sample `index` of the run, counted over all epochs."""

    def locate(self, index: int) -> tuple[int, int]:
        """(epoch, number of the sample within the stream) of sample `index` of the run."""

    def order(self) -> dict[str, Any]:
        """What decides the order of the samples, ready for JSON."""


class PermutedSource:
    """The samples of one epoch, in a new permutation for every epoch.

    They are a pure function of (seed, stream number, data, index). documents: the range
    first..last-1 that is read; None: all. Raises DataError when it does not hold seq_length + 1
    tokens.
    """

    def __init__(
        self,
        dataset: IndexedDataset,
        seq_length: int,
        seed: int,
        stream: int = 0,
        documents: tuple[int, int] | None = None,
    ) -> None:
        begin_document, end_document = documents or (0, dataset.num_documents)
        self.dataset = dataset
        self.seq_length = seq_length
        self.begin = dataset.token_offset(begin_document)
        self.end = dataset.token_offset(end_document)
        num_tokens = self.end - self.begin

        # A sample shares its last token with the next one, so the last token of all starts none.
        self.samples_per_epoch = max(0, num_tokens - 1) // seq_length
        if self.samples_per_epoch == 0:
            all_documents = dataset.num_documents
            content = f"this part has no document of {all_documents}"
            remedy = "Use a larger corpus, a larger split, or a smaller model.seq_length."
            if end_document > begin_document:
                content = (
                    f"documents {begin_document} to {end_document - 1} hold {num_tokens} tokens"
                )
            else:
                # A whole file of text is one document, which no split divides.
                remedy = (
                    "A split has whole documents: preprocess the text as more of them (a folder "
                    "of files, or JSON lines), or use a larger split."
                )
            raise DataError(
                f"{dataset.bin_path}: {content}, one sample takes "
                f"seq_length + 1 = {seq_length + 1}. {remedy}"
            )
        self._seed = seed
        self._stream = stream
        self._permutation = (0, self._permutation_of(0))  # (epoch, its permutation)

    def order(self) -> dict[str, Any]:
        """What decides the order of the samples: nothing that depends on the run's length."""
        return {
            "tokens": [self.begin, self.end],
            "seq_length": self.seq_length,
            "seed": self._seed,
            "stream": self._stream,
        }

    def _permutation_of(self, epoch: int) -> Permutation:
        return Permutation(self.samples_per_epoch, derive_key(self._seed, self._stream, epoch))

    def locate(self, index: int) -> tuple[int, int]:
        """(epoch, number of the sample within the stream) of sample `index` of the run."""
        epoch, index_in_epoch = divmod(index, self.samples_per_epoch)
        cached_epoch, permutation = self._permutation
        if cached_epoch != epoch:
            permutation = self._permutation_of(epoch)
            # One tuple, so that a second thread never sees an epoch with another's permutation.
            self._permutation = (epoch, permutation)
        return epoch, permutation[index_in_epoch]

    def __getitem__(self, index: int) -> Sample:
        _, number = self.locate(index)
        begin = self.begin + number * self.seq_length
        end = begin + self.seq_length + 1
        starts = self.dataset.document_starts(begin, end) - begin
        tokens = self.dataset.read(begin, end)
        return Sample(tokens, (Span(begin, end),), starts)

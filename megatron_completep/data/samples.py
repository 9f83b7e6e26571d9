"""Fixed-length samples from one pair of token files, in a seeded order.

The documents of a source, one after another as they lie in the file, form one stream of tokens. Sample k is the seq_length + 1 tokens that
start at k * seq_length, so neighbours share one token (the last label of one is the first input of the next); the rest at the end is not
used. Every epoch visits all samples in a new seeded permutation. Nothing is built: sample i of a run is found in O(log documents).
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
    """A run of neighbouring tokens begin..end-1 of a token file."""

    begin: int
    end: int


@dataclass(frozen=True)
class Sample:
    """seq_length + 1 tokens, and where in the file they come from (one span, or one a document in Megatron's order)."""

    tokens: Array  # [seq_length + 1], the file's dtype
    spans: tuple[Span, ...]
    starts: npt.NDArray[
        np.int64
    ]  # positions in (0, seq_length] at which a new document begins, ascending


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
    """The samples of one epoch in a new permutation for every epoch: a pure function of (seed, stream number, data, index).

    documents: the range first..last-1 that is read; None: all. Raises DataError when it does not hold seq_length + 1 tokens.
    """

    def __init__(
        self,
        dataset: IndexedDataset,
        seq_length: int,
        seed: int,
        stream: int = 0,
        documents: tuple[int, int] | None = None,
    ) -> None:
        first, last = documents or (0, dataset.num_documents)
        self.dataset, self.seq_length = dataset, seq_length
        self.begin, self.end = dataset.token_offset(first), dataset.token_offset(last)
        self.samples_per_epoch = max(0, self.end - self.begin - 1) // seq_length
        if self.samples_per_epoch == 0:
            part = (
                f"documents {first} to {last - 1} hold {self.end - self.begin} tokens"
                if last > first
                else "this part has no document"
            )
            raise DataError(
                f"{dataset.bin_path}: {part}, one sample takes "
                f"seq_length + 1 = {seq_length + 1}. Use a larger corpus, a larger split, or a smaller model.seq_length."
            )
        self._seed, self._stream = seed, stream
        self._permutation = (0, self._permutation_of(0))

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
        epoch, within = divmod(index, self.samples_per_epoch)
        cached_epoch, permutation = self._permutation
        if cached_epoch != epoch:
            permutation = self._permutation_of(epoch)
            self._permutation = (
                epoch,
                permutation,
            )  # one tuple, so a second thread never sees half of it
        return epoch, permutation[within]

    def __getitem__(self, index: int) -> Sample:
        begin = self.begin + self.locate(index)[1] * self.seq_length
        end = begin + self.seq_length + 1
        starts = self.dataset.document_starts(begin, end) - begin
        return Sample(self.dataset.read(begin, end), (Span(begin, end),), starts)

"""Batches for training and validation.

A worker thread prefetches them; prefetching never changes the batches.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from megatron_completep.config.schema import DataConfig
from megatron_completep.data.corpus import Corpus, open_corpus
from megatron_completep.data.samples import Sample
from megatron_completep.errors import ConfigError, DataError
from megatron_completep.files import distinct_names

PADDING = -1  # sample id of a padding row in the last validation batch


@dataclass(frozen=True)
class Batch:
    """One micro-batch of one data-parallel rank, B sequences of S tokens, on the CPU.

    `to` moves it to a device.
    """

    tokens: Tensor  # int64 [B, S]
    labels: Tensor  # int64 [B, S], the next token of each
    loss_mask: Tensor  # float32 [B, S], 1 where the label counts
    positions: Tensor  # int64 [B, S]
    document_ids: Tensor  # int32 [B, S], number from 0 of each token's document within the sample
    sample_ids: Tensor  # int64 [B], number of the sample within the run

    def to(self, device: torch.device | str, non_blocking: bool = True) -> Batch:
        """The same batch on a device."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Batch:
        """The same batch in page-locked memory, from which copies to a GPU overlap its work."""
        return self._each(Tensor.pin_memory)

    def _each(self, convert: Callable[[Tensor], Tensor]) -> Batch:
        tensors = [convert(getattr(self, field.name)) for field in fields(self)]
        return Batch(*tensors)


@dataclass(frozen=True)
class DocumentEnds:
    """What the ends of documents within a sample change.

    reset: positions count from the beginning of each document. mask_loss: the first token of a
    document, which the document before does not tell, does not count as a label.
    """

    reset: bool = False
    mask_loss: bool = False

    @classmethod
    def of(cls, data: DataConfig) -> DocumentEnds:
        """What a run is configured with."""
        return cls(data.reset_at_document_ends, data.mask_loss_at_document_ends)


def make_batch(
    samples: Sequence[Sample | None],
    sample_ids: Sequence[int],
    seq_length: int,
    document_ends: DocumentEnds,
) -> Batch:
    """Stack samples; None becomes a row of zeros whose loss mask is 0."""
    num_samples = len(samples)
    rows = np.zeros((num_samples, seq_length + 1), np.int64)
    mask = np.ones((num_samples, seq_length), np.float32)
    positions = np.tile(np.arange(seq_length, dtype=np.int64), (num_samples, 1))
    document_ids = np.zeros((num_samples, seq_length), np.int32)
    for row, sample in enumerate(samples):
        if sample is None:
            mask[row] = 0
            continue
        rows[row] = sample.tokens
        if document_ends.mask_loss:
            # The label of position p is token p + 1.
            mask[row, sample.starts - 1] = 0
        # The last of the S + 1 tokens is only a label, so a document that starts there is ignored.
        starts = sample.starts[sample.starts < seq_length]
        if len(starts) == 0:
            continue
        # A 1 at each start, summed up along the row, numbers the documents from 0: `starts` never
        # includes 0, since the first token always belongs to document 0.
        document_ids[row, starts] = 1
        np.cumsum(document_ids[row], out=document_ids[row])
        if document_ends.reset:
            all_starts = np.concatenate(([0], starts))
            positions[row] -= all_starts[document_ids[row]]

    # Labels are the tokens shifted by one. Copies, since views of the rows are not contiguous.
    return Batch(
        tokens=torch.from_numpy(rows[:, :-1].copy()),
        labels=torch.from_numpy(rows[:, 1:].copy()),
        loss_mask=torch.from_numpy(mask),
        positions=torch.from_numpy(positions),
        document_ids=torch.from_numpy(document_ids),
        sample_ids=torch.tensor(sample_ids, dtype=torch.int64),
    )


@dataclass(frozen=True)
class SampleAssignment:
    """Which samples of a step belong to this data-parallel rank.

    Sample i of a step goes to micro-batch i // (B * ranks) of rank (i // B) % ranks, with
    B = micro_batch_size and ranks = data_size.
    """

    micro_batch_size: int
    data_rank: int
    data_size: int

    def __post_init__(self) -> None:
        assert 0 <= self.data_rank < self.data_size

    @property
    def samples_per_round(self) -> int:
        """Samples of one micro-batch on every rank."""
        return self.micro_batch_size * self.data_size

    def check(self, global_batch_size: int) -> None:
        """Raise ConfigError if the samples of a step cannot be divided evenly."""
        if global_batch_size <= 0 or global_batch_size % self.samples_per_round:
            raise ConfigError(
                f"training.global_batch_size = {global_batch_size} is not a multiple of "
                "training.micro_batch_size * data-parallel size = "
                f"{self.micro_batch_size} * {self.data_size}. Change one of them."
            )

    def micro_batches(self, global_batch_size: int) -> list[range]:
        """This rank's samples of a step, numbered within the step, one range per micro-batch.

        Raises ConfigError as `check` does.
        """
        self.check(global_batch_size)
        begin = self.data_rank * self.micro_batch_size
        starts = range(begin, global_batch_size, self.samples_per_round)
        return [range(start, start + self.micro_batch_size) for start in starts]


@dataclass(frozen=True)
class _Step:
    """A step whose batches are being prepared."""

    first_sample: int
    num_samples: int
    batches: Future[list[Batch]]


class Loader:
    """Yields this rank's micro-batches, step by step.

    A step covers samples c to c + global_batch_size - 1, where c = consumed_samples. The order
    depends on the corpus and the number of consumed samples only: not on the number of ranks, on
    prefetching, or on where a run was resumed.

    prefetch: number of steps prepared in advance; 0 disables the worker thread.
    """

    def __init__(
        self,
        corpus: Corpus,
        assignment: SampleAssignment,
        *,
        seq_length: int,
        global_batch_size: int,
        consumed_samples: int = 0,
        document_ends: DocumentEnds = DocumentEnds(),
        prefetch: int = 2,
        pin_memory: bool = False,
    ) -> None:
        assignment.check(global_batch_size)
        self.corpus = corpus
        self._assignment = assignment
        self._seq_length = seq_length
        self._document_ends = document_ends
        self._prefetch = prefetch
        self._pin_memory = pin_memory
        self.global_batch_size = global_batch_size
        self.consumed_samples = consumed_samples
        self._waited = 0.0
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="data") if prefetch else None
        self._prefetched: deque[_Step] = deque()
        self._schedule_prefetch()

    def next_step(self, global_batch_size: int | None = None) -> list[Batch]:
        """Micro-batches of the next step.

        global_batch_size: new global batch size in sequences, effective from this step on. Raises
        DataError, and ConfigError for a size that cannot be divided over micro-batches and ranks.
        """
        started = time.perf_counter()
        if global_batch_size is not None:
            self.global_batch_size = global_batch_size
        batches = self._take(self.consumed_samples, self.global_batch_size)
        self.consumed_samples += self.global_batch_size
        self._schedule_prefetch()
        self._waited += time.perf_counter() - started
        return batches

    def take_wait_seconds(self) -> float:
        """Seconds the caller spent waiting in next_step since the last call; resets them."""
        waited = self._waited
        self._waited = 0.0
        return waited

    def seek(self, consumed_samples: int) -> None:
        """Jump to another sample, ahead or back."""
        self.consumed_samples = consumed_samples
        self._schedule_prefetch()

    def fingerprint(self) -> list[dict[str, Any]]:
        """What identifies the data, for comparing at resume."""
        return self.corpus.fingerprint()

    def close(self) -> None:
        """End the worker thread; safe to call twice."""
        if self._worker is not None:
            self._worker.shutdown(wait=True, cancel_futures=True)
            self._worker = None
        self._prefetched.clear()

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _take(self, first_sample: int, num_samples: int) -> list[Batch]:
        """The batches of a step, from the worker if it has prepared exactly these samples."""
        if self._prefetched:
            step = self._prefetched[0]
            if (step.first_sample, step.num_samples) == (first_sample, num_samples):
                return self._prefetched.popleft().batches.result()
        return self._load(first_sample, num_samples)

    def _schedule_prefetch(self) -> None:
        """Submit the next steps to the worker, after dropping those that no longer match."""
        if self._worker is None:
            return
        size = self.global_batch_size
        first_samples = [self.consumed_samples + size * i for i in range(self._prefetch)]
        # Keep the queue only if it is a prefix of the steps that are needed now.
        for step, first_sample in zip(self._prefetched, first_samples, strict=False):
            if (step.first_sample, step.num_samples) != (first_sample, size):
                self._drop_prefetched()
                break
        # The queue now holds the first steps of the list, or is empty.
        for first_sample in first_samples[len(self._prefetched) :]:
            batches = self._worker.submit(self._load, first_sample, size)
            self._prefetched.append(_Step(first_sample, size, batches))

    def _drop_prefetched(self) -> None:
        for step in self._prefetched:
            step.batches.cancel()
        self._prefetched.clear()

    def _load(self, first_sample: int, num_samples: int) -> list[Batch]:
        batches = []
        for numbers in self._assignment.micro_batches(num_samples):
            sample_ids = [first_sample + number for number in numbers]
            samples = [self.corpus[sample_id] for sample_id in sample_ids]
            batch = make_batch(samples, sample_ids, self._seq_length, self._document_ends)
            batches.append(batch.pin_memory() if self._pin_memory else batch)
        return batches


def build_loader(
    data: DataConfig,
    *,
    seq_length: int,
    micro_batch_size: int,
    global_batch_size: int,
    train_steps: int,
    vocab_size: int,
    data_rank: int,
    data_size: int,
    consumed_samples: int = 0,
    total_samples: int | None = None,
    split: Literal["train", "validation"] = "train",
    pin_memory: bool = False,
) -> Loader:
    """The loader of one data-parallel rank; batch sizes are in sequences.

    total_samples: number of sequences in the run, if its steps differ in batch size (batch ramp).
    Raises DataError and ConfigError.
    """
    # The sample order depends on the length of the run in two cases: if sources are given in
    # epochs, and in Megatron's order.
    if total_samples is None:
        total_samples = train_steps * global_batch_size
    corpus = open_corpus(
        data,
        seq_length=seq_length,
        total_samples=total_samples,
        vocab_size=vocab_size,
        split=split,
    )
    return Loader(
        corpus,
        SampleAssignment(micro_batch_size, data_rank, data_size),
        seq_length=seq_length,
        global_batch_size=global_batch_size,
        consumed_samples=consumed_samples,
        document_ends=DocumentEnds.of(data),
        prefetch=data.prefetch,
        pin_memory=pin_memory,
    )


class ValidationBatches:
    """This rank's share of validation samples 0 .. n - 1, the same every time it is iterated.

    All ranks get the same number of batches; missing samples are padded with rows of loss mask 0
    and sample id -1. The summed loss thus covers exactly the same n samples in every parallel
    layout. Raises DataError if n is not positive.
    """

    def __init__(
        self,
        corpus: Corpus,
        assignment: SampleAssignment,
        samples: int,
        seq_length: int,
        document_ends: DocumentEnds = DocumentEnds(),
    ) -> None:
        if samples <= 0:
            raise DataError(f"training.validation_samples = {samples}: at least one is needed.")
        self.corpus = corpus
        self.num_samples = samples
        self._seq_length = seq_length
        self._document_ends = document_ends
        # Rounded up: the last round may be padded.
        num_rounds = -(-samples // assignment.samples_per_round)
        self._micro_batches = assignment.micro_batches(num_rounds * assignment.samples_per_round)

    @property
    def source_names(self) -> list[str]:
        """A short name of each validation source, in the order of the configuration."""
        prefixes = [Path(source.dataset.prefix) for source in self.corpus.sources]
        return distinct_names(prefixes)

    def source_of(self, sample_id: int) -> int:
        """The number of the source that a sample comes from; of a padding row, the first."""
        if sample_id == PADDING:
            return 0
        source, _ = self.corpus.blend[sample_id]
        return int(source)

    def __len__(self) -> int:
        return len(self._micro_batches)

    def __iter__(self) -> Iterator[Batch]:
        for numbers in self._micro_batches:
            sample_ids: list[int] = []
            samples: list[Sample | None] = []
            for number in numbers:
                is_padding = number >= self.num_samples
                sample_ids.append(PADDING if is_padding else number)
                samples.append(None if is_padding else self.corpus[number])
            yield make_batch(samples, sample_ids, self._seq_length, self._document_ends)


def validation_batches(
    data: DataConfig,
    *,
    samples: int,
    seq_length: int,
    micro_batch_size: int,
    vocab_size: int,
    data_rank: int,
    data_size: int,
) -> ValidationBatches:
    """A fixed validation set of at most one epoch over all sources.

    Raises DataError.
    """
    corpus = open_corpus(
        data,
        seq_length=seq_length,
        total_samples=samples,
        vocab_size=vocab_size,
        split="validation",
    )
    return ValidationBatches(
        corpus,
        SampleAssignment(micro_batch_size, data_rank, data_size),
        min(samples, corpus.num_samples),
        seq_length,
        DocumentEnds.of(data),
    )

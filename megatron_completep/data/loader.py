"""Batches for training and validation.

One worker thread prepares them ahead, which never changes what comes out.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, fields
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from megatron_completep.config.schema import DataConfig
from megatron_completep.data.corpus import Corpus, open_corpus
from megatron_completep.data.samples import Sample
from megatron_completep.errors import ConfigError, DataError

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
    document_ids: Tensor  # int32 [B, S], which document of the sample each token is in, from 0
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


def make_batch(
    samples: Sequence[Sample | None],
    sample_ids: Sequence[int],
    seq_length: int,
    reset_at_document_ends: bool,
) -> Batch:
    """Stack samples; None gives a padding row of zeros that the loss mask leaves out.

    reset_at_document_ends: positions count from the beginning of each document.
    """
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
        # The last token of a sample is a label only: a document that begins there has no input.
        starts = sample.starts[sample.starts < seq_length]
        if len(starts) == 0:
            continue
        # A 1 at each start, summed up along the row, numbers the documents from 0.
        document_ids[row, starts] = 1
        np.cumsum(document_ids[row], out=document_ids[row])
        if reset_at_document_ends:
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
class Layout:
    """Which samples of a step belong to this data-parallel rank.

    Sample i of a step goes to micro-batch i // (B * ranks) of rank (i // B) % ranks.
    """

    micro_batch_size: int
    data_rank: int
    data_size: int

    def __post_init__(self) -> None:
        assert 0 <= self.data_rank < self.data_size

    def micro_batches(self, global_batch_size: int) -> list[range]:
        """This rank's samples of a step, numbered within the step, one range a micro-batch.

        Raises ConfigError where the samples cannot be dealt out evenly.
        """
        # Samples of one micro-batch on every rank.
        row = self.micro_batch_size * self.data_size
        if global_batch_size <= 0 or global_batch_size % row:
            raise ConfigError(
                f"training.global_batch_size = {global_batch_size} is not a multiple of "
                "training.micro_batch_size * data-parallel size = "
                f"{self.micro_batch_size} * {self.data_size}. Change one of them."
            )
        begin = self.data_rank * self.micro_batch_size
        starts = range(begin, global_batch_size, row)
        return [range(start, start + self.micro_batch_size) for start in starts]


@dataclass(frozen=True)
class _Step:
    """A step whose batches are being prepared."""

    first_sample: int
    num_samples: int
    batches: Future[list[Batch]]


class Loader:
    """This rank's micro-batches of one optimizer step after the other.

    A step holds samples consumed .. consumed + global_batch_size - 1. The order depends on the
    corpus and the number of consumed samples only: not on the number of ranks, on prefetching, or
    on where a run was resumed. prefetch: steps that are prepared ahead; 0: none, without a thread.
    """

    def __init__(
        self,
        corpus: Corpus,
        layout: Layout,
        *,
        seq_length: int,
        global_batch_size: int,
        consumed_samples: int = 0,
        reset_at_document_ends: bool = False,
        prefetch: int = 2,
        pin_memory: bool = False,
    ) -> None:
        layout.micro_batches(global_batch_size)  # refuses a size that does not fit, before training
        self.corpus = corpus
        self._layout = layout
        self._seq_length = seq_length
        self._reset = reset_at_document_ends
        self._prefetch = prefetch
        self._pin_memory = pin_memory
        self.global_batch_size = global_batch_size
        self.consumed_samples = consumed_samples
        self._waited = 0.0
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="data") if prefetch else None
        self._ahead: deque[_Step] = deque()
        self._look_ahead()

    def next_step(self, global_batch_size: int | None = None) -> list[Batch]:
        """Micro-batches of the next step.

        global_batch_size: another size, in sequences, that holds from here on. Raises DataError,
        and ConfigError for a size that does not fit the layout.
        """
        started = time.perf_counter()
        if global_batch_size is not None:
            self.global_batch_size = global_batch_size
        batches = self._take(self.consumed_samples, self.global_batch_size)
        self.consumed_samples += self.global_batch_size
        self._look_ahead()
        self._waited += time.perf_counter() - started
        return batches

    @property
    def wait_seconds(self) -> float:
        """Seconds the caller spent waiting in next_step since this was last read."""
        waited = self._waited
        self._waited = 0.0
        return waited

    def seek(self, consumed_samples: int) -> None:
        """Continue from another sample, forwards or backwards."""
        self.consumed_samples = consumed_samples
        self._look_ahead()

    def fingerprint(self) -> list[dict[str, Any]]:
        """What identifies the data, for comparing at resume."""
        return self.corpus.fingerprint()

    def close(self) -> None:
        """End the worker thread; safe to call twice."""
        if self._worker is not None:
            self._worker.shutdown(wait=True, cancel_futures=True)
            self._worker = None
        self._ahead.clear()

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _take(self, first_sample: int, num_samples: int) -> list[Batch]:
        """The batches of a step, from the worker where it has prepared exactly these samples."""
        if self._ahead:
            step = self._ahead[0]
            if (step.first_sample, step.num_samples) == (first_sample, num_samples):
                return self._ahead.popleft().batches.result()
        return self._load(first_sample, num_samples)

    def _look_ahead(self) -> None:
        """Have the next steps prepared; what was prepared for another place or size is dropped."""
        if self._worker is None:
            return
        size = self.global_batch_size
        first_samples = [self.consumed_samples + size * i for i in range(self._prefetch)]
        for step, first_sample in zip(self._ahead, first_samples, strict=False):
            if (step.first_sample, step.num_samples) != (first_sample, size):
                self._drop_ahead()
                break
        for first_sample in first_samples[len(self._ahead) :]:
            batches = self._worker.submit(self._load, first_sample, size)
            self._ahead.append(_Step(first_sample, size, batches))

    def _drop_ahead(self) -> None:
        for step in self._ahead:
            step.batches.cancel()
        self._ahead.clear()

    def _load(self, first_sample: int, num_samples: int) -> list[Batch]:
        batches = []
        for numbers in self._layout.micro_batches(num_samples):
            sample_ids = [first_sample + number for number in numbers]
            samples = [self.corpus[sample_id] for sample_id in sample_ids]
            batch = make_batch(samples, sample_ids, self._seq_length, self._reset)
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
    """The loader of one data-parallel rank; sizes of batches are in sequences.

    total_samples: sequences of the whole run where its steps are not all of global_batch_size.
    Raises DataError and ConfigError.
    """
    # The length of the run decides the order where sources are given in epochs, and Megatron's.
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
        Layout(micro_batch_size, data_rank, data_size),
        seq_length=seq_length,
        global_batch_size=global_batch_size,
        consumed_samples=consumed_samples,
        reset_at_document_ends=data.reset_at_document_ends,
        prefetch=data.prefetch,
        pin_memory=pin_memory,
    )


class ValidationBatches:
    """This rank's share of validation samples 0 .. n - 1, the same every time it is iterated.

    Every rank gets equally many batches. Where n does not fill the last row of batches, padding
    rows follow with loss mask 0 and sample id -1. So the sum of losses over all ranks is over
    exactly the same n samples at every layout. Raises DataError where n is not positive.
    """

    def __init__(
        self,
        corpus: Corpus,
        layout: Layout,
        samples: int,
        seq_length: int,
        reset_at_document_ends: bool,
    ) -> None:
        if samples <= 0:
            raise DataError(f"training.validation_samples = {samples}: at least one is needed.")
        self.corpus = corpus
        self.num_samples = samples
        self._seq_length = seq_length
        self._reset = reset_at_document_ends
        row = layout.micro_batch_size * layout.data_size
        num_rows = -(-samples // row)
        self._micro_batches = layout.micro_batches(row * num_rows)

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
            yield make_batch(samples, sample_ids, self._seq_length, self._reset)


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
    """A fixed set of validation samples, at most one epoch of all sources together.

    Raises DataError.
    """
    corpus = open_corpus(
        data,
        seq_length=seq_length,
        total_samples=samples,
        vocab_size=vocab_size,
        split="validation",
    )
    layout = Layout(micro_batch_size, data_rank, data_size)
    num_samples = min(samples, corpus.num_samples)
    return ValidationBatches(corpus, layout, num_samples, seq_length, data.reset_at_document_ends)

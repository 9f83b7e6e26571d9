"""Batches for training and validation, prepared ahead by one worker thread that never changes what comes out."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
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
    """One micro-batch of one data-parallel rank (B sequences of S tokens), on the CPU until `to` moves it."""

    tokens: Tensor  # int64 [B, S]
    labels: Tensor  # int64 [B, S], the next token of each
    loss_mask: Tensor  # float32 [B, S], 1 where the label counts
    positions: Tensor  # int64 [B, S]
    document_ids: Tensor  # int32 [B, S], which document of the sample each token is in, from 0
    sample_ids: Tensor  # int64 [B], number of the sample within the run

    def to(self, device: torch.device | str, non_blocking: bool = True) -> Batch:
        """The same batch on a device."""
        return Batch(
            *(
                getattr(self, field.name).to(device, non_blocking=non_blocking)
                for field in fields(self)
            )
        )

    def pin_memory(self) -> Batch:
        """The same batch in page-locked memory, from which copies to a GPU overlap with its work."""
        return Batch(*(getattr(self, field.name).pin_memory() for field in fields(self)))


def make_batch(
    samples: Sequence[Sample | None],
    sample_ids: Sequence[int],
    seq_length: int,
    reset_at_document_ends: bool,
) -> Batch:
    """Stack samples; None gives a padding row of zeros that the loss mask leaves out."""
    rows = np.zeros((len(samples), seq_length + 1), np.int64)
    mask = np.ones((len(samples), seq_length), np.float32)
    positions = np.tile(np.arange(seq_length, dtype=np.int64), (len(samples), 1))
    document_ids = np.zeros((len(samples), seq_length), np.int32)
    for row, sample in enumerate(samples):
        if sample is None:
            mask[row] = 0
            continue
        rows[row] = sample.tokens
        starts = sample.starts[sample.starts < seq_length]
        if len(starts) == 0:
            continue
        document_ids[row, starts] = 1
        np.cumsum(document_ids[row], out=document_ids[row])
        if reset_at_document_ends:
            positions[row] -= np.concatenate(([0], starts))[document_ids[row]]
    tokens, labels = torch.from_numpy(rows[:, :-1].copy()), torch.from_numpy(rows[:, 1:].copy())
    ids = torch.tensor(sample_ids, dtype=torch.int64)
    return Batch(
        tokens,
        labels,
        torch.from_numpy(mask),
        torch.from_numpy(positions),
        torch.from_numpy(document_ids),
        ids,
    )


@dataclass(frozen=True)
class Layout:
    """Which samples of a step belong to this rank: sample i of a step goes to micro-batch i // (B * ranks), rank (i // B) % ranks."""

    micro_batch_size: int
    data_rank: int
    data_size: int

    def __post_init__(self) -> None:
        assert 0 <= self.data_rank < self.data_size

    def micro_batches(self, global_batch_size: int) -> list[range]:
        """This rank's samples of a step, numbered within the step, one range a micro-batch."""
        row = self.micro_batch_size * self.data_size
        if global_batch_size <= 0 or global_batch_size % row:
            raise ConfigError(
                f"training.global_batch_size = {global_batch_size} is not a multiple of training.micro_batch_size * data-parallel size = "
                f"{self.micro_batch_size} * {self.data_size}. Change one of them."
            )
        first = self.data_rank * self.micro_batch_size
        return [
            range(start + first, start + first + self.micro_batch_size)
            for start in range(0, global_batch_size, row)
        ]


class Loader:
    """This rank's micro-batches of one optimizer step after the other; a step holds samples consumed .. consumed + global_batch_size - 1.

    The order depends on the corpus and the count of consumed samples only: not on rank count, prefetching or where a run was resumed.
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
        layout.micro_batches(global_batch_size)
        self.corpus, self._layout, self._seq_length = corpus, layout, seq_length
        self._reset, self._prefetch, self._pin_memory = reset_at_document_ends, prefetch, pin_memory
        self.global_batch_size = global_batch_size
        self.consumed_samples = consumed_samples
        self._waited = 0.0
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="data") if prefetch else None
        self._ahead: deque[tuple[int, int, Future[list[Batch]]]] = (
            deque()
        )  # (first sample, samples, batches)
        self._look_ahead()

    def next_step(self, global_batch_size: int | None = None) -> list[Batch]:
        """Micro-batches of the next step; another global_batch_size (in sequences) holds from here on. Raises DataError, ConfigError."""
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
        waited, self._waited = self._waited, 0.0
        return waited

    def seek(self, consumed_samples: int) -> None:
        """Go on from another sample, forwards or backwards."""
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

    def _take(self, first: int, count: int) -> list[Batch]:
        if self._ahead and self._ahead[0][:2] == (first, count):
            return self._ahead.popleft()[2].result()
        return self._load(first, count)

    def _look_ahead(self) -> None:
        """Keep the next steps under way; what was prepared for another position or size is dropped."""
        if self._worker is None:
            return
        wanted = [
            (self.consumed_samples + i * self.global_batch_size, self.global_batch_size)
            for i in range(self._prefetch)
        ]
        if any(held[:2] != want for held, want in zip(self._ahead, wanted, strict=False)):
            for _, _, future in self._ahead:
                future.cancel()
            self._ahead.clear()
        for first, count in wanted[len(self._ahead) :]:
            self._ahead.append((first, count, self._worker.submit(self._load, first, count)))

    def _load(self, first: int, count: int) -> list[Batch]:
        batches = []
        for numbers in self._layout.micro_batches(count):
            ids = [first + number for number in numbers]
            batch = make_batch([self.corpus[i] for i in ids], ids, self._seq_length, self._reset)
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
    """The loader of one data-parallel rank. Sizes of batches in sequences; raises DataError and ConfigError.

    total_samples: sequences of the whole run where its steps are not all of global_batch_size.
    """
    total = train_steps * global_batch_size if total_samples is None else total_samples
    corpus = open_corpus(
        data, seq_length=seq_length, total_samples=total, vocab_size=vocab_size, split=split
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
    """The same validation samples every time it is iterated: samples 0 .. n - 1, this rank's share of each row of batches.

    Every rank gets equally many batches. Where n does not fill the last row, padding rows follow with loss mask 0 and sample id -1, so the
    sum of losses over all ranks is over exactly the same n samples at every layout.
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
        self.corpus, self.num_samples = corpus, samples
        self._layout, self._seq_length, self._reset = layout, seq_length, reset_at_document_ends
        row = layout.micro_batch_size * layout.data_size
        self._rows = layout.micro_batches(row * -(-samples // row))

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[Batch]:
        for numbers in self._rows:
            ids = [number if number < self.num_samples else PADDING for number in numbers]
            yield make_batch(
                [None if i == PADDING else self.corpus[i] for i in ids],
                ids,
                self._seq_length,
                self._reset,
            )


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
    """A fixed set of validation samples, at most one epoch of all sources together. Raises DataError."""
    corpus = open_corpus(
        data,
        seq_length=seq_length,
        total_samples=samples,
        vocab_size=vocab_size,
        split="validation",
    )
    layout = Layout(micro_batch_size, data_rank, data_size)
    return ValidationBatches(
        corpus, layout, min(samples, corpus.num_samples), seq_length, data.reset_at_document_ends
    )

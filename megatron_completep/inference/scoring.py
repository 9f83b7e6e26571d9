"""How likely a model finds texts: log-likelihoods of token sequences in batches, and bits per byte of a token file.

With several processes each scores its share and all get every result; each holds the whole model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_completep.data.indexed import IndexedDataset
from megatron_completep.data.tokenizer import Tokenizer
from megatron_completep.errors import DataError
from megatron_completep.model.gpt import GPT
from megatron_completep.parallel.axis import Axis

T = TypeVar("T")
LOGIT_BYTES = 1 << 29  # of the logits of one batch
WINDOWS_AT_ONCE = 2048  # of a token file: sorted by length together, so that little is padded


@dataclass(frozen=True)
class Likelihood:
    """log p(target | context) in nats, and whether each target token was the likeliest."""

    log_likelihood: float
    is_greedy: bool


class Scorer:
    """A whole model on one device, for scoring. ranks: processes that share the work (each with its own Scorer).

    max_length: tokens the model sees at once; None: model.seq_length. Raises DataError when learned positions are fewer.
    """

    def __init__(
        self,
        model: GPT,
        tokenizer: Tokenizer,
        ranks: Axis | None = None,
        batch_size: int = 16,
        max_length: int | None = None,
    ):
        self.model, self.tokenizer, self.batch_size = model, tokenizer, batch_size
        self.ranks = ranks or Axis("data")
        self.max_length = max_length or model.config.seq_length
        if model.config.position == "learned" and self.max_length > model.config.seq_length:
            raise DataError(
                f"max length {self.max_length}: the model has {model.config.seq_length} learned positions. Use at most those."
            )
        if tokenizer.vocab_size > model.config.vocab_size:
            raise DataError(
                f"the tokenizer has {tokenizer.vocab_size} ids, model.vocab_size = {model.config.vocab_size} has fewer. "
                "Give the tokenizer that the model was trained with."
            )
        self.device = next(model.parameters()).device

    @property
    def beginning(self) -> int:
        """What stands in front of a text: the end of the document before. DataError where the tokenizer has none."""
        if self.tokenizer.eod_id is None:
            raise DataError(
                "the tokenizer has no end-of-document token, after which a text could begin. Use one that has."
            )
        return self.tokenizer.eod_id

    def score(self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[Likelihood]:
        """Likelihood of each (context, target) of token ids; a context is cut on its left to fit. Communicates over `ranks`.

        Raises DataError for an empty context or a target longer than max_length.
        """
        for context, target in pairs:
            if not context or len(target) > self.max_length:
                raise DataError(
                    f"a target of {len(target)} tokens after {len(context)}: 1 to {self.max_length} after at least 1 are scored."
                )
        order = sorted(range(len(pairs)), key=lambda i: -len(pairs[i][0]) - len(pairs[i][1]))
        return self.shared(order, lambda mine: self._score([pairs[i] for i in mine]))

    def shared(self, order: Sequence[int], work: Callable[[Sequence[int]], list[T]]) -> list[T]:
        """Results of `work` on the numbers in `order`, every ranks.size-th done here; by number, on every rank."""
        mine = order[self.ranks.rank :: self.ranks.size]
        done = dict(zip(mine, work(mine), strict=True))
        if self.ranks.group is not None:
            parts: list[dict[int, T]] = [{} for _ in range(self.ranks.size)]
            dist.all_gather_object(parts, done, group=self.ranks.group)
            done = {number: result for part in parts for number, result in part.items()}
        return [done[number] for number in sorted(done)]

    def _score(self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[Likelihood]:
        results: list[Likelihood] = []
        while len(results) < len(pairs):
            rest = pairs[len(results) :]
            longest = max(
                1, min(self.max_length, len(rest[0][0]) + len(rest[0][1]) - 1)
            )  # the longest comes first
            fitting = LOGIT_BYTES // (longest * self.model.config.vocab_size * 4)
            results += self._batch(rest[: max(1, min(self.batch_size, fitting))])
        return results

    @torch.no_grad()
    def _batch(self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[Likelihood]:
        """One pass; rows are padded on the right, where causal attention does not look."""
        inputs = [[*context, *target][-self.max_length - 1 :][:-1] for context, target in pairs]
        tokens = torch.zeros(len(inputs), max(1, *map(len, inputs)), dtype=torch.int64)
        for row, ids in enumerate(inputs):
            tokens[row, : len(ids)] = torch.tensor(ids)
        logits = self.model(tokens.to(self.device))
        rows = zip(logits, inputs, pairs, strict=True)
        return [
            _likelihood(row[len(ids) - len(target) : len(ids)], target)
            for row, ids, (_, target) in rows
        ]

    def windows(self, tokens: Sequence[int]) -> Iterator[tuple[Sequence[int], Sequence[int]]]:
        """(context, target) of a whole text: each token is a target once; the last window is filled up with context."""
        length = self.max_length
        if len(tokens):
            yield [self.beginning], tokens[:length]
        for start in range(length, len(tokens), length):
            stop = min(start + length, len(tokens))
            yield tokens[stop - length - 1 : start], tokens[start:stop]


def _likelihood(logits: Tensor, target: Sequence[int]) -> Likelihood:
    """logits [tokens, V] of the positions before each target token."""
    wide = logits if logits.dtype == torch.float64 else logits.float()
    ids = torch.tensor(list(target), dtype=torch.int64, device=logits.device)
    chosen = wide.gather(1, ids[:, None])[:, 0]
    total = (chosen - wide.logsumexp(dim=-1)).double().sum()
    return Likelihood(total.item(), bool((wide.argmax(dim=-1) == ids).all()))


@dataclass(frozen=True)
class TokenFileScore:
    """Of the documents of a token file, each scored alone from its beginning; the end-of-document token is not scored."""

    documents: int
    tokens: int
    bytes: int  # of the documents' text in UTF-8
    nats: float  # summed over tokens

    @property
    def bits_per_byte(self) -> float:
        return self.nats / math.log(2) / self.bytes

    @property
    def loss(self) -> float:
        """Nats a token."""
        return self.nats / self.tokens

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "bits_per_byte": self.bits_per_byte, "loss": self.loss}


def score_token_file(
    scorer: Scorer, dataset: IndexedDataset, documents: int | None = None
) -> TokenFileScore:
    """Score the first `documents` (None: all) of a token file. Communicates over the scorer's ranks.

    Raises DataError: ids outside the model's vocabulary, or nothing to score.
    """
    count = dataset.num_documents if documents is None else min(documents, dataset.num_documents)
    mine = range(count)[scorer.ranks.rank :: scorer.ranks.size]
    texts = _texts(scorer, dataset, mine)
    number = tokens = size = 0
    nats: list[float] = []
    for group in _groups(texts, scorer):
        pairs = sorted(
            (pair for ids in group for pair in scorer.windows(ids)),
            key=lambda pair: -len(pair[0]) - len(pair[1]),
        )
        nats += [-found.log_likelihood for found in scorer._score(pairs)]
        number += len(group)
        tokens += sum(map(len, group))
        size += sum(len(scorer.tokenizer.decode(ids).encode()) for ids in group)
    parts: list[Any] = [(number, tokens, size, math.fsum(nats))]
    if scorer.ranks.group is not None:
        parts = [None] * scorer.ranks.size
        dist.all_gather_object(
            parts, (number, tokens, size, math.fsum(nats)), group=scorer.ranks.group
        )
    number, tokens, size = (sum(part[i] for part in parts) for i in range(3))
    score = TokenFileScore(number, tokens, size, math.fsum(part[3] for part in parts))
    if not score.tokens or not score.bytes:
        raise DataError(f"{dataset.prefix}: the first {count} documents hold no text to score.")
    return score


def _texts(scorer: Scorer, dataset: IndexedDataset, numbers: Iterable[int]) -> Iterator[list[int]]:
    """Documents as ids, without the end-of-document token at their end."""
    end, limit = scorer.beginning, scorer.tokenizer.vocab_size
    for number in numbers:
        ids = dataset.document(number).tolist()
        if ids and ids[-1] == end:
            ids.pop()
        if ids and not 0 <= min(ids) <= max(ids) < limit:
            raise DataError(
                f"{dataset.prefix}: document {number} holds id {max(ids)}, the tokenizer has 0 to {limit - 1}. Use the corpus's own."
            )
        yield ids


def _groups(texts: Iterable[list[int]], scorer: Scorer) -> Iterator[list[list[int]]]:
    """Documents that together make about WINDOWS_AT_ONCE windows."""
    group: list[list[int]] = []
    windows = 0
    for ids in texts:
        group.append(ids)
        windows += 1 + len(ids) // scorer.max_length
        if windows >= WINDOWS_AT_ONCE:
            yield group
            group, windows = [], 0
    if group:
        yield group

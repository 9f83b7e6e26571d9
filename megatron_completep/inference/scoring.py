"""The likelihood of texts: of token sequences in batches, and bits per byte of a token file.

With several processes each scores its share and all get every result; each holds the whole model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_completep.data.beginning import recorded_beginning
from megatron_completep.data.indexed import IndexedDataset
from megatron_completep.data.tokenizer import Tokenizer
from megatron_completep.errors import DataError
from megatron_completep.model.gpt import GPT
from megatron_completep.parallel.axis import Axis

T = TypeVar("T")
Pair = tuple[Sequence[int], Sequence[int]]  # (context, target), token ids
LOGIT_BYTES = 1 << 29  # of the logits of one batch
WINDOWS_AT_ONCE = 2048  # of a token file: sorted by length together, so that little is padded


@dataclass(frozen=True)
class Likelihood:
    """log p(target | context) in nats, and whether each target token was the likeliest."""

    log_likelihood: float
    is_greedy: bool


class Scorer:
    """A whole model on one device, for scoring.

    ranks: processes that share the work (each with its own Scorer). max_length: tokens the model
    sees at once; None: model.seq_length. end_tokens: ids that end a generated text beside the
    tokenizer's end of document. Raises DataError when learned positions are fewer, or the
    tokenizer has more ids than the model.
    """

    def __init__(
        self,
        model: GPT,
        tokenizer: Tokenizer,
        ranks: Axis | None = None,
        batch_size: int = 16,
        max_length: int | None = None,
        end_tokens: Collection[int] = (),
    ):
        self.model = model
        self.tokenizer = tokenizer
        self.batch_size = batch_size
        self.end_tokens = end_tokens
        self.ranks = ranks or Axis("data")
        self.max_length = max_length or model.config.seq_length
        if model.config.position == "learned" and self.max_length > model.config.seq_length:
            raise DataError(
                f"max length {self.max_length}: the model has {model.config.seq_length} learned "
                "positions. Use at most those."
            )
        if tokenizer.vocab_size > model.config.vocab_size:
            raise DataError(
                f"the tokenizer has {tokenizer.vocab_size} ids, model.vocab_size = "
                f"{model.config.vocab_size} has fewer. Give the tokenizer that the model was "
                "trained with."
            )
        self.device = next(model.parameters()).device

    def score(self, pairs: Sequence[Pair]) -> list[Likelihood]:
        """Likelihood of each (context, target) of token ids; a context is cut on its left to fit.

        Communicates over `ranks`. Raises DataError for an empty context or a target longer than
        max_length.
        """
        for context, target in pairs:
            if not context or len(target) > self.max_length:
                raise DataError(
                    f"a target of {len(target)} tokens after {len(context)}: 1 to "
                    f"{self.max_length} after at least 1 are scored."
                )

        def score_share(numbers: Sequence[int]) -> list[Likelihood]:
            return self._score([pairs[number] for number in numbers])

        order = sorted(range(len(pairs)), key=lambda number: -_length(pairs[number]))
        return self.shared(order, score_share)

    def shared(self, order: Sequence[int], work: Callable[[Sequence[int]], list[T]]) -> list[T]:
        """Results of `work` on the numbers in `order`, sorted by number, on every rank.

        This rank does every ranks.size-th of them. Communicates over `ranks`.
        """
        numbers = order[self.ranks.rank :: self.ranks.size]
        results = dict(zip(numbers, work(numbers), strict=True))
        if self.ranks.group is not None:
            results_of_ranks: list[dict[int, T]] = [{} for _ in range(self.ranks.size)]
            dist.all_gather_object(results_of_ranks, results, group=self.ranks.group)
            for results_of_rank in results_of_ranks:
                results.update(results_of_rank)
        return [results[number] for number in sorted(results)]

    def _score(self, pairs: Sequence[Pair]) -> list[Likelihood]:
        """Likelihoods of pairs that are sorted, the longest first; on this rank alone."""
        vocab_size = self.model.config.vocab_size
        results: list[Likelihood] = []
        while len(results) < len(pairs):
            start = len(results)
            # The longest comes first, so its logits bound those of the whole batch. The last
            # token of a target is not fed.
            length = max(1, min(self.max_length, _length(pairs[start]) - 1))
            bytes_a_row = length * vocab_size * 4  # float32
            count = max(1, min(self.batch_size, LOGIT_BYTES // bytes_a_row))
            results += self._batch(pairs[start : start + count])
        return results

    @torch.no_grad()
    def _batch(self, pairs: Sequence[Pair]) -> list[Likelihood]:
        """One pass; rows are padded on the right, where causal attention does not look."""
        inputs = []
        for context, target in pairs:
            ids = [*context, *target][-self.max_length - 1 :]
            inputs.append(ids[:-1])  # nothing follows the last token
        longest = max(1, *map(len, inputs))
        tokens = torch.zeros(len(inputs), longest, dtype=torch.int64)
        for row, ids in enumerate(inputs):
            tokens[row, : len(ids)] = torch.tensor(ids)

        logits = self.model(tokens.to(self.device))
        likelihoods = []
        for row_logits, ids, (_, target) in zip(logits, inputs, pairs, strict=True):
            # The logits of a position are those of the token after it.
            target_logits = row_logits[len(ids) - len(target) : len(ids)]
            likelihoods.append(_likelihood(target_logits, target))
        return likelihoods

    def windows(
        self, tokens: Sequence[int], context: Sequence[int] | None = None
    ) -> Iterator[Pair]:
        """(context, target) of a whole text, in which each token is a target once.

        context: what stands before the first token; None: what begins a document in training. The
        last window is filled up with context.
        """
        length = self.max_length
        if len(tokens):
            yield self.tokenizer.context if context is None else context, tokens[:length]
        for start in range(length, len(tokens), length):
            stop = min(start + length, len(tokens))
            yield tokens[stop - length - 1 : start], tokens[start:stop]


def _length(pair: Pair) -> int:
    """Tokens of context and target together."""
    return len(pair[0]) + len(pair[1])


def _likelihood(logits: Tensor, target: Sequence[int]) -> Likelihood:
    """The likelihood of a target from logits [tokens, V] of the positions before each token."""
    # 16-bit logits are too coarse for a sum over the vocabulary.
    logits = logits if logits.dtype == torch.float64 else logits.float()
    ids = torch.tensor(list(target), dtype=torch.int64, device=logits.device)
    target_logits = logits.gather(1, ids[:, None])[:, 0]
    total = (target_logits - logits.logsumexp(dim=-1)).double().sum()
    is_greedy = (logits.argmax(dim=-1) == ids).all()
    return Likelihood(total.item(), bool(is_greedy))


@dataclass(frozen=True)
class TokenFileScore:
    """The score of a token file's documents, each scored alone from its beginning.

    Neither the token that begins a document nor the one that ends it is scored.
    """

    documents: int
    tokens: int
    bytes: int  # of the documents' text in UTF-8
    nats: float  # summed over tokens

    @property
    def bits_per_byte(self) -> float:
        """Bits for each byte of text, which tokenizers do not change."""
        return self.nats / math.log(2) / self.bytes

    @property
    def loss(self) -> float:
        """Nats a token."""
        return self.nats / self.tokens

    def to_json(self) -> dict[str, Any]:
        """The score as plain values, the derived ones included."""
        return {**asdict(self), "bits_per_byte": self.bits_per_byte, "loss": self.loss}


class _Totals(NamedTuple):
    """Sums over the documents that one rank has scored."""

    documents: int
    tokens: int
    bytes: int
    nats: float


def score_token_file(
    scorer: Scorer, dataset: IndexedDataset, documents: int | None = None
) -> TokenFileScore:
    """Score the first `documents` (None: all) of a token file.

    Communicates over the scorer's ranks. Raises DataError: ids outside the model's vocabulary, or
    nothing to score.
    """
    ranks = scorer.ranks
    count = dataset.num_documents if documents is None else min(documents, dataset.num_documents)
    totals = _score_documents(scorer, dataset, range(count)[ranks.rank :: ranks.size])
    totals_of_ranks = [totals] * ranks.size
    if ranks.group is not None:
        dist.all_gather_object(totals_of_ranks, totals, group=ranks.group)

    number = sum(totals.documents for totals in totals_of_ranks)
    tokens = sum(totals.tokens for totals in totals_of_ranks)
    size = sum(totals.bytes for totals in totals_of_ranks)
    # fsum rounds once, whatever the number of ranks.
    nats = math.fsum(totals.nats for totals in totals_of_ranks)
    score = TokenFileScore(number, tokens, size, nats)
    if not score.tokens or not score.bytes:
        raise DataError(f"{dataset.prefix}: the first {count} documents hold no text to score.")
    return score


def _score_documents(scorer: Scorer, dataset: IndexedDataset, numbers: Sequence[int]) -> _Totals:
    """Score the documents with these numbers, on this rank alone."""
    documents = 0
    tokens = 0
    size = 0
    nats: list[float] = []
    for batch in _batches(_texts(scorer, dataset, numbers), scorer):
        pairs: list[Pair] = []
        for ids in batch:
            pairs += scorer.windows(ids)
            tokens += len(ids)
            size += len(scorer.tokenizer.decode(ids).encode())
        documents += len(batch)
        # Sorted by length, so that little is padded.
        pairs.sort(key=lambda pair: -_length(pair))
        nats += [-scored.log_likelihood for scored in scorer._score(pairs)]
    return _Totals(documents, tokens, size, math.fsum(nats))


def _texts(scorer: Scorer, dataset: IndexedDataset, numbers: Iterable[int]) -> Iterator[list[int]]:
    """Documents as ids, without the tokens that begin and end them."""
    tokenizer = scorer.tokenizer
    vocab_size = tokenizer.vocab_size
    recorded = recorded_beginning(dataset.sidecar)
    # Where nothing is recorded, documents may begin as the tokenizer's texts do.
    front = list(tokenizer.beginning if recorded is None else recorded)
    for number in numbers:
        ids = dataset.document(number).tolist()
        if front and ids[: len(front)] == front:
            ids = ids[len(front) :]
        if ids and ids[-1] == tokenizer.eod_id:
            ids.pop()
        if ids and not 0 <= min(ids) <= max(ids) < vocab_size:
            raise DataError(
                f"{dataset.prefix}: document {number} holds id {max(ids)}, the tokenizer has 0 to "
                f"{vocab_size - 1}. Use the corpus's own."
            )
        yield ids


def _batches(texts: Iterable[list[int]], scorer: Scorer) -> Iterator[list[list[int]]]:
    """Documents that together make about WINDOWS_AT_ONCE windows."""
    batch: list[list[int]] = []
    windows = 0
    for ids in texts:
        batch.append(ids)
        windows += 1 + len(ids) // scorer.max_length
        if windows >= WINDOWS_AT_ONCE:
            yield batch
            batch = []
            windows = 0
    if batch:
        yield batch

"""Which tokens of a sequence a rank of the context axis holds, and how ranks gather all of them.

A sequence of W tokens is cut into two chunks a rank. Rank r of n holds chunk r and chunk 2n-1-r:
under a causal mask an early chunk sees few keys and a late one many, so that every rank has equally
many pairs of queries and keys to compute. This is the zigzag order of Megatron-LM.

W the whole sequence, S = W / n this rank's tokens of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_completep.parallel.axis import Axis
from megatron_completep.parallel.collectives import (
    Pending,
    start_all_gather,
    start_reduce_scatter,
)

NO_TURN = 2**62  # more rows than any tensor has


class Rows(NamedTuple):
    """Where rows of a rank's tokens lie in the whole sequence.

    The first `turn` of them lie from `start` on, and the others from `second_start` on.
    """

    start: int
    turn: int = NO_TURN
    second_start: int = 0


@dataclass(frozen=True)
class ContextPart:
    """A rank's part of the tokens of every sequence.

    axis: the ranks that share the sequence.
    heads_at_once: groups of keys and values that are gathered together; None: all of a rank.
    """

    axis: Axis
    heads_at_once: int | None = None

    @property
    def split(self) -> bool:
        """Whether the sequence is divided at all."""
        return self.axis.size > 1

    def length(self, whole_length: int) -> int:
        """Tokens that this rank holds of a sequence of W tokens."""
        assert not self.split or whole_length % (2 * self.axis.size) == 0  # config/check.py
        return whole_length // self.axis.size

    def whole_length(self, length: int) -> int:
        """W, where this rank holds `length` tokens."""
        return length * self.axis.size

    def chunks(self, whole_length: int) -> list[range]:
        """The places in the whole sequence of this rank's tokens, chunk by chunk."""
        if not self.split:
            return [range(whole_length)]
        size = self.length(whole_length) // 2
        first_start, second_start = (number * size for number in self._held(self.axis.rank))
        return [range(first_start, first_start + size), range(second_start, second_start + size)]

    def places(self, whole_length: int, device: torch.device) -> Tensor:
        """int64 [S]: the place in the whole sequence of each of this rank's tokens."""
        runs = []
        for chunk in self.chunks(whole_length):
            runs.append(torch.arange(chunk.start, chunk.stop, device=device))
        return torch.cat(runs)

    def rows(self, first: int, whole_length: int) -> Rows:
        """Where this rank's tokens from number `first` on lie in the whole sequence."""
        if not self.split:
            return Rows(first)
        early, late = self.chunks(whole_length)
        if first < len(early):
            return Rows(early.start + first, len(early) - first, late.start)
        return Rows(late.start + first - len(early))

    def cut(self, x: Tensor) -> Tensor:
        """[B, W, ...] -> [B, S, ...]: this rank's tokens."""
        if not self.split:
            return x
        parts = [x[:, chunk.start : chunk.stop] for chunk in self.chunks(x.shape[1])]
        return torch.cat(parts, dim=1)

    def start_gather(self, x: Tensor) -> Gathering:
        """Begin to gather [S, ...] of each rank; `Gathering.finish` gives [W, ...].

        Communicates over the axis: an all-gather, and in backward a reduce-scatter, which sums the
        gradients that the ranks have of the same token.
        """
        gathering = Gathering(self)
        sent: Tensor = _Start.apply(x, gathering)  # type: ignore[no-untyped-call]
        gathering.sent = sent
        return gathering

    def gather(self, x: Tensor) -> Tensor:
        """[S, ...] of each rank -> [W, ...]: the same at once; x itself where nothing is split."""
        if not self.split:
            return x
        gathering = self.start_gather(x)
        return gathering.finish(gathering.sent)

    def in_order(self, gathered: Tensor) -> Tensor:
        """[W, ...] as ranks lie side by side -> in the order of the sequence."""
        chunks = gathered.chunk(2 * self.axis.size)
        by_number = dict(zip(self._order(), chunks, strict=True))
        return torch.cat([by_number[number] for number in range(len(chunks))])

    def by_rank(self, whole: Tensor) -> Tensor:
        """The inverse of `in_order`."""
        chunks = whole.chunk(2 * self.axis.size)
        return torch.cat([chunks[number] for number in self._order()])

    def _held(self, rank: int) -> tuple[int, int]:
        """The numbers of the two chunks that a rank holds."""
        return rank, 2 * self.axis.size - 1 - rank

    def _order(self) -> list[int]:
        """The numbers of the chunks as ranks lie side by side."""
        return [number for rank in range(self.axis.size) for number in self._held(rank)]


class Gathering:
    """Rows of all ranks on their way, in both directions.

    In forward the all-gather runs from `start_gather` to `finish`. Backward visits the two in the
    opposite order, with what was computed between them in between: the reduce-scatter runs from
    the backward of `finish` to that of `start_gather`.

    Attributes:
        sent: this rank's rows [S, ...], which `finish` is handed.
    """

    sent: Tensor

    def __init__(self, part: ContextPart):
        self.part = part
        self.gathered: Pending | None = None
        self.summed: Pending | None = None

    def finish(self, sent: Tensor) -> Tensor:
        """`sent` -> [W, ...] in the order of the sequence, differentiably.

        Under recomputation backward calls it again, which gathers again.
        """
        sequence: Tensor = _Finish.apply(sent, self)  # type: ignore[no-untyped-call]
        return sequence


class _Start(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gathering: Gathering) -> Tensor:
        ctx.gathering = gathering
        gathering.gathered = start_all_gather(x, gathering.part.axis)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, d_x: Tensor) -> tuple[Tensor, None]:
        summed = ctx.gathering.summed
        # What arrives is the sum under way: nothing was added to it before it is complete.
        assert summed is not None and summed.result.data_ptr() == d_x.data_ptr()
        return summed.wait(), None


class _Finish(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, sent: Tensor, gathering: Gathering) -> Tensor:
        ctx.gathering = gathering
        part = gathering.part
        pending = gathering.gathered or start_all_gather(sent, part.axis)
        gathering.gathered = None
        return part.in_order(pending.wait())

    @staticmethod
    def backward(ctx: Any, d_whole: Tensor) -> tuple[Tensor, None]:
        gathering: Gathering = ctx.gathering
        part = gathering.part
        gathering.summed = start_reduce_scatter(part.by_rank(d_whole), part.axis)
        # Not complete: only the backward of `_Start` reads it, which waits.
        return gathering.summed.result, None

"""Which source each sample of a run comes from: after any number k of samples every source has had its exact share, to less than one.

With integer weights a_i of sum A, source i must have given floor(a_i k / A) or ceil(a_i k / A) samples after k. So its j-th sample (from 1)
has a window of slots, floor((j - 1) A / a_i) to ceil(j A / a_i) - 1. Serving the sample with the earliest deadline first always succeeds
(Steiner and Yeomans 1993), but it goes slot by slot. To jump anywhere, the slots are cut into blocks whose counts at the boundary are a
pure function of the boundary; inside: earliest deadline first, with the counts at the far end as further deadlines.

A boundary's counts must be reachable from the past and leave a way into the future. At any slot s, giving the extra samples to the sources
with the earliest deadlines leaves a way forward: of the sources that were rounded up, those whose deadline has not come by slot t keep a
fraction at t no smaller than at s, and each of the others has given its sample, so the samples due by t never outnumber the slots. Going
forward from there for A / min(a_i) slots, every source has passed a deadline, and the constraints of the time before s hold as well. So
that walk's end serves as the boundary. Where the boundary is a multiple of A all counts are whole numbers and no walk is needed.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache
from math import gcd, lcm
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_completep.errors import DataError

BLOCK = 4096  # slots a block at least
WHOLE_PERIOD = 1 << 16  # up to this sum of weights a block is a whole number of periods


class Blend:
    """`blend[k]` -> (source, number of the sample within that source) of sample k of the run.

    weights: positive; floats count as the decimal number they print as (0.3 is 3/10). Memory and the cost of a jump depend on the
    smallest share, not on k: one block of max(4096, 1 / smallest share) entries.
    """

    def __init__(self, weights: Sequence[float | Fraction]) -> None:
        if not weights or any(not weight > 0 for weight in weights):
            raise DataError(f"blend: the weights {list(weights)} must be positive, one a source.")
        exact = [
            weight if isinstance(weight, Fraction) else Fraction(repr(weight)) for weight in weights
        ]
        common = lcm(*(weight.denominator for weight in exact))
        integers = [int(weight * common) for weight in exact]
        shrink = gcd(*integers)
        self.weights = [integer // shrink for integer in integers]
        self.total = sum(self.weights)
        self._walk = -(-self.total // min(self.weights))
        self._periodic = self.total <= WHOLE_PERIOD
        self.block = (
            self.total * -(-BLOCK // self.total) if self._periodic else max(BLOCK, self._walk)
        )
        self._table = lru_cache(maxsize=2)(self._build_table)
        self._boundary = lru_cache(maxsize=4)(self._build_boundary)

    def __getitem__(self, index: int) -> tuple[int, int]:
        if len(self.weights) == 1:
            return 0, index
        block, slot = divmod(index, self.block)
        if self._periodic:  # every block repeats the first
            sources, numbers = self._table(0)
            source = int(sources[slot])
            return source, int(numbers[slot]) + block * (
                self.block * self.weights[source] // self.total
            )
        sources, numbers = self._table(block)
        return int(sources[slot]), int(numbers[slot])

    def order(self, consumed_samples: int) -> dict[str, Any]:
        """Which samples the first `consumed_samples` are: every source is read in its own order, so the counts say it."""
        return {"counts": self.counts(consumed_samples)}

    def counts(self, index: int) -> list[int]:
        """How many of the samples before `index` come from each source."""
        block, slot = divmod(index, self.block)
        before = self._boundary(block)
        inside = (
            np.bincount(
                self._table(0 if self._periodic else block)[0][:slot], minlength=len(before)
            )
            if slot
            else np.zeros(len(before), np.int64)
        )
        return [count + int(more) for count, more in zip(before, inside, strict=True)]

    def _floors(self, slot: int) -> list[int]:
        return [weight * slot // self.total for weight in self.weights]

    def _build_boundary(self, block: int) -> tuple[int, ...]:
        """Samples of each source before the block: the end of a walk that starts `_walk` slots earlier."""
        slot = block * self.block
        start = max(0, slot - self._walk)
        if slot % self.total == 0:
            return tuple(self._floors(slot))
        counts = self._floors(start)
        fractional = [i for i, weight in enumerate(self.weights) if weight * start % self.total]
        fractional.sort(key=lambda i: (self._deadline(i, counts[i] + 1), i))
        for i in fractional[: start - sum(counts)]:
            counts[i] += 1
        for source in self._walk_slots(counts, start, slot, None):
            counts[source] += 1
        return tuple(counts)

    def _build_table(self, block: int) -> tuple[npt.NDArray[np.uint16], npt.NDArray[np.int64]]:
        """Source and number within the source of every slot of a block."""
        begin, end = self._boundary(block), self._boundary(block + 1)
        start = block * self.block
        sources = np.array(self._walk_slots(begin, start, start + self.block, end), dtype=np.uint16)
        numbers = np.empty(self.block, np.int64)
        for source, first in enumerate(begin):
            slots = np.flatnonzero(sources == source)
            numbers[slots] = first + np.arange(len(slots))
        return sources, numbers

    def _deadline(self, source: int, sample: int) -> int:
        """Last slot for the sample-th sample (from 1) of a source."""
        return -(-sample * self.total // self.weights[source]) - 1

    def _walk_slots(
        self, counts: Sequence[int], start: int, stop: int, final: Sequence[int] | None
    ) -> list[int]:
        """Earliest deadline first over slots start..stop-1 from the given counts; `final` counts must be met exactly at stop."""
        done = list(counts)
        waiting = [
            (done[i] * self.total // self.weights[i], i)
            for i in range(len(done))
            if final is None or done[i] < final[i]
        ]
        heapq.heapify(waiting)  # (first slot of the next sample, source)
        ready: list[tuple[int, int]] = []  # (last slot, source)
        chosen = []
        for slot in range(start, stop):
            while waiting and waiting[0][0] <= slot:
                source = heapq.heappop(waiting)[1]
                deadline = self._deadline(source, done[source] + 1)
                heapq.heappush(
                    ready, (deadline if final is None else min(deadline, stop - 1), source)
                )
            deadline, source = heapq.heappop(ready)
            assert deadline >= slot, f"blend: source {source} missed slot {deadline} at {slot}"
            chosen.append(source)
            done[source] += 1
            if final is None or done[source] < final[source]:
                heapq.heappush(waiting, (done[source] * self.total // self.weights[source], source))
        return chosen

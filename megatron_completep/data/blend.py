"""Which source each sample of a run comes from.

After any number k of samples every source has had its exact share, to less than one sample.

With integer weights a_i of sum A, source i must have given floor(a_i k / A) or ceil(a_i k / A)
samples after k. So its j-th sample (from 1) has a window of slots, floor((j - 1) A / a_i) to
ceil(j A / a_i) - 1. Serving the sample with the earliest deadline first always succeeds (Steiner
and Yeomans 1993), but it goes slot by slot. To jump anywhere, the slots are cut into blocks whose
counts at the boundary are a pure function of the boundary. Inside a block the earliest deadline
comes first, with the counts at the block's end as further deadlines.

A boundary's counts must be reachable from the past and leave a way into the future. At any slot s,
giving the extra samples to the sources with the earliest deadlines leaves a way forward: of the
sources that were rounded up, those whose deadline has not come by slot t keep a fraction at t no
smaller than at s, and each of the others has given its sample, so the samples due by t never
outnumber the slots. Going forward from there for A / min(a_i) slots, every source has passed a
deadline, and the constraints of the time before s hold as well. So that walk's end serves as the
boundary. Where the boundary is a multiple of A, all counts are whole numbers and no walk is needed.
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

BLOCK = 4096  # slots of a block, at least
WHOLE_PERIOD = 1 << 16  # up to this sum of weights a block is a whole number of periods


class Blend:
    """`blend[k]` -> (source, number of the sample within that source) of sample k of the run.

    weights: positive; floats count as the decimal number they print as (0.3 is 3/10). Memory and
    the cost of a jump depend on the smallest share, not on k: one block of max(4096, 1 / smallest
    share) entries. Raises DataError for weights that are not positive.
    """

    def __init__(self, weights: Sequence[float | Fraction]) -> None:
        if not weights or any(not weight > 0 for weight in weights):
            raise DataError(f"blend: the weights {list(weights)} must be positive, one a source.")
        # Integers without a common divisor: sums and comparisons are exact, and periods shortest.
        fractions = [_exact(weight) for weight in weights]
        common = lcm(*(fraction.denominator for fraction in fractions))
        integers = [int(fraction * common) for fraction in fractions]
        divisor = gcd(*integers)
        self.weights = [integer // divisor for integer in integers]
        self.total = sum(self.weights)

        # Slots after which every source has passed a deadline.
        self._walk = -(-self.total // min(self.weights))
        self._periodic = self.total <= WHOLE_PERIOD
        if self._periodic:
            periods = -(-BLOCK // self.total)
            self.block = self.total * periods
        else:
            self.block = max(BLOCK, self._walk)
        self._table = lru_cache(maxsize=2)(self._build_table)
        self._boundary = lru_cache(maxsize=4)(self._build_boundary)

    def __getitem__(self, index: int) -> tuple[int, int]:
        if len(self.weights) == 1:
            return 0, index
        block, slot = divmod(index, self.block)
        # Every block repeats the first, with the samples that follow.
        if self._periodic:
            sources, numbers = self._table(0)
            source = int(sources[slot])
            samples_a_block = self.block * self.weights[source] // self.total
            return source, int(numbers[slot]) + block * samples_a_block
        sources, numbers = self._table(block)
        return int(sources[slot]), int(numbers[slot])

    def order(self, consumed_samples: int) -> dict[str, Any]:
        """What decides which samples the first `consumed_samples` are.

        Every source is read in its own order, so the counts decide it.
        """
        return {"counts": self.counts(consumed_samples)}

    def counts(self, index: int) -> list[int]:
        """How many of the samples before `index` come from each source."""
        block, slot = divmod(index, self.block)
        counts = list(self._boundary(block))
        if slot:
            sources, _ = self._table(0 if self._periodic else block)
            for source, more in enumerate(np.bincount(sources[:slot])):
                counts[source] += int(more)
        return counts

    def _floors(self, slot: int) -> list[int]:
        """The least number of samples that each source has given before a slot."""
        return [weight * slot // self.total for weight in self.weights]

    def _build_boundary(self, block: int) -> tuple[int, ...]:
        """Samples of each source before the block.

        They are the end of a walk that starts `_walk` slots earlier.
        """
        slot = block * self.block
        start = max(0, slot - self._walk)
        if slot % self.total == 0:
            return tuple(self._floors(slot))

        # The slots that the rounded-down counts leave go to the sources with the next deadlines.
        counts = self._floors(start)
        fractional = [i for i, weight in enumerate(self.weights) if weight * start % self.total]
        fractional.sort(key=lambda i: (self._deadline(i, counts[i] + 1), i))
        extra = start - sum(counts)
        for source in fractional[:extra]:
            counts[source] += 1
        for source in self._walk_slots(counts, start, slot, None):
            counts[source] += 1
        return tuple(counts)

    def _build_table(self, block: int) -> tuple[npt.NDArray[np.uint16], npt.NDArray[np.int64]]:
        """Source and number within the source of every slot of a block."""
        counts_before = self._boundary(block)
        counts_after = self._boundary(block + 1)
        start = block * self.block
        served = self._walk_slots(counts_before, start, start + self.block, counts_after)
        sources = np.array(served, dtype=np.uint16)
        numbers = np.empty(self.block, np.int64)
        for source, count_before in enumerate(counts_before):
            slots = np.flatnonzero(sources == source)
            numbers[slots] = count_before + np.arange(len(slots))
        return sources, numbers

    def _release(self, source: int, count: int) -> int:
        """First slot for the next sample of a source that has given `count`."""
        return count * self.total // self.weights[source]

    def _deadline(self, source: int, sample: int) -> int:
        """Last slot for the sample-th sample (from 1) of a source."""
        return -(-sample * self.total // self.weights[source]) - 1

    def _walk_slots(
        self, counts: Sequence[int], start: int, stop: int, final: Sequence[int] | None
    ) -> list[int]:
        """The source of each slot start..stop-1, earliest deadline first.

        counts: of each source before `start`. final: the counts that must be met exactly at `stop`.
        """
        done = list(counts)
        waiting: list[tuple[int, int]] = []  # heap of (first slot of the next sample, source)
        ready: list[tuple[int, int]] = []  # heap of (last slot of the next sample, source)
        for source, count in enumerate(done):
            if final is None or count < final[source]:
                waiting.append((self._release(source, count), source))
        heapq.heapify(waiting)

        sources = []
        for slot in range(start, stop):
            while waiting and waiting[0][0] <= slot:
                _, source = heapq.heappop(waiting)
                deadline = self._deadline(source, done[source] + 1)
                # What the final counts hold must be served before the end, whatever its window.
                if final is not None:
                    deadline = min(deadline, stop - 1)
                heapq.heappush(ready, (deadline, source))
            deadline, source = heapq.heappop(ready)
            assert deadline >= slot, f"blend: source {source} missed slot {deadline} at {slot}"
            sources.append(source)
            done[source] += 1
            if final is None or done[source] < final[source]:
                heapq.heappush(waiting, (self._release(source, done[source]), source))
        return sources


def _exact(weight: float | Fraction) -> Fraction:
    """A weight as the decimal number that it prints as."""
    return weight if isinstance(weight, Fraction) else Fraction(repr(weight))

"""A seeded bijection of [0, n) in O(1) memory and time: random access into a shuffle that is never built.

A Feistel network over the smallest power of two >= n: a number is cut into a left and a right part of bits, and in turn each part is xor-ed
with a hash of the other one. Every such step is its own inverse, so the whole is a bijection of [0, 2**bits), whatever the hash. A value
that lands at n or above is put through again until it falls below n (cycle walking); following the cycle keeps it a bijection of [0, n),
and since 2**bits < 2n the expected number of passes is below two.
"""

from __future__ import annotations

from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

MASK64 = (1 << 64) - 1
ROUNDS, ROUNDS_WHEN_SMALL = (
    8,
    24,
)  # few bits in a part mix slowly: below 2**16 more rounds are cheap

IntOrArray = TypeVar("IntOrArray", int, npt.NDArray[Any])  # a Python integer or a uint64 array


def mix(value: IntOrArray) -> IntOrArray:
    """A bijective 64-bit hash (the finalizer of splitmix64), of a Python integer or a uint64 array."""
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & MASK64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & MASK64
    return value ^ (value >> 31)


def derive_key(*parts: int) -> int:
    """A 64-bit key from integers such as (seed, source, epoch); order matters."""
    key = 0
    for part in parts:
        key = mix((key + part + 0x9E3779B97F4A7C15) & MASK64)
    return key


class Permutation:
    """A bijection of [0, n) that depends on n and key only. `permutation[i]` for one index, `permutation.take(array)` for many."""

    def __init__(self, n: int, key: int) -> None:
        if n < 0:
            raise ValueError(f"a permutation needs n >= 0, found {n}")
        self.n = n
        bits = max(n - 1, 0).bit_length()
        self._right_bits = (bits + 1) // 2
        self._right_mask = (1 << self._right_bits) - 1
        self._left_mask = (1 << (bits // 2)) - 1
        rounds = ROUNDS if bits > 16 else ROUNDS_WHEN_SMALL
        self._keys = [derive_key(key, number) for number in range(rounds)]

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: int) -> int:
        if not 0 <= index < self.n:
            raise IndexError(f"index {index} is outside [0, {self.n})")
        value = self._network(int(index))
        while value >= self.n:
            value = self._network(value)
        return value

    def take(self, indices: npt.ArrayLike) -> npt.NDArray[np.int64]:
        """The images of many indices, int64, of the same shape."""
        values = np.asarray(indices)
        if values.size and not (values.min() >= 0 and values.max() < self.n):
            raise IndexError(f"indices are outside [0, {self.n})")
        values = self._network(values.astype(np.uint64))
        while (outside := values >= self.n).any():
            values[outside] = self._network(values[outside])
        return values.astype(np.int64)

    def _network(self, value: IntOrArray) -> IntOrArray:
        left, right = value >> self._right_bits, value & self._right_mask
        for number, key in enumerate(self._keys):
            if number % 2:
                right = right ^ (mix(left ^ key) & self._right_mask)
            else:
                left = left ^ (mix(right ^ key) & self._left_mask)
        return (left << self._right_bits) | right

"""A seeded bijection of [0, n) in O(1) memory and time: random access into a shuffle.

The shuffle itself is never built. A Feistel network over the smallest power of two >= n does it: a
number is cut into its upper and its lower bits, and in turn each half is xor-ed with a hash of the
other one. Every such round is its own inverse, so the network is a bijection of [0, 2**bits),
whatever the hash. A result at n or above goes through the network again until it falls below n
(cycle walking). Following the cycle keeps this a bijection of [0, n), and since 2**bits < 2n, the
expected number of passes is below two.
"""

from __future__ import annotations

from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

MASK64 = (1 << 64) - 1
ROUNDS = 8
ROUNDS_WHEN_SMALL = 24  # few bits in a half mix slowly: up to 2**16 more rounds are cheap

IntOrArray = TypeVar("IntOrArray", int, npt.NDArray[Any])  # a Python integer or a uint64 array


def mix(value: IntOrArray) -> IntOrArray:
    """A bijective 64-bit hash (the finalizer of splitmix64), of an integer or a uint64 array."""
    # The mask cuts a Python integer down to 64 bits; an array overflows to the same bits.
    mixed: IntOrArray = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & MASK64
    mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & MASK64
    mixed ^= mixed >> 31
    return mixed


def derive_key(*parts: int) -> int:
    """A 64-bit key from integers such as (seed, source, epoch); their order matters."""
    key = 0
    for number in parts:
        key = mix((key + number + 0x9E3779B97F4A7C15) & MASK64)
    return key


class Permutation:
    """A bijection of [0, n) that depends on n and key only.

    `permutation[i]` is the image of one index, `permutation.take(array)` those of many.
    """

    def __init__(self, n: int, key: int) -> None:
        if n < 0:
            raise ValueError(f"a permutation needs n >= 0, found {n}")
        self.n = n
        bits = max(n - 1, 0).bit_length()
        self._low_bits = (bits + 1) // 2
        self._low_mask = (1 << self._low_bits) - 1
        self._high_mask = (1 << (bits // 2)) - 1
        rounds = ROUNDS if bits > 16 else ROUNDS_WHEN_SMALL
        self._keys = [derive_key(key, number) for number in range(rounds)]

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: int) -> int:
        if not 0 <= index < self.n:
            raise IndexError(f"index {index} is outside [0, {self.n})")
        # int(): a numpy integer would overflow in the hash.
        image = self._network(int(index))
        while image >= self.n:
            image = self._network(image)
        return image

    def take(self, indices: npt.ArrayLike) -> npt.NDArray[np.int64]:
        """The images of many indices, int64, of the same shape."""
        index_array = np.asarray(indices)
        if index_array.size and not (index_array.min() >= 0 and index_array.max() < self.n):
            raise IndexError(f"indices are outside [0, {self.n})")
        images = self._network(index_array.astype(np.uint64))
        while (outside := images >= self.n).any():
            images[outside] = self._network(images[outside])
        return images.astype(np.int64)

    def _network(self, number: IntOrArray) -> IntOrArray:
        """One pass: a bijection of [0, 2**bits)."""
        high = number >> self._low_bits
        low = number & self._low_mask
        for round_number, key in enumerate(self._keys):
            if round_number % 2:
                low = low ^ (mix(high ^ key) & self._low_mask)
            else:
                high = high ^ (mix(low ^ key) & self._high_mask)
        return (high << self._low_bits) | low

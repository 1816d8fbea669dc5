"""A keyed permutation of [0, size) that is computed index by index, so an epoch's order needs no memory.

An array holding the order of 10^10 documents would take 80 GB on every rank. Here position i of the
order is a function: a Feistel network on the smallest power of two that holds `size`, walked along its
cycle until it lands inside (J. Black and P. Rogaway, "Ciphers with Arbitrary Finite Domains", 2002).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_NUM_ROUNDS = 8


def mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Spread every bit of 64-bit integers over all bits (the finaliser of SplitMix64; a bijection).

    Args:
        values: [...] uint64.

    Returns:
        [...] uint64.
    """
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def mix_key(*numbers: int) -> int:
    """One 63-bit number from several non-negative ones, order included; the same on every machine."""
    state = np.zeros(1, dtype=np.uint64)
    for number in numbers:
        state = mix(state ^ np.array([number % 2**64], dtype=np.uint64))
    return int(state[0] >> np.uint64(1))


class KeyedPermutation:
    """A permutation of [0, size) chosen by a key.

    Args:
        size: number of elements, at least 1.
        key: integers that choose the permutation, e.g. (seed, epoch).
    """

    def __init__(self, size: int, key: tuple[int, ...]) -> None:
        assert size >= 1, f"a permutation of {size} elements"
        self.size = size
        num_bits = max(2, (size - 1).bit_length())
        self._bits = (num_bits // 2, num_bits - num_bits // 2)
        self._round_keys = [np.uint64(mix_key(*key, number)) for number in range(_NUM_ROUNDS)]

    def __call__(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        """Elements at the given places of the order.

        Args:
            indices: [n] places in [0, size).

        Returns:
            [n] int64 elements in [0, size), all different for different places.
        """
        values = self._feistel(np.asarray(indices).astype(np.uint64))
        outside = np.flatnonzero(values >= self.size)
        while len(outside):
            values[outside] = self._feistel(values[outside])
            outside = outside[values[outside] >= self.size]
        return values.astype(np.int64)

    def _feistel(self, values: NDArray[np.uint64]) -> NDArray[np.uint64]:
        left_bits, right_bits = self._bits
        left, right = values >> np.uint64(right_bits), values & np.uint64(2**right_bits - 1)
        for key in self._round_keys:
            left, right = right, left ^ (mix(right ^ key) & np.uint64(2**left_bits - 1))
            left_bits, right_bits = right_bits, left_bits
        return (left << np.uint64(right_bits)) | right

"""Random numbers as a pure function of their purpose, from the counter-based generator Philox; there is no state.

The key is (seed, epoch); the counter names the purpose, the view and the sample. Every rank of any parallel layout
draws the same numbers, before and after a resume. Only raw 64-bit outputs are used, which numpy guarantees to keep
from version to version.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

# 2^64 / golden ratio: multiples of it modulo 2^64 fill [0, 1) evenly, whichever run of them is taken.
_GOLDEN_STEP = 0x9E3779B97F4A7C15
_WORD = 2**64 - 1
_RESOLUTION: float = 2.0**-53


class Purpose(IntEnum):
    """What a draw is for, so that no two uses share random numbers. Never give a number to another purpose."""

    LEVEL_OFFSET = 0
    LEVEL = 1
    STRATUM = 2
    FIRST_MASKED = 3
    TOKEN = 4
    VIEW_ORDER = 5
    CLEAN_TARGET = 6
    COUNT_IN_BAND = 7


@dataclass(frozen=True)
class Draws:
    """The random numbers of one view of one sample: each method is a pure function of the key and its arguments."""

    seed: int
    epoch: int
    view: int = 0

    def raw(self, purpose: Purpose, identity: int, count: int) -> NDArray[np.uint64]:
        """[count] uint64, the Philox stream of `purpose` for the sample or row `identity`."""
        key = np.array([self.seed & _WORD, self.epoch & _WORD], dtype=np.uint64)
        counter = np.array([0, purpose, self.view, identity & _WORD], dtype=np.uint64)
        return np.random.Philox(key=key, counter=counter).random_raw(count)

    def uniform(self, purpose: Purpose, identity: int, count: int) -> NDArray[np.float64]:
        """[count] float64 in [0, 1)."""
        return (self.raw(purpose, identity, count) >> np.uint64(11)).astype(np.float64) * _RESOLUTION

    def even_level(self, ordinal: int) -> float:
        """Uniform in [0, 1) over seeds, evenly spread over consecutive ordinals (a Weyl sequence)."""
        offset = int(self.raw(Purpose.LEVEL_OFFSET, 0, 1)[0])
        return float(((offset + ordinal * _GOLDEN_STEP) & _WORD) >> 11) * _RESOLUTION

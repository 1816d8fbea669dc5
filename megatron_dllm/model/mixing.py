"""Well mixed bits of integers, on any device: what draws that must be the same on every rank are made of.

The finaliser of SplitMix64 (Steele et al. 2014), modulo 2^64 in int64.
"""

from __future__ import annotations

from torch import Tensor

GOLDEN = 0x9E3779B97F4A7C15
_MIX_1, _MIX_2 = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def as_int64(value: int) -> int:
    """The int64 with the lowest 64 bits of an integer."""
    value &= 0xFFFFFFFFFFFFFFFF
    return value - (1 << 64) if value >= 1 << 63 else value


def shifted(value: Tensor, bits: int) -> Tensor:
    """Logical right shift of int64 [...] (torch's own keeps the sign)."""
    return (value >> bits) & ((1 << (64 - bits)) - 1)


def mix(value: Tensor) -> Tensor:
    """64 well mixed bits of counters [...] int64."""
    value = (value ^ shifted(value, 30)) * as_int64(_MIX_1)
    value = (value ^ shifted(value, 27)) * as_int64(_MIX_2)
    return value ^ shifted(value, 31)

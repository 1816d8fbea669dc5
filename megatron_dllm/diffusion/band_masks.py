"""Masks whose share of masked tokens lies in the band of the noise levels (`resample_masks`, after BD3-LM).

BD3-LM (arXiv 2503.09573) draws the mask of a block again and again until its share lies in [t_min, t_max]. What comes
out has a binomial count, given that it lies in the band, and any subset of so many tokens alike. So the count is drawn
at once, by the inverse of that distribution:

    a block of 4, the band [0.3, 0.8]: counts 2 and 3; at t = 0.5 they are 6/16 and 4/16, so drawn as 0.6 and 0.4

A block too short for any count of the band, at a document's end, has the count that lies nearest to its middle.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from megatron_dllm.config.levels import band_of_counts

FloatArray = NDArray[np.float64]

LEAST_LEVEL = 1e-12


def counts_in_band(
    t: FloatArray, u: FloatArray, size: NDArray[np.int64], t_min: float, t_max: float
) -> NDArray[np.int64]:
    """How many tokens of each block are masked.

    Args:
        t: [c] float64 noise levels.
        u: [c] float64, uniform on [0, 1).
        size: [c] int64 maskable tokens.
        t_min: least share of them.
        t_max: largest share.

    Returns:
        [c] int64.
    """
    least, most, share = _count_shares(t, size, t_min, t_max)
    # As shares that add up to 1, and which of them u falls into.
    reached = np.cumsum(share, axis=1) / share.sum(axis=1, keepdims=True)
    found: NDArray[np.int64] = np.minimum(least + (u[:, None] >= reached).sum(axis=1), most)
    return found


def expected_counts(t: FloatArray, size: NDArray[np.int64], t_min: float, t_max: float) -> FloatArray:
    """[c] float64 masked tokens of each block on average, of levels [c] and sizes [c]; see `counts_in_band`."""
    least, _, share = _count_shares(t, size, t_min, t_max)
    means: FloatArray = least + share @ np.arange(share.shape[1]) / share.sum(axis=1)
    return means


def _count_shares(
    t: FloatArray, size: NDArray[np.int64], t_min: float, t_max: float
) -> tuple[NDArray[np.int64], NDArray[np.int64], FloatArray]:
    """Of each block, [c] the least and the most masked tokens, and [c, k] how likely each number is beside the others.

    Args:
        t: [c] float64 noise levels.
        size: [c] int64 maskable tokens.
        t_min: least share of them.
        t_max: largest share.
    """
    ends = {int(n): _ends(int(n), t_min, t_max) for n in np.unique(size)}
    least, most = (np.array([ends[int(n)][end] for n in size], dtype=np.int64) for end in (0, 1))
    # 1 the logarithm of the binomial probability of each count of the widest band, up to what all counts share
    counts = least[:, None] + np.arange(int((most - least).max(initial=0)) + 1)
    is_inside = counts <= most[:, None]
    counts = np.where(is_inside, counts, least[:, None])
    log_factorial = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, int(size.max(initial=1)) + 1)))])
    level = np.clip(t, LEAST_LEVEL, 1.0 - LEAST_LEVEL)[:, None]
    others = size[:, None] - counts
    weight = counts * np.log(level) + others * np.log1p(-level) - log_factorial[counts] - log_factorial[others]
    # 2 those inside the band, relative to the likeliest
    weight = np.where(is_inside, weight, -np.inf)
    return least, most, np.exp(weight - weight.max(axis=1, keepdims=True))


def _ends(size: int, t_min: float, t_max: float) -> tuple[int, int]:
    """Least and most masked tokens of a block of `size`."""
    least, most = band_of_counts(size, t_min, t_max)
    if least <= most:
        return least, most
    nearest = min(max(round(size * (t_min + t_max) / 2.0), 1), size)
    return nearest, nearest

"""CART: loss weights by how much context a masked token sees (Dream, arXiv 2508.15487). No bound on the likelihood.

    w_i = 1/2 sum over visible tokens j of p (1 - p)^(|i - j| - 1)

is the weight of the masked token i: 1 where all about it is visible, 0 where nothing is. What token i can see counts:
the unmasked tokens of its own noisy block, and all tokens of the document before that, which are clean. p is the share
of a direct neighbour; the others follow geometrically.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]
BoolArray = NDArray[np.bool_]


def cart_weights(is_visible: BoolArray, block_ids: IntArray, position_ids: IntArray, p: float) -> FloatArray:
    """The weight that each token has if it is masked.

    Args:
        is_visible: [k, m] bool, noisy tokens that show themselves, view by view.
        block_ids: [m] int64 the noisy block that each lies in: runs of consecutive positions, which no two segments
            share.
        position_ids: [m] int64 place in the segment.
        p: share of a direct neighbour, in (0, 1).

    Returns:
        [k, m] float64 in [0, 1].
    """
    steps = np.flatnonzero(np.diff(block_ids)) + 1
    sizes = np.diff(np.concatenate([[0], steps, [len(block_ids)]]))
    before = np.arange(len(block_ids)) - np.repeat(np.concatenate([[0], steps]), sizes)
    behind = np.repeat(sizes, sizes) - 1 - before
    seen: FloatArray = p * is_visible.astype(np.float64)
    # In front of the block stand clean tokens alone: the rest of a geometric series.
    clean = (1.0 - p) ** before * (1.0 - (1.0 - p) ** (position_ids - before))
    left = _decayed_sums(seen, before, 1.0 - p) + clean
    right = _decayed_sums(seen[:, ::-1], behind[::-1], 1.0 - p)[:, ::-1]
    mean: FloatArray = (left + right) / 2.0
    return mean


def _decayed_sums(values: FloatArray, offsets: IntArray, decay: float) -> FloatArray:
    """[k, m] float64 of each token the sum of values[j] decay^(i - j - 1) over the tokens j before it in its block.

    By doubling: sums over the last 1, 2, 4, ... tokens, each of two sums of half that length.

    Args:
        values: [k, m].
        offsets: [m] tokens of the block before each token.
        decay: in (0, 1).
    """
    sums = np.zeros_like(values)
    if values.shape[1]:
        sums[:, 1:] = values[:, :-1] * (offsets[1:] >= 1)
    span = 1
    while span <= offsets.max(initial=0):
        sums[:, span:] += decay**span * sums[:, :-span] * (offsets[span:] >= span)
        span *= 2
    return sums

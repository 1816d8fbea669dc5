"""Masks of several views that are as different as their counts allow.

Each view masks some tokens of a block, as many as its level says. Views with the same count may still draw the same
tokens, and the mean over them then says little more than one. Here they take turns instead: they share an order of the
block's tokens, drawn at random, and each begins where the one before it ended. In a block of 4 whose order is a b c d:

    count 1    a, b, c, d
    count 2    a b, c d, then one further on: b c, d a
    count 3    a b c, d a b, c d a, b c d

After as many views as the block has tokens a new order is drawn. As an order is random, every view by itself masks any
subset of its size equally often, so a mean over the views estimates what it did; and each token is masked as often as
the others, which is where most of the error comes from. Views whose counts all differ are those of `count_mask`.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from megatron_dllm.diffusion.segment_blocks import SegmentBlocks

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float64]
BoolArray = NDArray[np.bool_]


def spread_masks(counts: IntArray, uniforms: FloatArray, blocks: SegmentBlocks) -> BoolArray:
    """Masked tokens of all views.

    Args:
        counts: [k, c] int64 tokens that each view masks in each block, at least 1.
        uniforms: [k, m] float64 random numbers of each view.
        blocks: of the segment.

    Returns:
        [k, m] bool.
    """
    size = blocks.size
    # 1 turn: how many views before this one have the same count in the block
    is_alike = counts[:, None] == counts[None]
    turn = np.array([is_alike[view, :view].sum(axis=0) for view in range(len(counts))])
    # 2 order: of the view that began this round of turns
    begins = np.where(is_alike & ((turn // size)[:, None] == (turn // size)[None]), 1, 0).argmax(axis=1)
    ranks = np.stack([_ranks(of_view, blocks) for of_view in uniforms])
    rank = ranks[begins[:, blocks.of_token], np.arange(ranks.shape[1])]
    # 3 shift: behind the tokens of the turns before, and one further after each tour of the block
    turn = turn % size
    tour = size // np.gcd(counts, size)
    shift = (turn * counts + turn // tour) % size
    of_token = blocks.of_token
    masked: BoolArray = (rank - shift[:, of_token]) % size[of_token] < counts[:, of_token]
    return masked


def _ranks(uniforms: FloatArray, blocks: SegmentBlocks) -> IntArray:
    """[m] place of each token in its block by random numbers [m]."""
    ranks = np.empty(len(uniforms), np.int64)
    ranks[np.lexsort((uniforms, blocks.of_token))] = blocks.rank
    return ranks

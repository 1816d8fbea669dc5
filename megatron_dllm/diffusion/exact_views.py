"""Views that leave nothing to chance, for scores of given tokens.

enumerated     the views show every mask of a block once. With t uniform on [0, 1] a mask of m of the block's n tokens
               has the weight 1 / (m C(n, m)) (see `diffusion.noise_masks`), so their weighted sum is the ELBO itself
left_to_right  view j shows the first j - 1 tokens of a block and is scored on the j-th: the log-likelihood of the
               sampler that writes one token at a time, which may lie above or below the ELBO

A block of 2 tokens a b, _ the mask, scored where it is written as [_]:

    enumerated, 3 views       [_] b      a [_]      [_][_]
    left_to_right, 2 views    [_] _      a [_]

Views that a block has no use for mask nothing in it.
"""

from __future__ import annotations

from math import comb

import numpy as np
from numpy.typing import NDArray

ENUMERATED, LEFT_TO_RIGHT = EXACT_RELATIONS = ("enumerated", "left_to_right")

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float64]
BoolArray = NDArray[np.bool_]


def views_needed(relation: str, size: int) -> int:
    """Views that a block of `size` maskable tokens takes."""
    return 2**size - 1 if relation == ENUMERATED else size


def exact_views(relation: str, sizes: IntArray, num_views: int) -> tuple[BoolArray, FloatArray, FloatArray]:
    """Masks and weights of all blocks of a segment.

    Args:
        relation: one of EXACT_RELATIONS.
        sizes: [c] maskable tokens of each block.
        num_views: k, enough for the largest block.

    Returns:
        [k, m] masks of the blocks' tokens, in order; [k, m] weights, of which the mean over the views of the weighted
        NLLs is the score; [k, c] the share of each block's tokens that is masked.
    """
    num_tokens = int(sizes.sum())
    masks, weights = np.zeros((num_views, num_tokens), np.bool_), np.zeros((num_views, num_tokens))
    of_token = np.repeat(sizes, sizes)
    levels = np.zeros((num_views, len(sizes)))
    for size in np.unique(sizes).tolist():
        needed = views_needed(relation, size)
        assert needed <= num_views, f"a block of {size} tokens takes {needed} {relation} views, not {num_views}"
        mask, weight = _enumerated(size) if relation == ENUMERATED else _left_to_right(size)
        tokens = np.flatnonzero(of_token == size).reshape(-1, size)
        masks[:needed, tokens] = mask[:, None, :]
        weights[:needed, tokens] = num_views * weight[:, None, :]
        levels[:needed, sizes == size] = mask.mean(axis=1)[:, None]
    return masks, weights, levels


def _enumerated(size: int) -> tuple[BoolArray, FloatArray]:
    """[2^n - 1, n] all masks of n tokens but the empty one, and what each token's NLL weighs."""
    masks = (np.arange(1, 2**size)[:, None] >> np.arange(size)) & 1 == 1
    counts = masks.sum(axis=1)
    by_count = np.array([1.0 / (count * comb(size, count)) for count in range(1, size + 1)])
    return masks, np.repeat(by_count[counts - 1][:, None], size, axis=1)


def _left_to_right(size: int) -> tuple[BoolArray, FloatArray]:
    """[n, n] masks of which the j-th begins at token j, and the weights, which count that token alone."""
    return np.triu(np.ones((size, size), np.bool_)), np.eye(size)

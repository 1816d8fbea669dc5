"""Tokens of a block that stay masked longer than others, by a tilt of the noise that keeps the loss a bound.

Token i of a block of n is masked where its uniform number lies below t^g_i instead of t, and its NLL weighs g_i / t:

    g_i = exp(-a (i / (n - 1) - 1/2))        a, the order bias; 0: g = 1 everywhere

Any g > 0 gives a true ELBO: as t falls from 1 to 0, tokens are written in the order of s_i = u_i^(1/g_i), and the
loss is the mean over these orders of the chain rule's NLL. The weights of a token add up to 1: the integral of t^g g/t
over [0, 1]. With a > 0 the first tokens of a block are written first; as a grows, the order becomes that of the text.

The tails cost variance. With `at_least_one` it is finite at t_min 0 as long as g > 1/2, so for |a| < 1.38; a t_min
above 0 leaves out the share t_min^g of a token's weight. Tokens of large g are seldom masked and weigh much.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from megatron_dllm.diffusion.segment_blocks import SegmentBlocks

FloatArray = NDArray[np.float64]


def order_exponents(order_bias: float, blocks: SegmentBlocks) -> FloatArray:
    """[m] float64 g of each maskable token, by its place among those of its block."""
    last = (blocks.size - 1)[blocks.of_token]
    place = np.where(last > 0, blocks.rank / np.maximum(last, 1), 0.5)
    return np.exp(-order_bias * (place - 0.5))


def tilted_levels(order_bias: float, levels: FloatArray, blocks: SegmentBlocks) -> FloatArray:
    """[m] float64 the probability t^g that each token is masked, of the noise levels t [c] of the blocks."""
    probabilities: FloatArray = levels[blocks.of_token] ** order_exponents(order_bias, blocks)
    return probabilities


def first_masked_of(probabilities: FloatArray, u: FloatArray, blocks: SegmentBlocks) -> NDArray[np.int64]:
    """First masked token of a block whose tokens are masked independently, given that there is one.

    Args:
        probabilities: [m] float64 that a token is masked.
        u: [c] float64, uniform on [0, 1).
        blocks: of the segment.

    Returns:
        [c] int64 in 0..size-1.
    """
    reached = _any_masked_so_far(probabilities, blocks)
    first: NDArray[np.int64] = (reached <= u[:, None] * reached[:, -1:]).sum(axis=1)
    return first.clip(max=blocks.size - 1)


def any_masked(probabilities: FloatArray, blocks: SegmentBlocks) -> FloatArray:
    """[c] float64 the probability that a block has a masked token, of those of its tokens [m]."""
    return _any_masked_so_far(probabilities, blocks)[:, -1]


def _any_masked_so_far(probabilities: FloatArray, blocks: SegmentBlocks) -> FloatArray:
    """[c, n] float64 that one of a block's tokens up to the j-th is masked; n is the size of the largest block."""
    table = np.zeros((len(blocks.size), int(blocks.size.max())))
    table[blocks.of_token, blocks.rank] = probabilities
    with np.errstate(divide="ignore"):  # a token that is surely masked leaves no probability of none
        reached: FloatArray = -np.expm1(np.cumsum(np.log1p(-table), axis=1))
    return reached


def order_weights(order_bias: float, levels: FloatArray, blocks: SegmentBlocks, *, at_least_one: bool) -> FloatArray:
    """[m] float64 loss weights g/t, times the probability of a masked token where every block is drawn with one.

    Args:
        order_bias: a.
        levels: [c] float64 noise levels of one view.
        blocks: of the segment.
        at_least_one: masks are drawn under the condition that the block has one.
    """
    t = levels[blocks.of_token]
    weights = order_exponents(order_bias, blocks) / np.where(t > 0.0, t, np.inf)
    if at_least_one:
        weights = weights * any_masked(tilted_levels(order_bias, levels, blocks), blocks)[blocks.of_token]
    return weights

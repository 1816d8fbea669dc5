"""Which tokens of a view are masked, given the noise levels of its blocks."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from megatron_dllm.diffusion.band_masks import counts_in_band
from megatron_dllm.diffusion.block_order import first_masked_of, tilted_levels
from megatron_dllm.diffusion.draws import Draws, Purpose
from megatron_dllm.diffusion.noise_spec import NoiseSpec
from megatron_dllm.diffusion.segment_blocks import SegmentBlocks, SegmentKey
from megatron_dllm.diffusion.spread_masks import spread_masks

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float64]
BoolArray = NDArray[np.bool_]


def draw_mask(spec: NoiseSpec, draws: Draws, key: SegmentKey, levels: FloatArray, blocks: SegmentBlocks) -> BoolArray:
    """Masked tokens of one view.

    Args:
        spec: how to draw them.
        draws: of the view.
        key: of the segment.
        levels: [c] float64 noise levels.
        blocks: of the segment.

    Returns:
        [m] bool.
    """
    uniforms = draws.uniform(Purpose.TOKEN, key.sample_id, len(blocks.of_token))
    if spec.is_count:
        return count_mask(np.rint(levels * blocks.size).astype(np.int64), uniforms, blocks)
    if spec.resample_masks:
        u = draws.uniform(Purpose.COUNT_IN_BAND, key.sample_id, len(levels))
        return count_mask(counts_in_band(levels, u, blocks.size, spec.t_min, spec.t_max), uniforms, blocks)
    probabilities = tilted_levels(spec.order_bias, levels, blocks) if spec.order_bias else levels[blocks.of_token]
    masked: BoolArray = uniforms < probabilities
    if not spec.at_least_one or spec.is_complementary:
        return masked
    u = draws.uniform(Purpose.FIRST_MASKED, key.sample_id, len(levels))
    if spec.order_bias:
        first = first_masked_of(probabilities, u, blocks)[blocks.of_token]
    else:
        first = first_masked(levels, u, blocks.size)[blocks.of_token]
    masked = (blocks.rank == first) | ((blocks.rank > first) & masked)
    return masked


def draw_spread_masks(
    views: Sequence[Draws], key: SegmentKey, levels: Sequence[FloatArray], blocks: SegmentBlocks
) -> list[BoolArray]:
    """[m] masked tokens of each view, which take turns with those of the same count.

    Args:
        views: random numbers of each view.
        key: of the segment.
        levels: [c] float64 of each view, the share of a block's tokens to mask.
        blocks: of the segment.
    """
    counts = np.rint(np.stack(levels) * blocks.size).astype(np.int64)
    uniforms = np.stack([draws.uniform(Purpose.TOKEN, key.sample_id, len(blocks.of_token)) for draws in views])
    return list(spread_masks(counts, uniforms, blocks))


def count_mask(count: IntArray, uniforms: FloatArray, blocks: SegmentBlocks) -> BoolArray:
    """Mask `count` tokens of every block, the subset uniform among those of that size.

    For t uniform on [0, 1] the ELBO gives a mask of m tokens the weight of the integral of
    (1/t) t^m (1-t)^(B-m), which is 1 / (m C(B, m)): m uniform on 1..B, any subset, weight B/m. So t := m/B
    with weight 1/t is that ELBO exactly, without the noise of a binomial count. A complementary pair draws m
    uniformly on 0..B and weighs its masks (B+1)/m and (B+1)/(B-m).

    Args:
        count: [c] int64 tokens to mask in each block.
        uniforms: [m] float64, a random number a token.
        blocks: of the segment.

    Returns:
        [m] bool.
    """
    # Blocks stay in order and tokens are shuffled inside theirs, so a sorted position has its block's ranks.
    shuffled = np.lexsort((uniforms, blocks.of_token))
    masked = np.empty(len(uniforms), np.bool_)
    masked[shuffled] = blocks.rank < count[blocks.of_token]
    return masked


def first_masked(t: NDArray[np.float64], u: NDArray[np.float64], size: NDArray[np.int64]) -> NDArray[np.int64]:
    """First masked token of a block whose mask is iid Bernoulli(t), given that there is one.

    The inverse of the geometric distribution truncated to 0..size-1; later tokens stay independent.

    Args:
        t: [c] float64, mask probability.
        u: [c] float64, uniform on [0, 1).
        size: [c] int64, maskable tokens.

    Returns:
        [c] int64 in 0..size-1; uniform there in the limit t = 0.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        log_keep = np.log1p(-t)
        first = np.log1p(u * np.expm1(size * log_keep)) / log_keep
    first = np.where(t > 0.0, first, u * size)
    return np.clip(first.astype(np.int64), 0, size - 1)

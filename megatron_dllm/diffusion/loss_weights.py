"""What the NLL of a masked token weighs, given the masks and noise levels of all views."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from megatron_dllm.diffusion.block_order import order_weights
from megatron_dllm.diffusion.level_density import density_weights
from megatron_dllm.diffusion.noise_spec import NoiseSpec
from megatron_dllm.diffusion.segment_blocks import SegmentBlocks


def view_weights(
    spec: NoiseSpec, views: NDArray[np.bool_], levels: NDArray[np.float64], blocks: SegmentBlocks
) -> NDArray[np.float64]:
    """Loss weights that a masked token would have, broadcastable to [k, m].

    Args:
        spec: of the stage.
        views: [k, m] bool masks.
        levels: [k, c] float64 noise levels.
        blocks: of the segment.
    """
    if spec.loss_weight in ("uniform", "cart"):
        return np.ones(1)
    if spec.loss_weight == "realised":
        weights = _realised_weights(spec, views, blocks)
    elif spec.order_bias:
        tilted = [order_weights(spec.order_bias, t, blocks, at_least_one=spec.at_least_one) for t in levels]
        weights = np.stack(tilted)
    else:
        weights = _elbo_weights(spec, levels, blocks)[:, blocks.of_token]
    if spec.t_density == "uniform":
        return weights
    # The second view of a pair has the complement of the level that was drawn, not a draw of its own.
    drawn = np.repeat(levels[::2], 2, axis=0) if spec.is_complementary else levels
    return weights * density_weights(spec, drawn)[:, blocks.of_token]


def _elbo_weights(spec: NoiseSpec, levels: NDArray[np.float64], blocks: SegmentBlocks) -> NDArray[np.float64]:
    """[k, c] weights of the blocks' tokens, of their noise levels [k, c]."""
    if spec.at_least_one and not (spec.is_complementary or spec.is_count or spec.resample_masks):
        return _conditioned_weights(levels, blocks.size)
    # Where t is 0 nothing is masked and the weight is not used.
    weights = np.divide(1.0, levels, out=np.zeros_like(levels), where=levels > 0.0)
    if spec.is_count and spec.is_complementary:
        weights = weights * (blocks.size + 1) / blocks.size
    return weights


def _conditioned_weights(t: NDArray[np.float64], size: NDArray[np.int64]) -> NDArray[np.float64]:
    """[k, c] weights (1 - (1-t)^B) / t of blocks that were drawn with at least one masked token.

    The numerator is the probability of the condition: the empty mask adds nothing to the ELBO, so leaving it
    out and weighing the others by their share keeps it exact. B = 1 gives 1, hence the exact sequential NLL.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        weights = -np.expm1(size * np.log1p(-t)) / t
    return np.where(t > 0.0, weights, size)


def _realised_weights(spec: NoiseSpec, views: NDArray[np.bool_], blocks: SegmentBlocks) -> NDArray[np.float64]:
    """[k, m] weights maskable/masked, counted over the block, or over the segment if t is shared more widely.

    A constant NLL c gives exactly c in every unit with a masked token: none of the variance that comes from
    the number m of masked tokens. The price is a bias. For t over [0, 1] and a block of B the ELBO is the mean
    over m uniform on 1..B (see `diffusion.noise_masks`). Here, with at_least_one, m leans to small counts, whose tokens
    see more context: too low an estimate. Without it, m = 0 adds nothing: B/(B+1) of the ELBO. In a
    complementary pair a view with nothing masked leaves its share to the other.
    """
    span_of = blocks.of_token if spec.t_unit == "block" else np.zeros_like(blocks.of_token)
    total = np.bincount(span_of)
    masked = np.stack([np.bincount(span_of, view, len(total)) for view in views])
    share = len(views) / (masked > 0).sum(axis=0).clip(min=1)
    weights: NDArray[np.float64] = share * total / masked.clip(min=1)
    return weights[:, span_of]

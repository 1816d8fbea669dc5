"""What the NLL of a masked token weighs, given the masks and noise levels of all views."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from megatron_dllm.diffusion.noise_spec import NoiseSpec
from megatron_dllm.diffusion.segment_blocks import SegmentBlocks


def view_weights(
    spec: NoiseSpec, views: NDArray[np.bool_], levels: NDArray[np.float64], blocks: SegmentBlocks
) -> NDArray[np.float64]:
    """Loss weights that a masked token would have, broadcastable to [k, m]."""
    if spec.loss_weight == "uniform":
        return np.ones(1)
    if spec.loss_weight == "realised":
        return _realised_weights(spec, views, blocks)
    if spec.at_least_one and not spec.is_complementary and not spec.is_count:
        return _conditioned_weights(levels, blocks.size)[:, blocks.of_token]
    # Where t is 0 nothing is masked and the weight is not used.
    weights = np.divide(1.0, levels, out=np.zeros_like(levels), where=levels > 0.0)
    if spec.is_count and spec.is_complementary:
        weights = weights * (blocks.size + 1) / blocks.size
    return weights[:, blocks.of_token]


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

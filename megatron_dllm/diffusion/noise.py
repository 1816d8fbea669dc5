"""Which tokens of a segment are masked, at which noise level, and with which loss weight.

`t` is the probability that a token is masked (linear schedule, alpha_t = 1 - t), and the loss weight
1/t makes the weighted sum of masked NLLs an unbiased estimate of the negative ELBO (LLaDA2.0 Eq. 1, 2).

The noise is a pure function of its arguments (see `diffusion.draws`). The K views of a segment share one clean copy;
`view_relation` says how their levels and masks are related:

    independent     every view draws its own levels and masks
    stratified      the range of t has K parts, and each view gets one, in random order; masks are independent
    complementary   views 1 and 2, 3 and 4, ... mask opposite tokens; the pairs are independent

Three more score given tokens: spread, where stratified views take turns in what they mask (`diffusion.spread_masks`),
and without a random number enumerated and left_to_right (`diffusion.exact_views`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from megatron_dllm.diffusion.draws import Draws
from megatron_dllm.diffusion.exact_views import EXACT_RELATIONS, exact_views
from megatron_dllm.diffusion.loss_weights import view_weights
from megatron_dllm.diffusion.noise_levels import view_levels
from megatron_dllm.diffusion.noise_masks import draw_mask, draw_spread_masks
from megatron_dllm.diffusion.noise_spec import SPREAD, NoiseSpec
from megatron_dllm.diffusion.segment_blocks import SegmentBlocks, SegmentKey

FloatArray = NDArray[np.float64]
BoolArray = NDArray[np.bool_]


@dataclass(frozen=True)
class SegmentNoise:
    """The noise of one segment of n tokens in k noisy views.

    Attributes:
        is_masked: [k, n] bool, true where the view shows the mask token.
        loss_weights: [k, n] float32, weight of the NLL; 0 where not masked.
        t: [k, n] float32, noise level of the token's block in that view; 0 where loss_mask is false.
    """

    is_masked: NDArray[np.bool_]
    loss_weights: NDArray[np.float32]
    t: NDArray[np.float32]


def sample_noise(
    spec: NoiseSpec,
    *,
    seed: int,
    epoch: int,
    sample_id: int,
    ordinal: int,
    row_key: int,
    block_ids: NDArray[np.int64],
    loss_mask: NDArray[np.bool_],
) -> SegmentNoise:
    """Draw the masks, weights and noise levels of one segment.

    Args:
        spec: how to draw them.
        seed: seed of the run.
        epoch: pass over the corpus.
        sample_id: identity of the segment; two segments of a corpus never share it.
        ordinal: place of the segment in the shuffled order, which spreads t evenly over neighbours.
        row_key: identity of the packed row; used only with t_unit "row".
        block_ids: [n] int, non-decreasing; may start anywhere, and the first and last block may be partial.
        loss_mask: [n] bool, tokens that may be masked. The others never are and weigh 0.

    Returns:
        The noise of the segment. With loss_weight "elbo", `sum(loss_weights * nll)` over all views divided by
        `k * sum(loss_mask)` is an unbiased estimate of the negative ELBO per token, t uniform on [t_min, t_max).
    """
    assert block_ids.shape == loss_mask.shape and block_ids.ndim == 1, "block_ids and loss_mask are [n]"
    shape = (spec.num_views, len(block_ids))
    noise = SegmentNoise(np.zeros(shape, np.bool_), np.zeros(shape, np.float32), np.zeros(shape, np.float32))
    maskable = np.flatnonzero(loss_mask)
    if not len(maskable):
        return noise
    blocks = SegmentBlocks.group(block_ids[maskable])
    key = SegmentKey.of(spec, int(sample_id), int(ordinal), int(row_key))
    if spec.view_relation in EXACT_RELATIONS:
        views, weights, levels = exact_views(spec.view_relation, blocks.size, spec.num_views)
    else:
        views, levels = _all_views(spec, Draws(int(seed), int(epoch)), key, blocks)
        weights = view_weights(spec, views, levels, blocks)
    noise.is_masked[:, maskable] = views
    noise.loss_weights[:, maskable] = np.where(views, weights, 0.0)
    noise.t[:, maskable] = levels[:, blocks.of_token]
    return noise


def _all_views(spec: NoiseSpec, draws: Draws, key: SegmentKey, blocks: SegmentBlocks) -> tuple[BoolArray, FloatArray]:
    """Which tokens are masked [k, m], and the noise levels [k, c], in every view."""
    num_drawn = spec.num_views // 2 if spec.is_complementary else spec.num_views
    of_view = [replace(draws, view=view) for view in range(num_drawn)]
    levels = view_levels(spec, of_view, key, blocks)
    if spec.view_relation == SPREAD:
        masks = draw_spread_masks(of_view, key, levels, blocks)
    else:
        masks = [draw_mask(spec, view, key, t, blocks) for view, t in zip(of_view, levels, strict=True)]
    if spec.is_complementary:
        masks = [mask for drawn in masks for mask in (drawn, ~drawn)]
        levels = [t for drawn in levels for t in (drawn, 1.0 - drawn)]
    return np.stack(masks), np.stack(levels)

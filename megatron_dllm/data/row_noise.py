"""The noise of a row: that of its segments, each drawn by itself, and what its loss weighs."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_dllm.data.packing import ORDINAL, RowPlan
from megatron_dllm.data.row_tokens import RowContent, RowTokens
from megatron_dllm.data.shuffle import mix_key
from megatron_dllm.diffusion.cart import cart_weights
from megatron_dllm.diffusion.noise import sample_noise
from megatron_dllm.diffusion.noise_spec import NoiseSpec

FloatArray = NDArray[np.float32]
BoolArray = NDArray[np.bool_]


@dataclass(frozen=True)
class RowNoise:
    """The noise of a row's m noisy tokens in every view; row 0 is the clean view, where nothing is masked.

    Attributes:
        is_masked: [k + 1, m] bool tokens that are masked and carry a loss.
        loss_weights: [k + 1, m] fp32 weights of these.
        t: [k + 1, m] fp32 noise levels.
        leading_weights: [l] fp32 weights of the first tokens of blocks that the clean copy predicts, of all views
            together: no noise touches them, so one prediction stands for one in each view, which would weigh 1.
    """

    is_masked: BoolArray
    loss_weights: FloatArray
    t: FloatArray
    leading_weights: FloatArray


def row_key(plan: RowPlan, content: RowContent) -> int:
    """A number that identifies a row's content wherever it is computed."""
    return mix_key(plan.epoch, int(content.sample_ids[0])) if len(content.sample_ids) else 0


def draw_row_noise(plan: RowPlan, content: RowContent, row: RowTokens, noise: NoiseSpec, seed: int) -> RowNoise:
    """The noise of every segment, joined; each segment has its own, whatever lies beside it."""
    noise, tokens = noise.at(plan.progress), row.noisy
    shape = (noise.num_views + 1, len(tokens.ids))
    drawn = RowNoise(
        is_masked=np.zeros(shape, np.bool_),
        loss_weights=np.zeros(shape, np.float32),
        t=np.zeros(shape, np.float32),
        leading_weights=np.full(len(row.leading.ids), noise.num_views, np.float32),
    )
    bounds = np.searchsorted(tokens.segments, np.arange(len(plan.segments) + 1))
    for segment, (start, stop) in enumerate(zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True)):
        span = slice(start, stop)
        segment_noise = sample_noise(
            noise,
            seed=seed,
            epoch=plan.epoch,
            sample_id=int(content.noise_ids[segment]),
            ordinal=int(plan.segments[segment, ORDINAL]),
            row_key=row_key(plan, content),
            block_ids=tokens.noisy_block_ids[span],
            loss_mask=tokens.is_maskable[span],
        )
        drawn.is_masked[1:, span] = segment_noise.is_masked
        drawn.loss_weights[1:, span] = segment_noise.loss_weights
        drawn.t[1:, span] = segment_noise.t
    if noise.loss_weight == "cart":
        is_visible = ~(drawn.is_masked[1:] | tokens.is_hidden)
        drawn.loss_weights[1:] *= cart_weights(is_visible, tokens.noisy_block_ids, tokens.position_ids, noise.cart_p)
    if noise.scales_tokens:
        of_noisy, of_leading = _token_weights(row, noise)
        drawn.loss_weights[1:] *= of_noisy
        drawn.leading_weights[:] *= of_leading
    return drawn


def _token_weights(row: RowTokens, noise: NoiseSpec) -> tuple[FloatArray, FloatArray]:
    """What the weight of each token's loss is multiplied by: [m] fp32 of noisy, [l] fp32 of leading tokens."""
    tokens, num_noisy = row.noisy, len(row.noisy.ids)
    weights = np.append(np.where(tokens.is_fill, noise.fill_weight, 1.0), np.ones(len(row.leading.ids)))
    if noise.loss_per == "answer":
        is_trained = np.append(tokens.is_maskable, np.ones(len(row.leading.ids), np.bool_))
        turns = np.append(tokens.turns, row.leading.turns)
        _, answer = np.unique(np.where(is_trained, turns, -1), return_inverse=True)
        weights /= np.maximum(np.bincount(answer, is_trained), 1.0)[answer]
    of_noisy, of_leading = np.split(weights.astype(np.float32), [num_noisy])
    return of_noisy, of_leading

"""The noise of a row: that of its segments, each drawn by itself, and what its loss weighs."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_dllm.data.packing import ORDINAL, RowPlan
from megatron_dllm.data.row_tokens import NoisyTokens, RowContent
from megatron_dllm.data.shuffle import mix_key
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
    """

    is_masked: BoolArray
    loss_weights: FloatArray
    t: FloatArray


def row_key(plan: RowPlan, content: RowContent) -> int:
    """A number that identifies a row's content wherever it is computed."""
    return mix_key(plan.epoch, int(content.sample_ids[0])) if len(content.sample_ids) else 0


def draw_row_noise(plan: RowPlan, content: RowContent, tokens: NoisyTokens, noise: NoiseSpec, seed: int) -> RowNoise:
    """The noise of every segment, joined; each segment has its own, whatever lies beside it."""
    noise = noise.at(plan.progress)
    shape = (noise.num_views + 1, len(tokens.ids))
    drawn = RowNoise(np.zeros(shape, np.bool_), np.zeros(shape, np.float32), np.zeros(shape, np.float32))
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
    if noise.scales_tokens:
        drawn.loss_weights[1:] *= _token_weights(tokens, noise)
    return drawn


def _token_weights(tokens: NoisyTokens, noise: NoiseSpec) -> FloatArray:
    """[m] fp32 what the weight of each token's loss is multiplied by."""
    weights = np.where(tokens.is_fill, noise.fill_weight, 1.0)
    if noise.loss_per == "answer":
        _, answer = np.unique(np.where(tokens.is_maskable, tokens.turns, -1), return_inverse=True)
        weights /= np.maximum(np.bincount(answer, tokens.is_maskable), 1.0)[answer]
    return weights.astype(np.float32)

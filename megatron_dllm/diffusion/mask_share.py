"""How many tokens of a block a view masks on average: what `diffusion.noise` draws, integrated over the noise levels.

At a level t a block of n tokens has n t masked ones, and where every block is drawn with at least one,
n t / (1 - (1 - t)^n). Over all levels the only token of a block is always masked, of two tokens ln 2 = 0.69, and of
32 tokens 0.5015.
"""

from __future__ import annotations

import numpy as np

from megatron_dllm.diffusion.band_masks import LEAST_LEVEL, FloatArray, expected_counts
from megatron_dllm.diffusion.block_order import order_exponents
from megatron_dllm.diffusion.level_density import drawn_levels
from megatron_dllm.diffusion.noise_spec import NoiseSpec
from megatron_dllm.diffusion.segment_blocks import SegmentBlocks

# Levels of the integral, and moments of a stage whose largest level rises.
_LEVELS, _MOMENTS = 512, 16


def mask_share(spec: NoiseSpec, size: int) -> float:
    """Share of the maskable tokens of a block of `size` that a view masks, as a mean over levels, masks and views."""
    if spec.is_complementary:
        return 0.5  # a pair masks every token once
    if spec.is_count:
        return (size + 1) / (2 * size)
    moments = [spec] if spec.t_max_start is None else [spec.at(moment) for moment in _midpoints(_MOMENTS)]
    return float(np.mean([_share(moment, size) for moment in moments]))


def _midpoints(number: int) -> list[float]:
    return [(place + 0.5) / number for place in range(number)]


def _share(spec: NoiseSpec, size: int) -> float:
    """Of a moment of the stage."""
    levels = np.clip(drawn_levels(spec, np.array(_midpoints(_LEVELS))), LEAST_LEVEL, 1.0)
    if spec.resample_masks:
        sizes = np.full(_LEVELS, size, dtype=np.int64)
        return float(expected_counts(levels, sizes, spec.t_min, spec.t_max).mean()) / size
    masked, any_masked = _probabilities(spec, levels, size)
    return float((masked / any_masked if spec.at_least_one else masked).mean())


def _probabilities(spec: NoiseSpec, levels: FloatArray, size: int) -> tuple[FloatArray, FloatArray]:
    """[l] that a token of a block is masked, as a mean over the block, and that one is at all, at levels [l]."""
    with np.errstate(divide="ignore"):  # a token that is surely masked leaves no probability of none
        if not spec.order_bias:
            return levels, -np.expm1(size * np.log1p(-levels))
        tilted = levels[:, None] ** order_exponents(spec.order_bias, SegmentBlocks.group(np.zeros(size, np.int64)))
        return tilted.mean(axis=1), -np.expm1(np.log1p(-tilted).sum(axis=1))

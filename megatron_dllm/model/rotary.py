"""Rotary position angles by `position_ids`: both copies of a token share one position.

GPTModel's own rotary embedding counts 0, 1, 2, ... along the row, which is right for one document and one copy.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from megatron_dllm.config.rotary_scaling import LLAMA3, NTK, RotaryScalingConfig


def rotary_angles(
    position_ids: Tensor,
    kv_channels: int,
    rotary_percent: float,
    rotary_base: float,
    scaling: RotaryScalingConfig | None = None,
) -> Tensor:
    """Angles whose cosine and sine turn queries and keys, in the half-split (NeoX, HF) order.

    Args:
        position_ids: [b, s] positions of the tokens in their documents.
        kv_channels: features of a head; the first `rotary_percent` of them are turned.
        rotary_percent: HF's partial_rotary_factor.
        rotary_base: HF's rope_theta.
        scaling: to longer contexts; its temperature is megatron-core's part (`temperature_options`).

    Returns:
        [s, b, 1, r] fp32, r = kv_channels x rotary_percent, broadcast over heads by megatron-core.
    """
    frequencies = rotary_frequencies(int(kv_channels * rotary_percent), rotary_base, scaling, position_ids.device)
    angles = position_ids.t().unsqueeze(-1).float() * frequencies
    return torch.cat([angles, angles], dim=-1).unsqueeze(2)


def rotary_frequencies(
    num_features: int, base: float, scaling: RotaryScalingConfig | None = None, device: torch.device | None = None
) -> Tensor:
    """Radians by which a token turns each pair of features further than the one before it.

    The operations are those of transformers' modeling_rope_utils in their order, as angles of far positions show the
    last bits of a frequency.

    Args:
        num_features: of a head that are rotated.
        base: HF's rope_theta.
        scaling: to longer contexts.
        device: of the result.

    Returns:
        [r/2] fp32.
    """
    if scaling is not None and scaling.kind == NTK:
        base = scaling.ntk_base(base, num_features)
    exponents = torch.arange(0, num_features, 2, dtype=torch.float32, device=device) / num_features
    wavelengths = base**exponents
    frequencies = 1.0 / wavelengths
    if scaling is None or scaling.factor == 1.0 or scaling.kind == NTK:
        return frequencies
    if scaling.kind == LLAMA3:
        return _llama3(frequencies, scaling)
    kept = 1 - _yarn_ramp(num_features, base, scaling, device)
    return 1.0 / (scaling.factor * wavelengths) * (1 - kept) + frequencies * kept


def _yarn_ramp(num_features: int, base: float, scaling: RotaryScalingConfig, device: torch.device | None) -> Tensor:
    """[r/2] share of the factor that each pair takes: 0 for the fast ones, 1 for the slow ones."""

    def pair_with(rotations: float) -> float:
        length = scaling.original_max_position_embeddings
        return num_features * math.log(length / (rotations * 2 * math.pi)) / (2 * math.log(base))

    low = max(math.floor(pair_with(scaling.beta_fast)), 0)
    high = min(math.ceil(pair_with(scaling.beta_slow)), num_features - 1)
    width = high - low if high != low else 0.001
    return ((torch.arange(num_features // 2, dtype=torch.float32, device=device) - low) / width).clamp(0, 1)


def _llama3(frequencies: Tensor, scaling: RotaryScalingConfig) -> Tensor:
    """[r/2] frequencies as Llama 3.1 lowers them, from unscaled `frequencies` [r/2]."""
    length = scaling.original_max_position_embeddings
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    wavelengths = 2 * math.pi / frequencies
    is_slow = wavelengths > length / low
    is_medium = ~is_slow & ~(wavelengths < length / high)
    lowered = torch.where(is_slow, frequencies / scaling.factor, frequencies)
    share = (length / wavelengths - low) / (high - low)
    return torch.where(is_medium, (1 - share) * lowered / scaling.factor + share * lowered, lowered)


def temperature_options(scaling: RotaryScalingConfig | None) -> dict[str, Any]:
    """Attributes of megatron-core's TransformerConfig by which it multiplies the rotated features by the temperature.

    Its factor is 0.1 x mscale x ln(factor) + 1. Features that do not turn are left alone, as in partial rotary.
    """
    if scaling is None or scaling.temperature == 1.0:
        return {}
    options: dict[str, Any] = {"yarn_rotary_scaling_factor": scaling.factor}
    if scaling.attention_factor is not None:
        mscale = (scaling.attention_factor - 1.0) / (0.1 * math.log(scaling.factor))
        options |= {"yarn_mscale": mscale, "yarn_mscale_all_dim": 0.0}
    return options

"""Rotary position angles by `position_ids`: both copies of a token share one position.

GPTModel's own rotary embedding counts 0, 1, 2, ... along the row, which is right for one document and one copy.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rotary_angles(position_ids: Tensor, kv_channels: int, rotary_percent: float, rotary_base: float) -> Tensor:
    """Angles whose cosine and sine turn queries and keys, in the half-split (NeoX, HF) order.

    Args:
        position_ids: [b, s] positions of the tokens in their documents.
        kv_channels: features of a head; the first `rotary_percent` of them are turned.
        rotary_percent: HF's partial_rotary_factor.
        rotary_base: HF's rope_theta.

    Returns:
        [s, b, 1, r] fp32, r = kv_channels x rotary_percent, broadcast over heads by megatron-core.
    """
    dim = int(kv_channels * rotary_percent)
    exponents = torch.arange(0, dim, 2, dtype=torch.float32, device=position_ids.device) / dim
    frequencies = 1.0 / (rotary_base**exponents)
    angles = position_ids.t().unsqueeze(-1).float() * frequencies
    return torch.cat([angles, angles], dim=-1).unsqueeze(2)

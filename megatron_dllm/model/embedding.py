"""Noise on the embedding of masked tokens, for the first steps of a conversion (LLaDA2.0 section 7.1).

An autoregressive checkpoint never saw the mask token: its embedding is close to zero. Gaussian noise of a
fraction of a usual row's norm keeps the hidden states of masked tokens apart and finite until it has learnt one.

The noise is a pure function of (seed, row key, token roles, feature). Every rank that holds a token computes the
same noise for it, in every layout and without communication.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_dllm.diffusion.roles import DOC, VIEW

_GOLDEN = 0x9E3779B97F4A7C15
_MIX_1, _MIX_2 = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def mean_row_norm(weight: Tensor, vocab_size: int, tp_group: ProcessGroup | None) -> Tensor:
    """Mean L2 norm of the rows of an embedding that is split over the tensor ranks.

    Args:
        weight: [v/tp, h] this rank's rows.
        vocab_size: rows over all ranks.
        tp_group: ranks that share the rows; None: this rank holds all of them.

    Returns:
        [] fp32, on the device: the host does not wait for it.
    """
    total = torch.linalg.vector_norm(weight.detach(), dim=1, dtype=torch.float32).sum()
    if tp_group is not None and tp_group.size() > 1:
        torch.distributed.all_reduce(total, group=tp_group)
    return total / vocab_size


def mask_noise_std(sigma: float, mean_norm: Tensor, hidden_size: int) -> Tensor:
    """[] standard deviation per feature at which the expected norm of the noise is sigma x mean_norm.

    The norm of h standard normal features has the mean sqrt(2) Gamma((h+1)/2) / Gamma(h/2), nearly sqrt(h).
    """
    expected_norm = math.sqrt(2.0) * math.exp(math.lgamma((hidden_size + 1) / 2) - math.lgamma(hidden_size / 2))
    return sigma * mean_norm / expected_norm


def token_normals(seed: int, row_keys: Tensor, roles: Tensor, position_ids: Tensor, hidden_size: int) -> Tensor:
    """Standard normal features of each token, keyed by what the token is and not by where it lies.

    Args:
        seed: any integer; another seed gives independent noise.
        row_keys: [b] int64 numbers of the rows.
        roles: [b, s, 3] (doc, block, view); doc, view and position tell the tokens of a row apart.
        position_ids: [b, s] position in the document.
        hidden_size: features per token, h.

    Returns:
        [b, s, h] fp32.
    """
    key = _mix(_mix(_as_int64(seed) + row_keys.long()) + 1).unsqueeze(-1)
    key = _mix(_mix(_mix(key + roles[..., DOC].long()) + roles[..., VIEW].long()) + position_ids)
    pairs = (hidden_size + 1) // 2
    counters = torch.arange(1, pairs + 1, device=key.device) * _as_int64(_GOLDEN)
    bits = _mix(key.unsqueeze(-1) + counters)
    # Box-Muller: the upper 32 bits give the radius (never log 0), the lower 32 the angle.
    radius = torch.sqrt(-2.0 * torch.log(((_shift(bits, 32) + 1).double() / 2.0**32).float()))
    angle = (bits & 0xFFFFFFFF).float() * (2.0 * math.pi / 2.0**32)
    return torch.cat([radius * torch.cos(angle), radius * torch.sin(angle)], dim=-1)[..., :hidden_size]


def _as_int64(value: int) -> int:
    value &= 0xFFFFFFFFFFFFFFFF
    return value - (1 << 64) if value >= 1 << 63 else value


def _shift(value: Tensor, bits: int) -> Tensor:
    """Logical right shift of int64 (torch's own keeps the sign)."""
    return (value >> bits) & ((1 << (64 - bits)) - 1)


def _mix(value: Tensor) -> Tensor:
    """The finaliser of SplitMix64 (Steele et al. 2014): 64 well mixed bits of a counter, modulo 2^64."""
    value = (value ^ _shift(value, 30)) * _as_int64(_MIX_1)
    value = (value ^ _shift(value, 27)) * _as_int64(_MIX_2)
    return value ^ _shift(value, 31)

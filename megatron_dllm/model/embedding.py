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
from megatron_dllm.model.mixing import GOLDEN, as_int64, mix, shifted


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
    key = mix(mix(as_int64(seed) + row_keys.long()) + 1).unsqueeze(-1)
    key = mix(mix(mix(key + roles[..., DOC].long()) + roles[..., VIEW].long()) + position_ids)
    pairs = (hidden_size + 1) // 2
    counters = torch.arange(1, pairs + 1, device=key.device) * as_int64(GOLDEN)
    bits = mix(key.unsqueeze(-1) + counters)
    # Box-Muller: the upper 32 bits give the radius (never log 0), the lower 32 the angle.
    radius = torch.sqrt(-2.0 * torch.log(((shifted(bits, 32) + 1).double() / 2.0**32).float()))
    angle = (bits & 0xFFFFFFFF).float() * (2.0 * math.pi / 2.0**32)
    return torch.cat([radius * torch.cos(angle), radius * torch.sin(angle)], dim=-1)[..., :hidden_size]

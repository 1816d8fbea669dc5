"""Distillation: what is asked of a teacher, and the loss of a target from its divergence."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class DistillRule:
    """How a model is distilled.

    Attributes:
        weight: of a target's KL, next to its NLL.
        is_own: the model's own clean tokens teach; otherwise a second model.
        top_k: the teacher's likeliest tokens that are told apart; None: all.
        shift: a position predicts the token after it.
    """

    weight: float
    is_own: bool
    top_k: int | None = None
    shift: bool = False


def top_k_divergence(log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    """KL of the k tokens told apart and of all others as one event: a lower bound of the whole KL, and never negative.

    Its gradient by the student's logits is q - p on these tokens and q (1 - r) on the others, r = (1 - P) / (1 - Q): as
    if the teacher left to the student how the others share what it gives them.

    Args:
        log_p: [T, k] fp32 the teacher's log probabilities.
        log_q: [T, k] fp32 the student's of the same tokens.

    Returns:
        [T] fp32 the KL, and [T] fp32 r.
    """
    p = log_p.exp()
    # Below this, 1 - P is nothing but the rounding of P.
    rest_p, rest_q = ((1.0 - part.sum(-1)).clamp(min=1e-6) for part in (p, log_q.exp()))
    ratio = rest_p / rest_q
    return (p * (log_p - log_q)).sum(-1) + rest_p * torch.log(ratio), ratio

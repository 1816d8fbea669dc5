"""Confidence-aware parallel training (CAP, LLaDA2.0 section 5.2): be certain of what you know.

Decoding accepts a token once its probability is above a threshold. The NLL pushes that probability up ever more weakly,
the more likely the right token already is. CAP adds the entropy of the predictions whose most likely token is right,

    sum of loss_weight * nll  +  coefficient * sum over the right ones of entropy

so that more of them pass the threshold at once. A wrong guess gets no such gradient: it shall stay uncertain.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_dllm.diffusion.losses.nll import level_sums
from megatron_dllm.diffusion.losses.outputs import TargetOutputs
from megatron_dllm.diffusion.losses.step_sums import NUM_BUCKETS

# Probability of the most likely token above which the logged shares call a guess confident.
CONFIDENT = 0.95
# What `confidence_levels` returns.
LEVEL_MEANS = ("confident_right_t", "confident_wrong_t", "entropy_right_t")


def right_entropy(entropy: Tensor, is_correct: Tensor) -> Tensor:
    """Sum of the entropies of right guesses.

    Args:
        entropy: [T] fp32 of each prediction, nats.
        is_correct: [T] bool, whether the most likely token is the target.

    Returns:
        [] fp32; the gradient of the others is exactly 0.
    """
    return torch.where(is_correct, entropy, 0.0).sum()


@torch.no_grad()
def confidence_levels(outputs: TargetOutputs, t: Tensor) -> dict[str, Tensor]:
    """What foretells the tokens that decoding accepts at a time, by noise level.

    Args:
        outputs: of the T targets, with their confidence.
        t: [T] noise level of the target's block.

    Returns:
        By name [NUM_BUCKETS, 2] fp64, a sum and what to divide it by: confident and right, confident and wrong
        guesses over all targets; entropy of right guesses over their number.
    """
    assert outputs.entropy is not None and outputs.max_probability is not None, "the head was not asked for them"
    is_right, is_confident = outputs.is_correct, outputs.max_probability > CONFIDENT
    columns = (
        is_confident & is_right,
        is_confident & ~is_right,
        torch.where(is_right, outputs.entropy, 0.0),
        torch.ones_like(is_right),
        is_right,
    )
    confident_right, confident_wrong, entropy, targets, right = level_sums(
        torch.stack([column.double() for column in columns], dim=-1), t, NUM_BUCKETS
    ).unbind(-1)
    tables = ((confident_right, targets), (confident_wrong, targets), (entropy, right))
    return {name: torch.stack(table, dim=-1) for name, table in zip(LEVEL_MEANS, tables, strict=True)}

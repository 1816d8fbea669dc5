"""What the model says about the targets of a micro-batch: all that a loss is made of."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class TargetOutputs:
    """One value for each of the T targets of a micro-batch, in the order of `Batch.target_ids`.

    Attributes:
        nll: [T] fp32 negative log-likelihood of the target, nats.
        is_correct: [T] bool, whether the target is the most likely token; of equal logits the lowest id wins.
        entropy: [T] fp32 entropy of the predicted distribution, at the temperature that the caller asked for, nats;
            None unless it asked.
        max_probability: [T] fp32 probability of the most likely token at temperature 1, without a gradient; None
            unless the caller asked for the entropy.
        kl: [T] fp32 divergence of the prediction from a teacher's, nats, 0 where it has none; None unless the model is
            distilled.
        has_teacher: [T] bool, whether a teacher predicts the target; None likewise.
    """

    nll: Tensor
    is_correct: Tensor
    entropy: Tensor | None = None
    max_probability: Tensor | None = None
    kl: Tensor | None = None
    has_teacher: Tensor | None = None

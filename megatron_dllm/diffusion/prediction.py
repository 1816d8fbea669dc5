"""Which token stands at a masked place, how sure the model is of it, and whether that is enough to keep it."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_dllm.config import DecodingConfig


def predict(
    logits: Tensor, mask_token_id: int, config: DecodingConfig, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Choose a token for every masked position.

    The confidence is the model's own probability of the chosen token, over the whole vocabulary and at
    temperature 1, also when sampling: so a threshold means the same whatever the sampling options, and
    a small top_k does not make every token look certain. The mask token keeps its share of the
    probability, as in SGLang, but is never chosen.

    Args:
        logits: [m, v] of the masked positions.
        mask_token_id: never predicted.
        config: temperature, top_p and top_k.
        generator: source of randomness, on the device of the logits.

    Returns:
        [m] int64 token ids, and [m] fp32 confidence.

    Raises:
        ValueError: a probability is not a number.
    """
    logits = logits.float()
    probabilities = torch.softmax(logits, dim=1)
    if not bool(torch.isfinite(probabilities).all()):
        raise ValueError(
            "logits (nan or inf) must be finite; the checkpoint has broken weights or overflows in its "
            "precision: compare with precision=fp32."
        )
    candidates = logits.index_fill(1, torch.tensor([mask_token_id], device=logits.device), float("-inf"))
    if config.temperature == 0.0:
        token_ids = candidates.argmax(dim=1)
    else:
        token_ids = _sample(candidates / config.temperature, config.top_p, config.top_k, generator)
    return token_ids, probabilities.gather(1, token_ids.unsqueeze(1)).squeeze(1)


def _sample(logits: Tensor, top_p: float, top_k: int, generator: torch.Generator) -> Tensor:
    """Draw one token per row of `logits` [m, v] among its top_k and the smallest set with probability top_p."""
    ordered, order = logits.sort(dim=1, descending=True, stable=True)
    if top_k:
        ordered[:, top_k:] = float("-inf")
    probabilities = torch.softmax(ordered, dim=1)
    if top_p < 1.0:
        before = probabilities.cumsum(dim=1) - probabilities
        probabilities = probabilities.masked_fill(before >= top_p, 0.0)
    rank = torch.multinomial(probabilities, 1, generator=generator)
    return order.gather(1, rank).squeeze(1)


def accept(confidence: Tensor, threshold: float, min_tokens: int) -> Tensor:
    """Which predictions to keep: all above the threshold, and at least the `min_tokens` most probable.

    Args:
        confidence: [m] probability of each predicted token.
        threshold: keep every prediction that is more probable.
        min_tokens: kept even below the threshold; of equal ones the leftmost first.

    Returns:
        [m] bool.
    """
    is_accepted = confidence > threshold
    if int(is_accepted.sum()) < min_tokens:
        best = confidence.argsort(descending=True, stable=True)[:min_tokens]
        is_accepted[best] = True
    return is_accepted

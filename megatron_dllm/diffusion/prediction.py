"""Which token stands at a masked place, and how sure the model is of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_dllm.config import DecodingConfig


@dataclass(frozen=True)
class Proposals:
    """Predictions of some places; the shapes are those of the places, [m] or [b, n].

    Attributes:
        token_ids: [...] int64.
        confidence: [...] fp32 probability of the token.
        entropy: [...] fp32 of the whole prediction, in nats; 0 where nobody asked for it.
    """

    token_ids: Tensor
    confidence: Tensor
    entropy: Tensor

    def packed(self) -> Tensor:
        """[m, 3] float64 of m places: one tensor to send, without loss."""
        return torch.stack([self.token_ids.double(), self.confidence.double(), self.entropy.double()], dim=1)

    @classmethod
    def unpacked(cls, values: Tensor, is_place: Tensor) -> Proposals:
        """The predictions of `values` [m, 3], put where `is_place` [b, n] bool has its m true values; 0 elsewhere."""
        spread = values.new_zeros(*is_place.shape, 3)
        spread[is_place] = values
        return cls(spread[..., 0].long(), spread[..., 1].float(), spread[..., 2].float())


def predict(
    logits: Tensor,
    mask_token_id: int,
    config: DecodingConfig,
    generators: Sequence[torch.Generator],
    counts: Sequence[int],
) -> Proposals:
    """Choose a token for every masked position.

    The confidence is the model's own probability of the chosen token, over the whole vocabulary and at
    temperature 1, also when sampling: so a threshold means the same whatever the sampling options, and
    a small top_k does not make every token look certain. The mask token keeps its share of the
    probability, as in SGLang, but is never chosen.

    Args:
        logits: [m, v] of the masked positions, text by text; overwritten.
        mask_token_id: never predicted.
        config: temperature, top_p and top_k; whether its rule reads entropies.
        generators: source of randomness of each text, on the device of the logits.
        counts: positions of each text; they add up to m.

    Raises:
        ValueError: a probability is not a number.
    """
    logits = logits.float()
    partition = torch.logsumexp(logits, dim=1)
    if not bool(torch.isfinite(partition).all()):
        raise ValueError(
            "logits (nan or inf) must be finite; the checkpoint has broken weights or overflows in its "
            "precision: compare with precision=fp32."
        )
    entropy = _entropy(logits, partition) if config.rule == "entropy_bound" else torch.zeros_like(partition)
    logits[:, mask_token_id] = float("-inf")
    if config.temperature == 0.0:
        token_ids = logits.argmax(dim=1)
    else:
        parts = zip(torch.split(logits, list(counts)), generators, strict=True)
        token_ids = torch.cat([_sample(part / config.temperature, config, generator) for part, generator in parts])
    chosen = logits.gather(1, token_ids.unsqueeze(1)).squeeze(1)
    return Proposals(token_ids, (chosen - partition).exp(), entropy)


def _entropy(logits: Tensor, partition: Tensor) -> Tensor:
    """[m] nats of softmax(logits [m, v]), `partition` [m] their logsumexp."""
    log_p = logits - partition.unsqueeze(1)
    return -(log_p.exp() * log_p.clamp(min=torch.finfo(log_p.dtype).min)).sum(dim=1)


def _sample(logits: Tensor, config: DecodingConfig, generator: torch.Generator) -> Tensor:
    """Draw one token per row of `logits` [m, v] among its top_k and the smallest set with probability top_p."""
    if not len(logits):
        return torch.zeros(0, dtype=torch.int64, device=logits.device)
    ordered, order = logits.sort(dim=1, descending=True, stable=True)
    if config.top_k:
        ordered[:, config.top_k :] = float("-inf")
    probabilities = torch.softmax(ordered, dim=1)
    if config.top_p < 1.0:
        before = probabilities.cumsum(dim=1) - probabilities
        probabilities = probabilities.masked_fill(before >= config.top_p, 0.0)
    rank = torch.multinomial(probabilities, 1, generator=generator)
    return order.gather(1, rank).squeeze(1)

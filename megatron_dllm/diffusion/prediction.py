"""Which token stands at a masked place, and how sure the model is of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from megatron_dllm.config import DecodingConfig
from megatron_dllm.diffusion.credit import Trace, add_credit


@dataclass(frozen=True)
class Proposals:
    """Predictions of some places; the shapes are those of the places, [m] or [b, n].

    Attributes:
        token_ids: [...] int64.
        confidence: [...] fp32 probability of the token.
        entropy: [...] fp32 of the whole prediction, in nats; 0 where nobody asked for it.
        first_ids: [...] int64 the most probable token, before credit is added; 0 where nobody asked for it.
        first_confidence: [...] fp32 its probability; 0 where nobody asked for it.
    """

    token_ids: Tensor
    confidence: Tensor
    entropy: Tensor
    first_ids: Tensor
    first_confidence: Tensor

    def packed(self) -> Tensor:
        """[m, NUM_VALUES] float64 of m places: one tensor to send, without loss."""
        return torch.stack([getattr(self, item.name).double() for item in fields(self)], dim=1)

    @classmethod
    def unpacked(cls, values: Tensor, is_place: Tensor) -> Proposals:
        """The predictions of `values` [m, NUM_VALUES], put at the m true values of `is_place` [b, n]; 0 elsewhere."""
        spread = values.new_zeros(*is_place.shape, NUM_VALUES)
        spread[is_place] = values
        ids, confidence, entropy, first_ids, first_confidence = spread.unbind(-1)
        return cls(ids.long(), confidence.float(), entropy.float(), first_ids.long(), first_confidence.float())


# Columns of `Proposals.packed`.
NUM_VALUES = len(fields(Proposals))


def predict(
    logits: Tensor,
    mask_token_id: int,
    config: DecodingConfig,
    generators: Sequence[torch.Generator],
    counts: Sequence[int],
    trace: Trace | None = None,
) -> Proposals:
    """Choose a token for every masked position.

    The confidence is the model's own probability of the chosen token, over the whole vocabulary and at
    temperature 1, also when sampling: so a threshold means the same whatever the sampling options, and
    a small top_k does not make every token look certain. The mask token keeps its share of the
    probability, as in SGLang, but is never chosen. With a trace, both follow from logits with credit.

    Args:
        logits: [m, v] of the masked positions, text by text; overwritten.
        mask_token_id: never predicted.
        config: temperature, top_p and top_k; whether its rule reads entropies.
        generators: source of randomness of each text, on the device of the logits.
        counts: positions of each text; they add up to m.
        trace: [m, c] what earlier passes had first, for the rule credit; None: another rule.

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
    first_ids, first_confidence = _no_first(partition)
    if trace is not None:
        first_ids, first_confidence = _first(logits, partition, mask_token_id)
        logits = add_credit(logits, trace.to(logits.device).grown(first_ids, first_confidence), config)
        partition = torch.logsumexp(logits, dim=1)
    logits[:, mask_token_id] = float("-inf")
    if config.temperature == 0.0:
        token_ids = logits.argmax(dim=1)
    else:
        parts = zip(torch.split(logits, list(counts)), generators, strict=True)
        token_ids = torch.cat([_sample(part / config.temperature, config, generator) for part, generator in parts])
    chosen = logits.gather(1, token_ids.unsqueeze(1)).squeeze(1)
    return Proposals(token_ids, (chosen - partition).exp(), entropy, first_ids, first_confidence)


def _no_first(partition: Tensor) -> tuple[Tensor, Tensor]:
    """What `_first` gives, [m] each, where nobody asks; `partition` [m] are logsumexps."""
    return torch.zeros_like(partition, dtype=torch.int64), torch.zeros_like(partition)


def _first(logits: Tensor, partition: Tensor, mask_token_id: int) -> tuple[Tensor, Tensor]:
    """[m] the most probable tokens of logits [m, v] and [m] their probabilities; `partition` [m] are logsumexps."""
    kept = logits[:, mask_token_id].clone()
    logits[:, mask_token_id] = float("-inf")
    largest, token_ids = logits.max(dim=1)
    logits[:, mask_token_id] = kept
    return token_ids, (largest - partition).exp()


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

"""Which predictions of a pass are kept: rules that all read confidences and differ in how many they trust.

Every rule is a pure function of the open blocks of all texts. Whatever it says, a pass keeps at least
`min_tokens_per_step` tokens of each block, the most probable first, so decoding always comes to an end.

    threshold      every token more probable than `threshold` (LLaDA2.0 section 5.4; SGLang's LowConfidence)
    factor         the n most probable, n the largest with (n + 1)(1 - p_n) < factor, p_n the n-th probability
                   (Fast-dLLM): the more tokens at once, the surer each must be
    hierarchy      those above `threshold`, and the most probable one of each run of masked neighbours if it is above
                   `low_threshold` (dInfer): it splits runs, so that few neighbours are guessed in one pass
    entropy_bound  in order of probability, while the entropies of the tokens but for the largest add up to at most
                   `entropy_bound` nats: a bound on what guessing them independently can cost
    credit         those above `threshold`, where tokens that pass after pass predicts have gained in probability
                   (`diffusion.credit`): what is said again is believed sooner
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from megatron_dllm.config import DecodingConfig
from megatron_dllm.diffusion.prediction import Proposals


def accept(found: Proposals, is_masked: Tensor, config: DecodingConfig) -> Tensor:
    """Which predictions to keep, by the rule of the configuration.

    Args:
        found: of every place, [b, n] each; only those of masked places are read.
        is_masked: [b, n] bool, the places that are to be filled, b blocks.
        config: rule and its settings.

    Returns:
        [b, n] bool, masked places only.
    """
    confidence = found.confidence.masked_fill(~is_masked, -1.0)
    is_accepted = _RULES[config.rule](replace(found, confidence=confidence), is_masked, config)
    return (is_accepted | (_rank(confidence) < config.min_tokens_per_step)) & is_masked


def _rank(confidence: Tensor) -> Tensor:
    """[b, n] rank of each token in its block by confidence [b, n], the surest 0; of equal ones the leftmost first."""
    return confidence.argsort(dim=1, descending=True, stable=True).argsort(dim=1)


def _threshold(found: Proposals, is_masked: Tensor, config: DecodingConfig) -> Tensor:
    return found.confidence > config.threshold


def _factor(found: Proposals, is_masked: Tensor, config: DecodingConfig) -> Tensor:
    ordered = found.confidence.sort(dim=1, descending=True).values
    number = torch.arange(1, ordered.shape[1] + 1)
    is_safe = (number + 1) * (1.0 - ordered) < config.factor
    largest = torch.where(is_safe, number, 0).amax(dim=1, keepdim=True)
    return _rank(found.confidence) < largest


def _hierarchy(found: Proposals, is_masked: Tensor, config: DecodingConfig) -> Tensor:
    num_rows, width = is_masked.shape
    begins = is_masked & ~torch.nn.functional.pad(is_masked[:, :-1], (1, 0))
    # Runs of masked neighbours, numbered over all rows; other places share a number of their own.
    runs = begins.flatten().cumsum(0).view(num_rows, width).masked_fill(~is_masked, 0).flatten()
    num_runs = int(runs.max()) + 1
    ranks = (_rank(found.confidence) + torch.arange(num_rows).unsqueeze(1) * width).flatten()
    first = ranks.new_full((num_runs,), num_rows * width).scatter_reduce(0, runs, ranks, "amin")
    is_best = (ranks == first[runs]).view(num_rows, width)
    return (found.confidence > config.threshold) | (is_best & (found.confidence > config.low_threshold))


def _entropy_bound(found: Proposals, is_masked: Tensor, config: DecodingConfig) -> Tensor:
    order = found.confidence.argsort(dim=1, descending=True, stable=True)
    entropy = found.entropy.double().masked_fill(~is_masked, float("inf")).gather(1, order)
    cost = entropy.cumsum(dim=1) - entropy.cummax(dim=1).values
    # inf - inf of places that are not masked is nan, and so not within any bound.
    number = (cost <= config.entropy_bound).sum(dim=1, keepdim=True)
    return order.argsort(dim=1) < number


_RULES: dict[str, Callable[[Proposals, Tensor, DecodingConfig], Tensor]] = {
    "threshold": _threshold,
    "factor": _factor,
    "hierarchy": _hierarchy,
    "entropy_bound": _entropy_bound,
    "credit": _threshold,
}

"""The ELBO of long documents by position: what a token costs the model, the further it stands from the beginning.

Each stretch of positions is a continuation of all that stands before it, scored as any other (`evaluation.likelihood`).
A model that cannot use what is far away costs the same from some position on; one whose angles are beyond its training
costs more there. A flat curve does not show that the model finds what is far away: needles do.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_dllm.config.needle import NeedleConfig
from megatron_dllm.data.source import Source
from megatron_dllm.evaluation.continuations import Continuation
from megatron_dllm.evaluation.likelihood import Likelihood


@dataclass(frozen=True)
class Stretch:
    """What tokens at these positions cost.

    Attributes:
        start: first position.
        stop: behind the last one.
        nats_per_token: mean over the documents, the exact NLL of an autoregressive model.
        standard_error: of that mean over the documents; None for one document.
    """

    start: int
    stop: int
    num_documents: int
    nats_per_token: float
    standard_error: float | None


def stretches_of(config: NeedleConfig, source: Source) -> list[Continuation]:
    """The stretches of `num_documents` documents that fill the context, document by document.

    Raises:
        ValueError: the corpus has no document as long as the context.
    """
    context = config.schedule.context_length
    long = np.flatnonzero(np.asarray(source.document_lengths) >= context)
    if not len(long):
        raise ValueError(
            f"data.validation ({source.name}) must hold documents of at least schedule.context_length ({context}) "
            "tokens to measure the ELBO by position; name longer texts, or set num_documents to 0."
        )
    chosen = np.random.default_rng(config.seed).permutation(long)[: config.num_documents]
    stretches = []
    for document in chosen.tolist():
        tokens = tuple(source.read(document, 0, context).tolist())
        for start in range(0, context, config.stretch_length):
            stop = min(start + config.stretch_length, context)
            stretches.append(Continuation(tokens[:start], tokens[start:stop], start, f"positions {start} to {stop}"))
    return stretches


def by_position(stretches: Sequence[Continuation], found: Sequence[Likelihood]) -> list[Stretch]:
    """The curve, from the likelihoods of all stretches."""
    groups: dict[tuple[int, int], list[float]] = {}
    for item, likelihood in zip(stretches, found, strict=True):
        place = (len(item.context), len(item.context) + len(item.tokens))
        groups.setdefault(place, []).append(-likelihood.value / len(item.tokens))
    return [
        Stretch(start, stop, len(values), statistics.fmean(values), _error(values))
        for (start, stop), values in sorted(groups.items())
    ]


def _error(values: Sequence[float]) -> float | None:
    return None if len(values) < 2 else statistics.stdev(values) / math.sqrt(len(values))

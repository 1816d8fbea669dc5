"""The likelihood of continuations: requests as documents of the one scorer, and what is known of each score's error.

    1 plan    share the continuations out by the noisy views they take            evaluation/estimators.py
    2 group   choices that end in the block where they begin share their context  evaluation/shared_contexts.py
    3 source  context fixed, continuation with a loss, fill behind it             evaluation/continuations.py
    4 rows    packed in order, so that the choices of a question lie together     data/packing.py
    5 score   one forward pass of each row, sums by document and view             evaluation/scores.py

A score depends on nothing but its continuation, the estimator and the seed: not on the rows, the layout, or on what
else is asked. It is a log-likelihood in nats, never divided by the number of tokens.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from megatron_dllm.config.likelihood import LikelihoodConfig
from megatron_dllm.data.packing import RowStream
from megatron_dllm.evaluation.continuations import Continuation
from megatron_dllm.evaluation.estimators import Pass, plan_passes
from megatron_dllm.evaluation.local_model import LocalModel
from megatron_dllm.evaluation.progress import watched
from megatron_dllm.evaluation.request_rows import request_rows
from megatron_dllm.evaluation.row_loader import row_loader
from megatron_dllm.evaluation.scores import score_documents
from megatron_dllm.evaluation.shared_contexts import group_choices

# A decision whose gap is below so many standard errors is not one.
_SURE_ERRORS = 2.0


@dataclass(frozen=True)
class Likelihood:
    """The estimated log-likelihood of a continuation, nats.

    Attributes:
        by_view: the estimate of each noisy view; a single number where it is exact.
        is_exact: nothing was left to chance.
    """

    by_view: tuple[float, ...]
    is_exact: bool

    @property
    def value(self) -> float:
        """The mean over the views."""
        return statistics.fmean(self.by_view)

    @property
    def standard_error(self) -> float | None:
        """Of the value; None where one view says nothing of it.

        Views whose levels are spread evenly are a little better than this: it takes them for independent.
        """
        return 0.0 if self.is_exact else _error_of_mean(self.by_view)


@dataclass(frozen=True)
class Decision:
    """Which of several continuations is the likeliest, and how sure that is.

    Attributes:
        best: its place; of equal ones the first.
        gap: nats to the second.
        standard_error: of the gap, from the views that both share; None where it is not known.
    """

    best: int
    gap: float
    standard_error: float | None

    @property
    def is_sure(self) -> bool:
        """Whether the gap is at least two standard errors."""
        return self.standard_error is not None and self.gap >= _SURE_ERRORS * self.standard_error


def decide(choices: Sequence[Likelihood]) -> Decision:
    """Compare two continuations or more.

    They were scored with the same noise, so much of each one's error is the other's too: the error of the gap is that
    of the differences, view by view.
    """
    order = sorted(range(len(choices)), key=lambda place: -choices[place].value)
    first, second = choices[order[0]], choices[order[1]]
    return Decision(order[0], first.value - second.value, _error_of_gap(first, second))


def _error_of_gap(first: Likelihood, second: Likelihood) -> float | None:
    if first.is_exact and second.is_exact:
        return 0.0
    num_views = max(len(item.by_view) for item in (first, second) if not item.is_exact)
    one, other = (item.by_view * num_views if item.is_exact else item.by_view for item in (first, second))
    return _error_of_mean([a - b for a, b in zip(one, other, strict=True)])


def _error_of_mean(values: Sequence[float]) -> float | None:
    return None if len(values) < 2 else statistics.stdev(values) / math.sqrt(len(values))


def score_continuations(
    model: LocalModel, continuations: Sequence[Continuation], settings: LikelihoodConfig, block_size: int | None
) -> list[Likelihood]:
    """The likelihood of each continuation (a collective: all ranks ask the same, and know every answer).

    Args:
        model: what scores them.
        continuations: in the order of the result; equal ones are scored once.
        settings: of the estimate, validated.
        block_size: of the grid; None: the model is autoregressive and scored exactly.

    Raises:
        ValueError: an empty continuation, or one that does not fit the window.
    """
    context_length = model.config.schedule.context_length
    fitted = [item.fitted(context_length, settings.truncate) for item in continuations]
    different = list(dict.fromkeys(fitted))
    if block_size is None:
        passes = [Pass(tuple(range(len(different))), None, is_exact=True)] if different else []
    else:
        passes = plan_passes(different, settings, block_size, context_length)
    found: dict[Continuation, Likelihood] = {}
    for one in passes:
        asked = [different[place] for place in one.places]
        for item, scores in zip(asked, _score(model, asked, settings, block_size, one), strict=True):
            by_view = [float(scores.mean())] if one.is_exact else scores.tolist()
            found[item] = Likelihood(tuple(by_view), one.is_exact)
    return [found[item] for item in fitted]


def _score(
    model: LocalModel, asked: Sequence[Continuation], settings: LikelihoodConfig, block_size: int | None, one: Pass
) -> NDArray[np.float64]:
    """[d, k] the scores of the continuations of one pass, in order."""
    context_length = model.config.schedule.context_length
    groups: dict[int, list[tuple[int, ...]]] = {1: [(place,) for place in range(len(asked))]}
    # With a shift, a clean slot predicts the first token of a block, and choices differ in it.
    if block_size is not None and not model.shift:
        row_length = settings.row_length or 2 * context_length
        groups = group_choices(asked, block_size, settings.fill, context_length, one.num_views, row_length)
    found = np.zeros((len(asked), one.num_views))
    for members in groups.values():
        scores = _score_groups(model, asked, members, settings, block_size, one)
        found[np.array(members).flatten()] = scores.reshape(-1, one.num_views)
    return found


@torch.no_grad()
def _score_groups(
    model: LocalModel,
    asked: Sequence[Continuation],
    members: Sequence[Sequence[int]],
    settings: LikelihoodConfig,
    block_size: int | None,
    one: Pass,
) -> NDArray[np.float64]:
    """[g, c * k] the scores of g groups of c continuations, which share a context if c is more than 1."""
    source, dataset = request_rows(model, asked, members, settings, block_size, one)
    chunk, num_views = model.config.data.packing_chunk, len(members[0]) * one.num_views
    stream = RowStream(source.document_lengths, settings.seed, chunk, shuffle=False, spans=source.spans)
    by_id: dict[int, NDArray[np.float64]] = {}
    for step in watched(row_loader(model.config, model.groups, dataset, stream), "scoring choices"):
        scores = score_documents(model.chunks, step.micro_batches, model.device, model.groups, num_views)
        by_id.update(zip(scores.sample_ids.tolist(), scores.by_view.numpy(), strict=True))
    return np.stack([by_id[source.sample_id(group, 0)] for group in range(len(members))])

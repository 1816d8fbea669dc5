"""The pass before a step whose loss compares documents: their scores decide the loss weights that the step trains with.

1 score   all documents of the global batch, without gradients, on the masks of the step itself
2 compare them with the reference's scores; the objective turns both into a factor for each document
3 scale   the loss weights of its targets; the ordinary step has the gradient of the loss
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from megatron_dllm.data.batch import Batch
from megatron_dllm.diffusion.losses.document_scores import DocumentScores, Weighing
from megatron_dllm.evaluation.scores import score_documents
from megatron_dllm.model.objective import Objective
from megatron_dllm.parallel.groups import Groups
from megatron_dllm.training.balancing import balance_batches
from megatron_dllm.training.frozen import FrozenModel

# Given this rank's micro-batches, whose documents have these scores: [d, k] or [d, 1] fp64 scores of the reference.
Reference = Callable[[Sequence[Batch], DocumentScores], Tensor]


class StartRefused(ValueError):
    """What only the first step can show: the run does not start from its reference."""


def check_start_margin(objective: Objective, weighing: Weighing) -> None:
    """Refuse a run whose first margins are not 0, as those of a model that is its own reference are.

    Raises:
        StartRefused: on every rank.
    """
    if weighing.largest_margin > objective.largest_start_margin:
        raise StartRefused(
            f"the margins of the first pairs (up to {weighing.largest_margin:.4g} nats) must be 0, within "
            f"{objective.largest_start_margin:.4g}, as the run starts from its reference; preference.reference is of "
            "other weights, another layout or precision than checkpoint.load here: score the reference again, or take "
            "preference.reference=frozen."
        )


@dataclass(frozen=True)
class FrozenReference:
    """A copy of the weights that the run started from, on the same layout: it scores the same rows.

    Attributes:
        model: the copy.
    """

    model: FrozenModel

    def __call__(self, micro_batches: Sequence[Batch], scores: DocumentScores) -> Tensor:
        """[d, k] fp64 scores by view (a collective)."""
        num_views, model = scores.by_view.shape[1], self.model
        return score_documents(model.chunks, micro_batches, model.device, model.groups, num_views).by_view


def weigh_batches(
    chunks: list[nn.Module],
    micro_batches: Sequence[Batch],
    device: torch.device,
    groups: Groups,
    objective: Objective,
    reference: Reference | None,
) -> tuple[list[Batch], Weighing | None]:
    """A global batch as it is to be trained (a collective); the batch itself where its weights follow from rows alone.

    Args:
        chunks: the local model.
        micro_batches: this data-parallel rank's, of whole rows.
        device: where to compute.
        groups: of this rank.
        objective: of the step.
        reference: what the objective compares the scores with.

    Returns:
        The micro-batches with their loss weights, and what these follow from.
    """
    if objective.weigh is None:
        return balance_batches(micro_batches, objective.ar_weight, device, groups), None
    assert objective.noise is not None and reference is not None, "scores need noise and a reference"
    scores = score_documents(chunks, micro_batches, device, groups, objective.noise.num_views)
    weighing = objective.weigh(scores, reference(micro_batches, scores))
    return [_weighed(batch, weighing) for batch in micro_batches], weighing


def _weighed(batch: Batch, weighing: Weighing) -> Batch:
    """A micro-batch on the host whose loss weights have the factors of their documents and views."""
    factors = weighing.of_documents(batch.sample_ids, batch.segment_epochs)
    views = batch.target_views
    of_view = factors[batch.target_segments, (views - 1) % factors.shape[1]]
    # What a clean slot predicts counts in every view.
    of_targets = torch.where(views > 0, of_view, factors.mean(dim=1)[batch.target_segments])
    weighed = replace(batch, loss_weights=(batch.loss_weights.double() * of_targets).float())
    return weighed.pin_memory() if batch.loss_weights.is_pinned() else weighed

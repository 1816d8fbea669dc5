"""What a run of preferences compares its model with, on this rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megatron_dllm.config import TrainConfig
from megatron_dllm.data.batch import Batch
from megatron_dllm.diffusion.losses.document_scores import DocumentScores
from megatron_dllm.evaluation.scores_file import StoredScores, open_scores
from megatron_dllm.training.engine import Engine
from megatron_dllm.training.frozen import load_frozen
from megatron_dllm.training.start import FrozenWeights
from megatron_dllm.training.weighing import FrozenReference, Reference


@dataclass(frozen=True)
class StoredReference:
    """Scores that were computed once, see `training.scoring`.

    Attributes:
        stored: of the corpus that the run trains on.
    """

    stored: StoredScores

    def __call__(self, micro_batches: Sequence[Batch], scores: DocumentScores) -> Tensor:
        """[d, k] fp64 the scores of the same documents by view."""
        return self.stored.of(scores.sample_ids, scores.epochs)


def open_reference(
    config: TrainConfig, engine: Engine, weights: FrozenWeights | None, device: torch.device
) -> Reference | None:
    """The scores of the weights that the run started from (a collective).

    Args:
        config: in the layout of this start.
        engine: of the run.
        weights: what the start decided on; None: no stage compares anything.
        device: where this rank computes.

    Raises:
        ValueError: the weights are damaged.
    """
    if weights is None:
        return None
    if config.preference.scores_file is not None:
        return StoredReference(open_scores(Path(config.preference.scores_file)))
    return FrozenReference(load_frozen(config, engine.groups, weights.folder, device))

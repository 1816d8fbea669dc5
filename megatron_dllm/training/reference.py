"""What a run of preferences compares its model with, on this rank."""

from __future__ import annotations

import torch

from megatron_dllm.checkpoint.loading import load_weights
from megatron_dllm.config import TrainConfig
from megatron_dllm.training.engine import Engine, build_chunks
from megatron_dllm.training.start import ReferenceWeights
from megatron_dllm.training.weighing import FrozenReference, Reference


def open_reference(
    config: TrainConfig, engine: Engine, weights: ReferenceWeights | None, device: torch.device
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
    # As for training: the copy takes the same paths as the model, and so comes to the same numbers.
    chunks = build_chunks(config, engine.groups, is_training=True)
    load_weights(weights.folder, chunks, config.checkpoint.verify)
    for chunk in chunks:
        chunk.requires_grad_(False)
    return FrozenReference(chunks, device, engine.groups)

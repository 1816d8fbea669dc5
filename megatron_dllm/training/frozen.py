"""A second model that stays as it is, beside the one that is trained, on the same layout and in its precision.

It is the reference of preferences, or the teacher of a distillation.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from megatron_dllm.checkpoint.loading import load_weights
from megatron_dllm.config import TrainConfig
from megatron_dllm.parallel.groups import Groups
from megatron_dllm.training.engine import build_chunks


@dataclass(frozen=True)
class FrozenModel:
    """Weights without gradients and without an optimizer.

    Attributes:
        chunks: the local part of the model.
        device: where it lies.
        groups: of this rank.
    """

    chunks: list[nn.Module]
    device: torch.device
    groups: Groups


def load_frozen(config: TrainConfig, groups: Groups, folder: Path, device: torch.device) -> FrozenModel:
    """Load a checkpoint as a second model (a collective).

    Args:
        config: in the layout of this start.
        groups: of that layout.
        folder: of the checkpoint.
        device: where this rank computes.

    Raises:
        ValueError: the weights are damaged.
    """
    # As for training: it takes the same paths as the model, and so comes to the same numbers.
    chunks = build_chunks(config, groups, is_training=True)
    load_weights(folder, chunks, config.checkpoint.verify)
    for chunk in chunks:
        chunk.requires_grad_(False)
    return FrozenModel(chunks, device, groups)

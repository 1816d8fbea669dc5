"""What every measurement of a loaded model takes: this rank's part of it, its layout and its device."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from megatron_dllm.config import TrainConfig
from megatron_dllm.parallel.groups import Groups


@dataclass(frozen=True)
class LocalModel:
    """This rank's part of a model.

    Attributes:
        chunks: of this pipeline rank.
        config: of the measurement: sizes, context length, layout, rows of a forward pass.
        groups: of this rank.
        device: where to compute.
    """

    chunks: list[nn.Module]
    config: TrainConfig
    groups: Groups
    device: torch.device

    @property
    def shift(self) -> bool:
        """Whether the slot before a token predicts it: what the stage that stands for the measurement says."""
        return any(stage.is_shifted for stage in self.config.schedule.stages.values())

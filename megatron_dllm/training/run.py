"""What a run consists of on one rank, once it stands."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_dllm.config import TrainConfig
from megatron_dllm.data.blend_stream import BlendStream
from megatron_dllm.diffusion.block_schedule import BlockSchedule
from megatron_dllm.training.engine import Engine
from megatron_dllm.training.frozen import FrozenModel
from megatron_dllm.training.observers.observer import Observer
from megatron_dllm.training.parts import Parts
from megatron_dllm.training.saving import Saver
from megatron_dllm.training.spikes import SpikeRule
from megatron_dllm.training.stop import StopRequest
from megatron_dllm.training.weighing import Reference


@dataclass(frozen=True)
class Run:
    """What a run consists of on this rank, once it stands.

    Attributes:
        given_config: as the run was started.
        config: the same in the layout of this start.
        parts: what it is put together from.
        schedule: its stages.
        stream: the sequence of its rows, at the position where it continues.
        engine: model and optimizer.
        saver: of its checkpoints.
        observers: told of steps, saves and validations.
        spikes: which gradient norms are withheld.
        stop: requests to stop.
        device: where this rank computes.
        resumed_from: the checkpoint it continues from, if any.
        reference: what losses that compare documents compare their scores with, if any.
        teacher: the second model that some stage is distilled from, if any.
    """

    given_config: TrainConfig
    config: TrainConfig
    parts: Parts
    schedule: BlockSchedule
    stream: BlendStream
    engine: Engine
    saver: Saver
    observers: Sequence[Observer]
    spikes: SpikeRule
    stop: StopRequest
    device: torch.device
    resumed_from: Path | None
    reference: Reference | None
    teacher: FrozenModel | None

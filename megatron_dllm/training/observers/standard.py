"""The observers that every run has, in the order in which they are told."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_dllm.config import TrainConfig
from megatron_dllm.diffusion.block_schedule import BlockSchedule
from megatron_dllm.training.engine import Engine
from megatron_dllm.training.observers.blend_shares import BlendShares
from megatron_dllm.training.observers.context_balance import ContextBalance
from megatron_dllm.training.observers.fingerprint import DataFingerprint
from megatron_dllm.training.observers.mask_embedding import MaskEmbeddingNorm
from megatron_dllm.training.observers.metrics import MetricsWriter
from megatron_dllm.training.observers.observer import Observer
from megatron_dllm.training.observers.progress import Progress
from megatron_dllm.training.observers.router_load import RouterLoad
from megatron_dllm.training.observers.step_dump import StepDump
from megatron_dllm.training.observers.step_timing import StepTiming


@dataclass(frozen=True)
class Setting:
    """What observers may know of a run before its first step.

    Attributes:
        config: in the layout of this start.
        given_config: as the run was started.
        run_folder: where the run writes.
        schedule: its stages.
        engine: model and optimizer of this rank.
        device: where this rank computes.
        wandb_mode: disabled, offline or online.
    """

    config: TrainConfig
    given_config: TrainConfig
    run_folder: Path
    schedule: BlockSchedule
    engine: Engine
    device: torch.device
    wandb_mode: str


def standard_observers(setting: Setting) -> list[Observer]:
    """Those that all ranks have, as they compare or add up what ranks know, and those of rank 0, which writes."""
    config, groups = setting.config, setting.engine.groups
    observers: list[Observer] = [StepDump(setting.run_folder, setting.given_config, groups)]
    if config.model.is_moe:
        observers.append(
            RouterLoad(
                setting.engine.chunks,
                groups.tensor,
                config.model.num_layers,
                config.model.num_moe_experts,
                config.parallel.recompute == "full",
            )
        )
    observers += [
        MaskEmbeddingNorm(
            setting.engine, config.model.mask_token_id, setting.device, config.optimizer.overlap_param_gather
        ),
        DataFingerprint(groups.data),
        ContextBalance(config.parallel, groups.data, setting.device),
        StepTiming(setting.engine, setting.device),
    ]
    if dist.get_rank() == 0:
        observers += [
            BlendShares(),
            Progress(setting.schedule),
            MetricsWriter(setting.run_folder, config, setting.wandb_mode),
        ]
    return observers

"""The global batches of a stage, as this rank sees them."""

from __future__ import annotations

from collections.abc import Callable

from megatron_dllm.config import StageConfig, TrainConfig
from megatron_dllm.data.blend_stream import BlendStream
from megatron_dllm.data.geometry import RowGeometry
from megatron_dllm.data.loader import BatchLoader, RowDataset
from megatron_dllm.model.objective import Objective
from megatron_dllm.parallel.groups import Groups


def stage_loader(
    config: TrainConfig,
    stage: StageConfig,
    objective: Objective,
    stream: BlendStream,
    groups: Groups,
    progress: Callable[[int], float] | None = None,
) -> BatchLoader:
    """The batches from the stream's position on.

    Args:
        config: of the run.
        stage: whose rows and batches they are.
        objective: of the stage.
        stream: advanced in place.
        groups: of this rank.
        progress: see `BatchLoader`.
    """
    dataset = RowDataset(
        stream.documents,
        RowGeometry.of_stage(stage, config.schedule, config.data),
        objective.noise,
        config.run.seed,
        config.model.mask_token_id,
        config.model.pad_token_id,
        config.model.eos_token_id,
    )
    return BatchLoader(
        dataset,
        stream,
        global_batch_size=stage.global_batch_size,
        micro_batch_size=stage.micro_batch_size,
        data_parallel_rank=groups.data.rank(),
        data_parallel_size=groups.data.size(),
        num_workers=config.data.num_workers,
        progress=progress,
    )

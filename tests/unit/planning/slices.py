"""Some layers of the real models, small enough for the engine to run them in seconds."""

from __future__ import annotations

from dataclasses import replace

from megatron_dllm.compose import compose_train_config
from megatron_dllm.config import ParallelConfig, ScheduleConfig, TrainConfig
from tests.unit.config.configs import stage_config

BF16 = ParallelConfig(precision="bf16")
_TWO_STAGES = dict(pipeline_model_parallel_size=2, expert_model_parallel_size=8)
# Model, layers, GPUs, rank, layout.
SLICES = {
    "mini": ("ling_mini", 3, 8, 0, dict(expert_model_parallel_size=8)),
    "mini recomputed": ("ling_mini", 3, 8, 0, dict(expert_model_parallel_size=8, recompute="full")),
    "flash, first rank": ("ling_flash", 4, 32, 0, dict(context_parallel_size=2, **_TWO_STAGES)),
    "flash, last rank": ("ling_flash", 4, 32, 16, dict(context_parallel_size=2, **_TWO_STAGES)),
    "flash over tensor ranks": (
        "ling_flash",
        3,
        16,
        0,
        dict(
            tensor_model_parallel_size=4,
            sequence_parallel=True,
            expert_model_parallel_size=16,
            expert_tensor_parallel_size=1,
        ),
    ),
    "qwen3": ("qwen3_30b_a3b", 4, 16, 0, _TWO_STAGES),
}


def real_config(model: str, **layout: object) -> TrainConfig:
    """A run of one of the models of recipes/model, in bf16."""
    config = compose_train_config([f"model={model}", "data.train=x", "run.name=x"])
    return replace(config, parallel=replace(BF16, **layout))


def slice_of(name: str) -> tuple[TrainConfig, int]:
    """A run of one of the slices with as many micro-batches as pipeline ranks, and its GPUs."""
    model, num_layers, num_gpus, _, layout = SLICES[name]
    config = real_config(model, **layout)
    rows = config.parallel.data_parallel_size(num_gpus) * config.parallel.pipeline_model_parallel_size
    stages = {"one": stage_config(global_batch_size=rows)}
    schedule = ScheduleConfig(context_length=4096, stages=stages)
    return replace(config, model=replace(config.model, num_layers=num_layers), schedule=schedule), num_gpus

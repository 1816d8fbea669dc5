"""Right configurations, in which a test changes what is to be refused; and the message of a refusal."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from megatron_dllm.config import (
    DataConfig,
    ModelConfig,
    ParallelConfig,
    RunConfig,
    ScheduleConfig,
    StageConfig,
    TrainConfig,
)


def model_config(**changes: object) -> ModelConfig:
    """12 layers, 8 heads in 4 groups, 16 experts in 4 groups."""
    fields = dict(
        num_layers=12,
        hidden_size=64,
        ffn_hidden_size=96,
        num_attention_heads=8,
        num_query_groups=4,
        kv_channels=16,
        vocab_size=192,
        max_position_embeddings=4096,
        num_dense_layers=1,
        num_moe_experts=16,
        moe_ffn_hidden_size=32,
        moe_shared_expert_intermediate_size=32,
        moe_router_topk=4,
        moe_router_num_groups=4,
        moe_router_group_topk=2,
        mask_token_id=2,
        eos_token_id=0,
        pad_token_id=1,
    )
    return ModelConfig(**{**fields, **changes})


def stage_config(**changes: object) -> StageConfig:
    fields = dict(block_size=32, num_tokens=1000, global_batch_size=16, learning_rate=1e-3)
    return StageConfig(**{**fields, **changes})


def train_config(**sections: object) -> TrainConfig:
    fields = dict(
        run=RunConfig(name="run"),
        model=model_config(),
        data=DataConfig(train="corpus"),
        schedule=ScheduleConfig(context_length=256, stages={"one": stage_config()}),
    )
    return TrainConfig(**{**fields, **sections})


def layout_config(**sizes: object) -> ParallelConfig:
    names = dict(
        tp="tensor_model_parallel_size",
        pp="pipeline_model_parallel_size",
        cp="context_parallel_size",
        ep="expert_model_parallel_size",
        vpp="virtual_pipeline_model_parallel_size",
        etp="expert_tensor_parallel_size",
        first="num_layers_in_first_pipeline_stage",
        last="num_layers_in_last_pipeline_stage",
    )
    return ParallelConfig(**{names.get(name, name): size for name, size in sizes.items()})


def refusal_of(validate: Callable[[], None]) -> str:
    with pytest.raises(ValueError) as raised:
        validate()
    return str(raised.value)

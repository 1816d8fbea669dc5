"""Which sizes products in FP8 take."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron_dllm.config import ModelConfig, ParallelConfig, ScheduleConfig, TrainConfig
from tests.unit.config.configs import model_config, refusal_of, stage_config, train_config

FP8 = ParallelConfig(precision="fp8")
SIZES = dict(hidden_size=256, ffn_hidden_size=512, num_attention_heads=8, num_query_groups=4, kv_channels=64)


def _config(model: ModelConfig, layout: ParallelConfig, row_length: int = 512) -> TrainConfig:
    schedule = ScheduleConfig(context_length=256, row_length=row_length, stages={"one": stage_config()})
    return train_config(model=model, parallel=layout, schedule=schedule)


def _wide(**changes: object) -> ModelConfig:
    return model_config(**{**SIZES, "moe_ffn_hidden_size": 128, "moe_shared_expert_intermediate_size": 128, **changes})


def test_sizes_in_whole_blocks_are_taken() -> None:
    _config(_wide(), FP8).validate(1)
    _config(_wide(num_moe_experts=0, num_dense_layers=0, moe_ffn_hidden_size=100), FP8).validate(1)


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        (dict(hidden_size=192), "hidden_size (192)"),
        (dict(ffn_hidden_size=320), "ffn_hidden_size (320)"),
        (dict(moe_ffn_hidden_size=64), "moe_ffn_hidden_size (64)"),
        (dict(kv_channels=40), "num_attention_heads x kv_channels (320)"),
    ],
)
def test_others_are_refused(changes: dict[str, object], name: str) -> None:
    message = refusal_of(lambda: _config(_wide(**changes), FP8).validate(1))
    assert "parallel.precision (fp8) needs multiples of 128" in message and f"model.{name}" in message


def test_a_rank_takes_whole_blocks_of_the_model_and_of_a_row() -> None:
    halves = replace(FP8, tensor_model_parallel_size=2, sequence_parallel=True)
    message = refusal_of(lambda: _config(_wide(), halves).validate(2))
    assert "moe_ffn_hidden_size (128) on 2 tensor ranks is 64 each" in message
    message = refusal_of(lambda: _config(_wide(), FP8, row_length=576).validate(1))
    assert "schedule.row_length (576)" in message and "(128)" in message and "use 640" in message

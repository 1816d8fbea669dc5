"""Memory by closed form, against what others have published and measured."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron_dllm.config import DistillConfig, OptimizerConfig, ParallelConfig, TrainConfig
from megatron_dllm.config.assumptions import AssumptionsConfig
from megatron_dllm.planning.answer import RankMemory
from megatron_dllm.planning.engine import measure
from megatron_dllm.planning.layers import Tokens, layer_cost
from megatron_dllm.planning.memory import model_state, pipeline_in_flight, rank_memory
from megatron_dllm.planning.micro_batch import micro_batch_of, skips_outputs
from megatron_dllm.planning.parameters import pipeline_ranks, rank_weights
from megatron_dllm.planning.rows import RowContent
from megatron_dllm.planning.work import assumed_work
from tests.unit.config.configs import stage_config
from tests.unit.planning.slices import SLICES, real_config, slice_of

BF16 = ParallelConfig(precision="bf16")


def _memory(config: TrainConfig, row: RowContent, num_gpus: int, rank: int = 0) -> RankMemory:
    stage = stage_config(global_batch_size=num_gpus)
    batch = micro_batch_of(config.model, config.parallel, stage, row, num_gpus, 1.0, config.training)
    held = pipeline_ranks(config.model, config.parallel)[rank]
    sizes = dict(optimizer=config.optimizer, num_models=1 + config.has_second_model)
    return rank_memory(config.model, config.parallel, held, batch, num_gpus, 0, **sizes)


def test_the_published_peak_of_qwen3_30b() -> None:
    """Megatron-Bridge: 61.35 GB allocated on 16 H100, EP16, 4096 tokens of AR, gradients in bf16."""
    config = real_config("qwen3_30b_a3b", expert_model_parallel_size=16)
    config.optimizer.gradients = "bf16"
    memory = _memory(config, RowContent(4096, 4096.0, 4096.0, 4096 * 4097 / 2, ""), 16)
    assert memory.total / 1e9 == pytest.approx(61.35, rel=0.05)


@pytest.mark.parametrize(
    ("model", "tensor_size", "expected"), [("ling_mini", 1, 99.8), ("ling_flash", 4, 48.3), ("qwen3_30b_a3b", 1, 123.8)]
)
def test_bytes_that_a_layer_keeps_for_a_token(model: str, tensor_size: int, expected: float) -> None:
    """kB that were counted by hand, of tensors that the engine was seen to keep."""
    config = real_config(model, tensor_model_parallel_size=tensor_size, expert_tensor_parallel_size=1)
    cost = layer_cost(config.model, config.parallel, Tokens(1000.0, 1000.0, 0.0), True, 1.0)
    assert cost.kept / 1000 / 1e3 == pytest.approx(expected, abs=0.05)


def test_what_is_offloaded_leaves_the_gpu() -> None:
    config = real_config("ling_mini", expert_model_parallel_size=8)
    held = rank_weights(config.model, config.parallel, pipeline_ranks(config.model, config.parallel)[0])
    half, none = (
        model_state(held, config.parallel, 16, OptimizerConfig(offload="cpu", offload_fraction=share))
        for share in (0.5, 1.0)
    )
    whole = model_state(held, config.parallel, 16)
    assert whole[:2] == half[:2] == none[:2]
    assert half[2] == pytest.approx(whole[2] / 2, rel=1e-9) and none[2] == 0
    short = model_state(held, config.parallel, 16, OptimizerConfig(moments="bf16"))
    assert short[2] == pytest.approx(whole[2] * 8 / 12, rel=1e-9)


def test_the_optimizer_is_shared_by_replicas_of_each_kind_of_weight() -> None:
    """100B on 64 GPUs, TP4 PP4 EP16: experts have one replica, dense weights four, and 12 bytes a weight each."""
    sizes = dict(tensor_model_parallel_size=4, sequence_parallel=True, pipeline_model_parallel_size=4)
    config = real_config("ling_flash", **sizes, expert_model_parallel_size=16, expert_tensor_parallel_size=1)
    memory = _memory(config, RowContent(8192, 4096.0, 2048.0, 0.0, ""), 64, rank=1)
    experts = 8 * 256 // 16 * 3 * 4096 * 1024
    dense = 109_119_488
    assert memory.weights == 2 * (experts + dense) and memory.gradients == 4 * (experts + dense)
    assert memory.optimizer == 12 * experts + 12 * dense // 4


@pytest.mark.slow
@pytest.mark.parametrize("name", SLICES)
def test_a_slice_of_a_real_model_is_what_the_engine_holds(name: str) -> None:
    """State to 0.1 %, activations and head to 10 %, of some layers of the real models with rows of 8192 tokens."""
    config, num_gpus = slice_of(name)
    rank, stages, stage = SLICES[name][3], config.parallel.pipeline_model_parallel_size, config.schedule.stages["one"]
    expected = measure(config, config.parallel, num_gpus, rank, "one").worst.memory
    (work,) = assumed_work(config, AssumptionsConfig())
    batch = micro_batch_of(config.model, config.parallel, stage, work.row, num_gpus, 1.0, config.training)
    held = pipeline_ranks(config.model, config.parallel)[rank // (num_gpus // stages)]
    memory = rank_memory(config.model, config.parallel, held, batch, num_gpus, 0)
    assert memory.weights == expected.weights and memory.rank == expected.rank
    assert memory.gradients == pytest.approx(expected.gradients, rel=0.001)
    assert memory.optimizer == pytest.approx(expected.optimizer, rel=0.001)
    assert memory.activations + memory.head == pytest.approx(expected.activations + expected.head, rel=0.1)


@pytest.mark.parametrize(
    ("pieces", "expected"), [(None, [4, 3, 2, 1]), (2, [11 / 2, 9 / 2, 7 / 2, 5 / 2])], ids=["1F1B", "interleaved"]
)
def test_micro_batches_in_flight(pieces: int | None, expected: list[float]) -> None:
    layout = replace(BF16, pipeline_model_parallel_size=4, virtual_pipeline_model_parallel_size=pieces)
    assert [pipeline_in_flight(layout, rank, 64) for rank in range(4)] == expected
    assert max(pipeline_in_flight(layout, rank, 2) for rank in range(4)) == 2


def test_a_second_model_has_weights_alone() -> None:
    row, config = RowContent(8192, 4096.0, 2048.0, 4096.0**2, ""), real_config("ling_mini")
    one = _memory(config, row, 8)
    taught = stage_config(distill=DistillConfig(1.0, "teacher"))
    config.schedule = replace(config.schedule, stages={"taught": taught})
    assert _memory(config, row, 8) == replace(one, weights=2 * one.weights)


def test_each_way_to_recompute_keeps_less() -> None:
    row = RowContent(8192, 4096.0, 2048.0, 4096.0**2, "")
    kept = [_memory(real_config("ling_mini", recompute=way), row, 8).total for way in ("none", "selective", "full")]
    assert kept[0] > kept[1] > kept[2]


def test_fp8_keeps_copies_of_the_layers_weights_and_computes_every_token() -> None:
    """One byte for a weight of the layers as it is, and one transposed; the last layer cannot leave tokens out."""
    row, layout = RowContent(8192, 4096.0, 2048.0, 4096.0**2, ""), dict(expert_model_parallel_size=8)
    plain, fp8 = real_config("ling_mini", **layout), real_config("ling_mini", precision="fp8", **layout)
    held = rank_weights(plain.model, plain.parallel, pipeline_ranks(plain.model, plain.parallel)[0])
    in_layers = held.total - 2 * plain.model.vocab_size * plain.model.hidden_size
    assert _memory(fp8, row, 8).weights == _memory(plain, row, 8).weights + 2 * in_layers
    assert skips_outputs(plain.parallel, plain.training) and not skips_outputs(fp8.parallel, fp8.training)
    assert not skips_outputs(replace(plain.parallel, moe_token_dispatcher="flex"), plain.training)

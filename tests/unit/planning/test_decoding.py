"""What a plan of decoding says, against what decoding allocates here, and its command."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from megatron_dllm.config import DecodingConfig, ParallelConfig, TrainConfig
from megatron_dllm.config.plan import TextsConfig
from megatron_dllm.planning.decoding import cache_bytes, cache_growth, decoding_memory, most_texts, plan_decoding
from megatron_dllm.planning.parameters import pipeline_ranks
from tests.planning_case import MODEL
from tests.unit.planning.setting import setting_for

NUMBER = 8
TEXTS = TextsConfig(batch_size=NUMBER, prompt_length=200, max_new_tokens=300, block_size=32, tokens_per_pass=32.0)
BIG = replace(MODEL, kv_channels=64)
MINI = dict(prompt_length=1024, max_new_tokens=1024, block_size=32)


def _decode(texts: TextsConfig, groups: Any) -> tuple[int, int, Any]:
    """Bytes of the weights and of the peak beside them, and the cache, of a real decoding on this CPU."""
    from megatron_dllm.config import TrainingConfig
    from megatron_dllm.diffusion.decode import DecodingContract, decode_all, requests_of
    from megatron_dllm.inference.cached_forward import CachedForward
    from megatron_dllm.model.gpt import build_model
    from megatron_dllm.model.paths import choose_paths
    from megatron_dllm.parallel.device import DeviceFacts
    from megatron_dllm.planning.engine_memory import LiveMemory

    memory = LiveMemory()
    with memory:
        training = TrainingConfig(skip_unused_outputs=False)
        paths = choose_paths(BIG, ParallelConfig(), DeviceFacts.here(), "auto")
        model = build_model(BIG, ParallelConfig(), groups, paths=paths, training=training).eval()
        weights = memory.live
        forward = CachedForward(model, groups)
        config = DecodingConfig(max_new_tokens=texts.max_new_tokens, min_tokens_per_step=texts.block_size)
        contract = DecodingContract(texts.block_size, 4096, BIG.mask_token_id, (BIG.vocab_size,))
        prompts = [[3 + (start + place) % 900 for place in range(texts.prompt_length)] for start in range(2 * NUMBER)]
        memory.start_peak()
        decode_all(forward, requests_of(prompts, config), config, contract, NUMBER)
    return weights, memory.peak - weights, forward


@pytest.mark.usefixtures("one_rank")
def test_a_decoding_holds_what_is_planned(one_rank: Any) -> None:
    """Keys and values to the byte; the whole peak, of which they are the largest part, to a tenth."""
    weights, peak, forward = _decode(TEXTS, one_rank)
    setting, layout = setting_for(TrainConfig(model=BIG), expert_imbalance=1.0, reserve_gb=0.0), ParallelConfig()
    (rank,) = pipeline_ranks(BIG, layout)
    planned = decoding_memory(setting, layout, rank, TEXTS, NUMBER)
    assert planned.weights == pytest.approx(weights, rel=0.01)
    tables = [forward._cache._roles, *(part for layer in forward._cache._layers.values() for part in layer)]
    assert {(table.shape[0], table.shape[1]) for table in tables} == {(NUMBER, cache_growth(TEXTS)[0])}
    assert cache_bytes(BIG, layout, BIG.num_layers, TEXTS, NUMBER) == sum(table.nbytes for table in tables)
    assert planned.cache > 0.4 * peak
    assert planned.total - planned.weights == pytest.approx(peak, rel=0.1)


def test_room_grows_by_256_tokens_and_then_by_halves() -> None:
    growth = [cache_growth(replace(TEXTS, prompt_length=100, max_new_tokens=number)) for number in (28, 200, 1000)]
    assert growth == [(256, 0), (512, 256), (1152, 768)]


def test_tensor_ranks_share_keys_and_values_by_heads() -> None:
    layout = ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True, precision="bf16")
    whole, half = (
        cache_bytes(MODEL, one, 4, TEXTS, 1) for one in (replace(layout, tensor_model_parallel_size=1), layout)
    )
    capacity, _ = cache_growth(TEXTS)
    assert whole - 12 * capacity == 2 * (half - 12 * capacity)


def test_as_many_texts_as_fit_and_not_one_more() -> None:
    config = TrainConfig(model=BIG, parallel=ParallelConfig(precision="bf16"))
    setting, texts = setting_for(config, memory_gb=5.0), TextsConfig(**MINI)
    most = most_texts(setting, config.parallel, texts)
    (rank,) = pipeline_ranks(BIG, config.parallel)
    sizes = [decoding_memory(setting, config.parallel, rank, texts, number).total for number in (most, most + 1)]
    assert sizes[0] <= setting.limit < sizes[1] and most > 1
    assert plan_decoding(setting, config.parallel, 1, texts).texts == most


def test_time_of_a_decoding_by_hand() -> None:
    """Passes of a block, one of them to keep it; twice as many tokens a pass save half of the others."""
    config = TrainConfig(model=BIG, parallel=ParallelConfig(precision="bf16"))
    setting = setting_for(config, host_ms_per_layer=30.0)
    slow, fast = (
        plan_decoding(setting, config.parallel, 1, TextsConfig(batch_size=2, **MINI, tokens_per_pass=number))
        for number in (2.0, 4.0)
    )
    assert (slow.num_passes, fast.num_passes) == (32 * 17, 32 * 9)
    # Four layers, each a third of the host's time; everything else hides behind it but the reading of the cache.
    assert slow.pass_time.total == pytest.approx(4 * 0.01, rel=0.01)
    assert slow.tokens_per_second == pytest.approx(2 * 1024 / (slow.prefill + 544 * slow.pass_time.total))
    assert fast.tokens_per_second > 1.8 * slow.tokens_per_second

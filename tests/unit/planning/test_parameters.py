"""Weights of a pipeline rank: the layers that megatron-core deals to it, and the elements that the builder makes."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from megatron.core.transformer.transformer_block import get_num_layers_to_build
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from benchmarks.layout_parameters import any_layout, compare
from megatron_dllm.config import ModelConfig, ParallelConfig
from megatron_dllm.model.megatron_config import transformer_config
from megatron_dllm.model.paths import choose_paths
from megatron_dllm.parallel.device import DeviceFacts
from megatron_dllm.planning.engine import num_parameters
from megatron_dllm.planning.parameters import pipeline_ranks, rank_weights, replicas
from tests.unit.config.configs import model_config, train_config


def _random_pipeline(draw: random.Random) -> tuple[ModelConfig, ParallelConfig]:
    """A model and a way to cut it, even or not, in one piece a rank or several."""
    size, pieces = draw.choice([2, 3, 4, 6]), draw.choice([1, 1, 2, 3])
    share = pieces * draw.randint(1, 3)
    first, last = (draw.choice([None, pieces * draw.randint(1, 2)]) for _ in range(2))
    if size == 2 and pieces > 1:
        last = None  # what megatron-core divides by the number of middle ranks
    counts = [first or share, *[share] * (size - 2), last or share]
    layers = sum(counts)
    model = model_config(num_layers=layers, num_dense_layers=draw.randint(0, min(4, layers - 1)))
    layout = ParallelConfig(
        pipeline_model_parallel_size=size,
        virtual_pipeline_model_parallel_size=pieces if pieces > 1 else None,
        num_layers_in_first_pipeline_stage=first,
        num_layers_in_last_pipeline_stage=last,
    )
    return model, layout


@pytest.mark.parametrize("seed", range(40))
def test_layers_are_dealt_as_megatron_core_deals_them(seed: int) -> None:
    model, layout = _random_pipeline(random.Random(seed))
    layout.validate(layout.pipeline_model_parallel_size, model)
    paths = choose_paths(model, layout, DeviceFacts.as_cuda(has_transformer_engine=False))
    config = transformer_config(model, layout, paths)
    for rank in pipeline_ranks(model, layout):
        expected = []
        pieces = layout.virtual_pipeline_model_parallel_size
        for piece in range(pieces) if pieces else (None,):
            start = get_transformer_layer_offset(config, vp_stage=piece, pp_rank=rank.index)
            number = get_num_layers_to_build(config, vp_stage=piece, pp_rank=rank.index)
            expected += [layer >= model.num_dense_layers for layer in range(start, start + number)]
        assert (rank.num_dense, rank.num_moe) == (expected.count(False), expected.count(True))


def _random_layout(draw: random.Random) -> tuple[ModelConfig, ParallelConfig, int]:
    """A small model and a layout of up to 32 ranks for it, some with more tensor ranks than query groups."""
    is_tied, has_norm = draw.random() < 0.3, draw.random() < 0.7
    sizes = dict(num_query_groups=draw.choice([2, 4, 8]), tie_word_embeddings=is_tied, qk_layernorm=has_norm)
    sizes |= dict(add_qkv_bias=not has_norm, qk_layernorm_spans_heads=has_norm and is_tied)
    experts = draw.choice([{}, {}, dict(num_moe_experts=0), dict(moe_shared_expert_intermediate_size=0)])
    model = model_config(num_layers=draw.choice([4, 6]), num_dense_layers=draw.choice([0, 1, 3]), **sizes, **experts)
    num_ranks = draw.choice([4, 8, 16, 32])
    return model, any_layout(draw, model, num_ranks), num_ranks


@pytest.mark.ranks  # builds a part of a model
@pytest.mark.parametrize("seed", range(60))
def test_elements_are_those_that_the_engine_builds(seed: int) -> None:
    draw = random.Random(seed)
    model, layout, num_ranks = _random_layout(draw)
    ranks = pipeline_ranks(model, layout)
    rank = draw.choice(ranks)
    beside = draw.randrange(num_ranks // len(ranks))
    expected = num_parameters(
        train_config(model=model), layout, num_ranks, rank.index * num_ranks // len(ranks) + beside
    )
    assert rank_weights(model, layout, rank).total == expected


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ling_mini", "ling_flash", "qwen3_30b_a3b"])
def test_elements_of_the_real_models_are_those_that_the_engine_builds(name: str) -> None:
    """The benchmark compares more layouts."""
    rows = compare(name, number=2, seed=1)
    assert [row["closed_form"] for row in rows] == [row["engine"] for row in rows], rows


def test_a_tied_head_is_counted_once_on_a_rank_that_has_both() -> None:
    model = replace(model_config(), tie_word_embeddings=True)
    of_vocabulary = model.vocab_size * model.hidden_size
    whole = rank_weights(model, ParallelConfig(), pipeline_ranks(model, ParallelConfig())[0])
    untied = replace(model, tie_word_embeddings=False)
    assert rank_weights(untied, ParallelConfig(), pipeline_ranks(model, ParallelConfig())[0]).dense == (
        whole.dense + of_vocabulary
    )
    layout = ParallelConfig(pipeline_model_parallel_size=2)
    both = [rank_weights(model, layout, rank).dense for rank in pipeline_ranks(model, layout)]
    assert sum(both) == whole.dense + of_vocabulary, "the last rank has a copy"


def test_replicas_of_dense_weights_and_of_experts() -> None:
    layout = ParallelConfig(
        tensor_model_parallel_size=4,
        pipeline_model_parallel_size=4,
        expert_model_parallel_size=16,
        expert_tensor_parallel_size=1,
    )
    assert replicas(layout, 512) == (32, 8)

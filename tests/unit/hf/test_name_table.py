"""The map covers both sides exactly, has the published counts, and interleaves as megatron-core does."""

from __future__ import annotations

from dataclasses import replace
from math import prod

import pytest
import torch

from megatron_dllm.config import ModelConfig
from megatron_dllm.hf.name_table import EACH, FUSED, STACKED, experts_form, extra_state_keys, key_aliases, weight_map
from tests.tiny_models import LING, MODELS, QWEN3_MOE

LING_MINI = ModelConfig(
    num_layers=20,
    hidden_size=2048,
    ffn_hidden_size=5120,
    num_attention_heads=16,
    num_query_groups=4,
    kv_channels=128,
    vocab_size=157184,
    num_dense_layers=1,
    num_moe_experts=256,
    moe_ffn_hidden_size=512,
    moe_shared_expert_intermediate_size=512,
    moe_router_topk=8,
    moe_router_num_groups=8,
    moe_router_group_topk=4,
    mask_token_id=156895,
    eos_token_id=156892,
    pad_token_id=156892,
)
LING_FLASH = replace(
    LING_MINI,
    num_layers=32,
    hidden_size=4096,
    ffn_hidden_size=9216,
    num_attention_heads=32,
    moe_ffn_hidden_size=1024,
    moe_shared_expert_intermediate_size=1024,
)


@pytest.mark.parametrize(
    ("model", "num_tensors", "num_elements"),
    [(LING_MINI, 14_813, 16_255_643_392), (LING_FLASH, 24_161, 102_889_697_280 + 31 * 256)],
)
def test_has_the_published_number_of_tensors_and_parameters(
    model: ModelConfig, num_tensors: int, num_elements: int
) -> None:
    names = weight_map(model)
    assert len(names.hf_shapes) == num_tensors
    assert sum(prod(shape) for shape in names.hf_shapes.values()) == num_elements
    assert sum(prod(shape) for shape in names.mcore_shapes.values()) == num_elements


@pytest.mark.parametrize("experts", [EACH, STACKED, FUSED])
@pytest.mark.parametrize("name", MODELS)
def test_covers_every_element_of_both_sides_once(name: str, experts: str) -> None:
    names = weight_map(MODELS[name], experts=experts)
    hf = {key: torch.zeros(prod(shape), dtype=torch.int32) for key, shape in names.hf_shapes.items()}
    mcore = {key: torch.zeros(shape, dtype=torch.int32) for key, shape in names.mcore_shapes.items()}
    for piece in names.pieces:
        hf[piece.hf_name][piece.hf_start : piece.hf_start + piece.num_elements] += 1
        mcore[piece.mcore_key][tuple(slice(a, a + n) for a, n in zip(piece.offsets, piece.sizes, strict=True))] += 1
    assert all(bool((count == 1).all()) for count in [*hf.values(), *mcore.values()])


@pytest.mark.parametrize("experts", [EACH, STACKED, FUSED])
def test_names_say_how_experts_are_kept(experts: str) -> None:
    assert experts_form(weight_map(LING, experts=experts).hf_shapes) == experts
    assert experts_form(weight_map(MODELS["qwen3"], experts=experts).hf_shapes) == EACH


def _to_mcore(model: ModelConfig, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    names = weight_map(model)
    result = {key: torch.full(shape, float("nan")) for key, shape in names.mcore_shapes.items()}
    for piece in names.pieces:
        values = tensors[piece.hf_name].flatten()[piece.hf_start : piece.hf_start + piece.num_elements]
        result[piece.mcore_key][tuple(slice(a, a + n) for a, n in zip(piece.offsets, piece.sizes, strict=True))] = (
            values.view(piece.sizes)
        )
    return result


def _random_tensors(model: ModelConfig) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name, shape in weight_map(model).hf_shapes.items()}


@pytest.mark.parametrize("model", [LING, QWEN3_MOE])
def test_query_key_value_are_interleaved_by_group(model: ModelConfig) -> None:
    tensors = _random_tensors(model)
    heads, groups, dim = model.num_attention_heads, model.num_query_groups, model.kv_channels
    if model.family == "bailing_moe":
        query, key, value = tensors["model.layers.1.attention.query_key_value.weight"].split(
            [heads * dim, groups * dim, groups * dim]
        )
    else:
        query, key, value = (tensors[f"model.layers.1.self_attn.{part}_proj.weight"] for part in "qkv")
    expected = torch.cat(
        [query.view(groups, heads // groups * dim, -1), key.view(groups, dim, -1), value.view(groups, dim, -1)], dim=1
    ).flatten(0, 1)
    assert torch.equal(_to_mcore(model, tensors)["decoder.layers.1.self_attention.linear_qkv.weight"], expected)


def test_gate_stands_above_up_and_experts_are_stacked() -> None:
    tensors = _random_tensors(LING)
    mcore = _to_mcore(LING, tensors)
    experts = [
        torch.cat([tensors[f"model.layers.2.mlp.experts.{e}.{part}_proj.weight"] for part in ("gate", "up")])
        for e in range(LING.num_moe_experts)
    ]
    assert torch.equal(mcore["decoder.layers.2.mlp.experts.experts.linear_fc1.weight"], torch.stack(experts))
    expected_dense = torch.cat(
        [tensors["model.layers.0.mlp.gate_proj.weight"], tensors["model.layers.0.mlp.up_proj.weight"]]
    )
    assert torch.equal(mcore["decoder.layers.0.mlp.linear_fc1.weight"], expected_dense)
    assert torch.equal(mcore["decoder.layers.1.mlp.router.expert_bias"], tensors["model.layers.1.mlp.gate.expert_bias"])


def test_aliases_name_the_norm_before_experts_as_transformer_engine_does() -> None:
    assert key_aliases(LING) == {
        "decoder.layers.1.mlp.linear_fc1.layer_norm_weight": "decoder.layers.1.pre_mlp_layernorm.weight",
        "decoder.layers.2.mlp.linear_fc1.layer_norm_weight": "decoder.layers.2.pre_mlp_layernorm.weight",
    }
    assert key_aliases(MODELS["qwen3"]) == {}


def test_extra_states_belong_to_linear_layers() -> None:
    keys = list(extra_state_keys(LING))
    assert len(keys) == len(set(keys)) == 3 * 2 + 2 + 2 * (2 + 2 * LING.num_moe_experts)
    assert "decoder.layers.1.mlp.experts.experts.linear_fc1._extra_state/shard_3_4" in keys

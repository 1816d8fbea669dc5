"""Which architectures can hold a model, and what their classes must have."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from megatron_dllm.hf.architectures import ARCHITECTURES_OF_FAMILY
from megatron_dllm.hf.export_limits import as_exported, check_architecture
from tests.tiny_models import LING, LLAMA, MIXTRAL, MODELS, QWEN3, QWEN3_MOE


@pytest.mark.parametrize("name", MODELS)
def test_every_family_fits_its_architectures(name: str) -> None:
    for architecture in ARCHITECTURES_OF_FAMILY[MODELS[name].family]:
        check_architecture(MODELS[name], architecture)


@pytest.mark.parametrize(
    ("model", "changes", "architecture", "message"),
    [
        (QWEN3_MOE, {}, "llada2_moe", r"architecture \(llada2_moe\) has other tensors than .* qwen3_moe; use one of"),
        (QWEN3_MOE, {"num_dense_layers": 1}, "sdar_moe", r"num_dense_layers \(1\) must be 0 in SDARMoeForCausalLM"),
        (QWEN3_MOE, {"moe_shared_expert_intermediate_size": 10}, "sdar_moe", "moe_shared_expert_intermediate_size"),
        (
            QWEN3_MOE,
            {"moe_router_score_function": "sigmoid"},
            "qwen3_moe",
            r"score_function \(sigmoid\) must be softmax",
        ),
        (QWEN3_MOE, {"moe_router_enable_expert_bias": True}, "sdar_moe", "moe_router_enable_expert_bias"),
        (QWEN3_MOE, {"moe_router_topk_scaling_factor": 2.5}, "sdar_moe", "moe_router_topk_scaling_factor"),
        (QWEN3_MOE, {"moe_router_num_groups": 2}, "sdar_moe", "moe_router_num_groups"),
        (QWEN3_MOE, {"num_moe_experts": 0}, "sdar_moe", r"num_moe_experts \(0\) has no place in SDARMoeForCausalLM"),
        (QWEN3, {"rotary_percent": 0.5}, "sdar", r"rotary_percent \(0.5\) must be 1.0 in SDARForCausalLM"),
        (QWEN3, {"qk_layernorm": False}, "qwen3", r"qk_layernorm \(False\) must be True"),
        (QWEN3, {"qk_layernorm": False}, "sdar", "which computes nothing else .* use megatron_dllm, or"),
        (QWEN3, {"add_qkv_bias": True}, "sdar", r"add_qkv_bias \(True\) must be False in SDARForCausalLM"),
        (MODELS["qwen2"], {"add_qkv_bias": False}, "qwen2", r"add_qkv_bias \(False\) must be True in Qwen2ForCausalLM"),
        (LLAMA, {"rotary_percent": 0.5}, "llama", r"rotary_percent \(0.5\) must be 1.0 in LlamaForCausalLM"),
        (LLAMA, {}, "sdar", r"architecture \(sdar\) has other tensors .* use one of llama, megatron_dllm"),
        (MIXTRAL, {"moe_router_pre_softmax": True}, "mixtral", "moe_router_pre_softmax"),
        (MIXTRAL, {"num_dense_layers": 1}, "mixtral", r"num_dense_layers \(1\) must be 0 in MixtralForCausalLM"),
        (
            QWEN3,
            {"num_moe_experts": 4},
            "sdar",
            r"num_moe_experts \(4\) has no place in SDARForCausalLM, which is dense",
        ),
        (LING, {"num_moe_experts": 0}, "llada2_moe", r"LLaDA2MoeModelLM, which is a mixture of experts"),
        (LING, {"moe_router_score_function": "softmax"}, "llada2_moe", r"score_function \(softmax\) must be sigmoid"),
    ],
)
def test_refuses_what_the_class_has_no_place_for(
    model: Any, changes: dict[str, Any], architecture: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        check_architecture(replace(model, **changes), architecture)


def test_dense_layers_below_experts_are_a_matter_of_sdar_alone() -> None:
    check_architecture(replace(QWEN3_MOE, num_dense_layers=1), "qwen3_moe")


def test_a_class_that_wants_a_bias_gets_one() -> None:
    without = replace(LING, moe_router_enable_expert_bias=False)
    for architecture in ("bailing_moe", "llada2_moe"):
        assert as_exported(without, architecture) == LING == as_exported(LING, architecture)
    assert as_exported(QWEN3_MOE, "sdar_moe") == QWEN3_MOE

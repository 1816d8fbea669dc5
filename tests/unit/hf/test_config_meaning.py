"""One spelling for settings that versions of transformers write differently, and no two that disagree."""

from __future__ import annotations

import pytest

from megatron_dllm.hf.config_json import from_hf_config
from megatron_dllm.hf.config_meaning import canonical, meaning
from tests.unit.hf.test_config_json import PUBLISHED_LING_MINI, PUBLISHED_QWEN3_30B

# What transformers 5.24 writes for a Qwen3-MoE, as far as it differs from 4.57.
WRITTEN_BY_5 = {
    **{key: value for key, value in PUBLISHED_QWEN3_30B.items() if key not in ("rope_theta", "num_experts")},
    "dtype": "bfloat16",
    "num_local_experts": 128,
    "rope_parameters": {"rope_theta": 1000000.0, "rope_type": "default"},
    "sliding_window": None,
    "transformers_version": "5.24.0",
    "use_cache": True,
}


def test_versions_of_transformers_mean_the_same() -> None:
    written_by_4 = PUBLISHED_QWEN3_30B | {
        "rope_theta": 1000000,
        "torch_dtype": "bfloat16",
        "max_window_layers": 48,
        "sliding_window": 4096,
        "layer_types": ["full_attention"] * 48,
        "use_cache": False,
        "_attn_implementation": "sdpa",
        "router_aux_loss_coef": 0.001,
    }
    assert meaning(written_by_4) == meaning(WRITTEN_BY_5)
    assert from_hf_config(written_by_4).model == from_hf_config(WRITTEN_BY_5).model
    assert canonical(written_by_4)["dtype"] == canonical(WRITTEN_BY_5)["dtype"]


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"rope_theta": 10000.0}, "rope_theta"),
        ({"num_experts": 64}, "num_experts"),
        ({"eos_token_id": 7}, "eos_token_id"),
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"layer_types": ["sliding_attention"]}, "layer_types"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4}}, "rope_scaling"),
        ({"hidden_act": "gelu"}, "hidden_act"),
    ],
)
def test_what_changes_the_function_is_part_of_the_meaning(change: dict[str, object], name: str) -> None:
    ours, theirs = meaning(PUBLISHED_QWEN3_30B), meaning(PUBLISHED_QWEN3_30B | change)
    assert ours.get(name) != theirs.get(name)


def test_code_is_named_without_the_repository_it_came_from() -> None:
    ours = meaning({"auto_map": {"AutoConfig": "owner/model--configuration.Config"}})
    assert ours == meaning({"auto_map": {"AutoConfig": "configuration.Config"}})


@pytest.mark.parametrize(
    ("change", "first", "second"),
    [
        ({"rope_parameters": {"rope_theta": 1e6}}, "rope_theta (600000)", "rope_parameters.rope_theta (1000000.0)"),
        ({"rope_scaling": {"rope_theta": 1e6}}, "rope_theta (600000)", "rope_scaling.rope_theta (1000000.0)"),
        (
            {"rope_theta": None, "rope_parameters": {"rope_theta": 1e4}, "rope_scaling": {"rope_theta": 1e5}},
            "rope_parameters.rope_theta (10000.0)",
            "rope_scaling.rope_theta (100000.0)",
        ),
        ({"rope_parameters": {"partial_rotary_factor": 1.0}}, "partial_rotary_factor (0.5)", "(1.0)"),
        ({"rotary_dim": 128}, "rotary_dim (128)", "partial_rotary_factor (0.5)"),
        ({"num_local_experts": 64}, "num_experts (256)", "num_local_experts (64)"),
        ({"n_routed_experts": 64}, "num_experts (256)", "n_routed_experts (64)"),
        ({"n_shared_experts": 2}, "num_shared_experts (1)", "n_shared_experts (2)"),
        ({"num_layers": 4}, "num_hidden_layers (20)", "num_layers (4)"),
        ({"dtype": "bfloat16", "torch_dtype": "float32"}, "dtype ('bfloat16')", "torch_dtype ('float32')"),
        ({"moe_router_dtype": "bf16"}, "router_dtype ('fp32')", "moe_router_dtype ('bf16')"),
        ({"block_length": 4, "block_size": 32}, "block_length (4)", "block_size (32)"),
        ({"scoring_func": "softmax"}, "score_function ('sigmoid')", "scoring_func ('softmax')"),
        ({"layer_types": ["full_attention"] * 3}, "num_hidden_layers (20)", "layer_types (3 of them)"),
        ({"architectures": ["Qwen3MoeForCausalLM"]}, "architectures ('Qwen3MoeForCausalLM')", "model_type (bailing"),
    ],
)
def test_two_statements_of_one_setting_must_agree(change: dict[str, object], first: str, second: str) -> None:
    with pytest.raises(ValueError) as refusal:
        from_hf_config(PUBLISHED_LING_MINI | change)
    assert first in str(refusal.value) and second in str(refusal.value)


def test_two_statements_may_agree() -> None:
    twice = {
        "rope_parameters": {"rope_theta": 6e5, "partial_rotary_factor": 0.5, "rope_type": "default"},
        "rotary_dim": 64,
        "num_local_experts": 256,
        "dtype": "bfloat16",
        "torch_dtype": "torch.bfloat16",
        "layer_types": ["full_attention"] * 20,
    }
    once = PUBLISHED_LING_MINI | {"dtype": "bfloat16"}
    assert from_hf_config(PUBLISHED_LING_MINI | twice) == from_hf_config(once)

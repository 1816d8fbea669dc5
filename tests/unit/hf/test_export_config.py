"""config.json as it is written: the way back, the keys that engines read, and what a class cannot carry."""

from __future__ import annotations

import pytest

from megatron_dllm.hf.config_json import from_hf_config
from megatron_dllm.hf.export_config import to_hf_config
from tests.tiny_models import LING, MODELS, QWEN3_MOE


@pytest.mark.parametrize("name", MODELS)
def test_the_way_back_gives_the_same_model(name: str) -> None:
    model = MODELS[name]
    source = from_hf_config(to_hf_config(model, model.family, "bfloat16") | {"mask_token_id": model.mask_token_id})
    assert source.model == model and source.context_length is None


def test_the_context_of_the_training_is_stated() -> None:
    config = to_hf_config(LING, "llada2_moe", "bfloat16", context_length=32)
    assert config["max_position_embeddings"] == 64, "what an engine may serve"
    assert from_hf_config(config).context_length == 32


def test_writes_every_key_that_sglang_reads() -> None:
    config = to_hf_config(LING, "llada2_moe", "bfloat16", block_size=16)
    expected = {
        "architectures": ["LLaDA2MoeModelLM"],
        "norm_topk_prob": True,
        "score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
        "router_dtype": "fp32",
        "n_group": 2,
        "topk_group": 1,
        "routed_scaling_factor": 2.5,
        "num_shared_experts": 1,
        "first_k_dense_replace": 1,
        "use_bias": False,
        "use_qkv_bias": False,
        "embedding_dropout": 0.0,
        "head_dim": 8,
        "partial_rotary_factor": 0.5,
        "rotary_dim": 4,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 10,
        "intermediate_size": 20,
        "rms_norm_eps": 1e-6,
        "vocab_size": 40,
        "rope_theta": 600000.0,
        "norm_head": False,
        "torch_dtype": "bfloat16",
        "max_position_embeddings": 64,
    }
    assert {key: config[key] for key in expected} == expected
    assert not {"expert_capacity", "block_size"} & set(config)


def test_refuses_an_architecture_with_other_tensors() -> None:
    with pytest.raises(ValueError, match="llada2_moe"):
        to_hf_config(QWEN3_MOE, "llada2_moe", "bfloat16")

"""Families by their published config.json: what is read, what is refused by name, and what an export states."""

from __future__ import annotations

from dataclasses import replace
from math import prod
from typing import Any

import pytest

from megatron_dllm.config import ModelConfig
from megatron_dllm.hf.architectures import FAMILY_OF_MODEL_TYPE, LACKING
from megatron_dllm.hf.config_json import from_hf_config
from megatron_dllm.hf.export_config import to_hf_config
from megatron_dllm.hf.families import FAMILIES
from megatron_dllm.hf.name_table import weight_map
from tests.tiny_models import MODELS

_COMMON = {
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.40.1",
    "use_cache": True,
}
LLAMA2_7B = _COMMON | {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "max_position_embeddings": 4096,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "pretraining_tp": 1,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "vocab_size": 32000,
}
LLAMA3_8B = LLAMA2_7B | {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "intermediate_size": 14336,
    "max_position_embeddings": 8192,
    "num_key_value_heads": 8,
    "rope_theta": 500000.0,
    "vocab_size": 128256,
}
QWEN25_7B = _COMMON | {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151643,
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "max_position_embeddings": 131072,
    "max_window_layers": 28,
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "sliding_window": 131072,
    "use_mrope": False,
    "use_sliding_window": False,
    "vocab_size": 152064,
}
MISTRAL_7B = _COMMON | {
    "architectures": ["MistralForCausalLM"],
    "model_type": "mistral",
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "vocab_size": 32768,
}
MIXTRAL_8X7B = MISTRAL_7B | {
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "num_experts_per_tok": 2,
    "num_local_experts": 8,
    "output_router_logits": False,
    "router_aux_loss_coef": 0.02,
    "vocab_size": 32000,
}
OLMOE_7B = _COMMON | {
    "architectures": ["OlmoeForCausalLM"],
    "model_type": "olmoe",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "clip_qkv": None,
    "eos_token_id": 50279,
    "hidden_size": 2048,
    "intermediate_size": 1024,
    "max_position_embeddings": 4096,
    "norm_topk_prob": False,
    "num_attention_heads": 16,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 16,
    "num_key_value_heads": 16,
    "output_router_logits": False,
    "pad_token_id": 1,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "router_aux_loss_coef": 0.01,
    "vocab_size": 50304,
}
QWEN3_8B = QWEN25_7B | {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "attention_bias": False,
    "head_dim": 128,
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "max_position_embeddings": 32768,
    "num_attention_heads": 32,
    "num_hidden_layers": 36,
    "num_key_value_heads": 8,
    "vocab_size": 151936,
}
# With the number of parameters that transformers counts for these sizes, and the number of tensors.
PUBLISHED = {
    "llama2": (LLAMA2_7B, 6_738_415_616, 291),
    "llama3": (LLAMA3_8B, 8_030_261_248, 291),
    "qwen2.5": (QWEN25_7B, 7_615_616_512, 339),
    "mistral": (MISTRAL_7B, 7_248_023_552, 291),
    "mixtral": (MIXTRAL_8X7B, 46_702_792_704, 995),
    "qwen3": (QWEN3_8B, 8_190_735_360, 399),
    "olmoe": (OLMOE_7B, 6_919_161_856, 3219),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_have_their_number_of_parameters(name: str) -> None:
    config, num_parameters, num_tensors = PUBLISHED[name]
    names = weight_map(from_hf_config(config).model)
    assert len(names.hf_shapes) == num_tensors
    for shapes in (names.hf_shapes, names.mcore_shapes):
        assert sum(prod(shape) for shape in shapes.values()) == num_parameters


def test_reads_qwen25() -> None:
    assert from_hf_config(QWEN25_7B).model == ModelConfig(
        family="qwen2",
        num_layers=28,
        hidden_size=3584,
        ffn_hidden_size=18944,
        num_attention_heads=28,
        num_query_groups=4,
        kv_channels=128,
        vocab_size=152064,
        max_position_embeddings=131072,
        qk_layernorm=False,
        add_qkv_bias=True,
        rotary_base=1e6,
        rotary_percent=1.0,
        mask_token_id=-1,
        eos_token_id=151643,
        pad_token_id=-1,
    )


def test_reads_mixtral_whose_experts_have_the_size_of_the_mlp() -> None:
    model = from_hf_config(MIXTRAL_8X7B).model
    assert (model.num_moe_experts, model.moe_router_topk, model.moe_ffn_hidden_size) == (8, 2, 14336)
    assert (model.moe_router_score_function, model.moe_router_pre_softmax) == ("softmax", False)
    assert not model.moe_router_enable_expert_bias and model.num_dense_layers == 0


@pytest.mark.parametrize(
    ("config", "change", "message"),
    [
        (LLAMA3_8B, {"attention_bias": True}, r"attention_bias \(True\) must be False"),
        (LLAMA3_8B, {"mlp_bias": True}, r"mlp_bias \(True\) must be False"),
        (LLAMA3_8B, {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, r"lacks rope_scaling.original_max"),
        (LLAMA2_7B, {"rope_theta": None}, r"lacks rope_theta.*10000.0 for Llama 1 and 2"),
        (LLAMA2_7B, {"num_key_value_heads": None}, "lacks num_key_value_heads"),
        (LLAMA2_7B, {"partial_rotary_factor": 0.5}, r"partial_rotary_factor \(0.5\) .* whole head"),
        (LLAMA2_7B, {"hidden_act": "gelu"}, r"hidden_act \('gelu'\) must be silu"),
        (LLAMA2_7B, {"clip_qkv": 8.0}, r"clip_qkv \(8.0\) is no key that a model of this family has"),
        (LLAMA2_7B, {"rope_interleaved": True}, r"rope_interleaved \(True\) must be False"),
        (LLAMA2_7B, {"auto_map": {"AutoModel": "x.Y"}}, r"auto_map .* names code of the folder's own"),
        (LLAMA2_7B, {"architectures": ["MistralForCausalLM"]}, "do not belong together"),
        (QWEN25_7B, {"use_sliding_window": True}, r"use_sliding_window \(True\) must be False"),
        (QWEN25_7B, {"use_mrope": True}, r"use_mrope \(True\) must be False"),
        (QWEN25_7B, {"qk_norm": True}, r"qk_norm \(True\) is no key"),
        (QWEN3_8B, {"head_dim": None}, "lacks head_dim"),
        (QWEN3_8B, {"attention_bias": True}, r"attention_bias \(True\) must be False"),
        (
            MISTRAL_7B,
            {"sliding_window": 4096},
            r"sliding_window \(4096\) must be null or .*set max_position_.* to 4096",
        ),
        (MISTRAL_7B, {"sliding_window": "4096"}, "sliding_window"),
        (MIXTRAL_8X7B, {"sliding_window": 4096}, r"sliding_window \(4096\) must be null"),
        (OLMOE_7B, {"clip_qkv": 8.0}, r"clip_qkv \(8.0\) must be None in a olmoe"),
        (OLMOE_7B, {"norm_topk_prob": None}, "lacks norm_topk_prob"),
        (MIXTRAL_8X7B, {"num_local_experts": None}, "lacks num_experts"),
        (MIXTRAL_8X7B, {"num_local_experts": 0}, r"num_experts \(0\) must be at least 1"),
    ],
)
def test_refuses_by_name_what_it_cannot_express(config: dict[str, Any], change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        from_hf_config(config | change)


def test_keys_that_change_nothing_may_stand_there() -> None:
    """As SmolLM and others have them; null is as good as no key."""
    more = {
        "is_llama_config": True,
        "rope_interleaved": False,
        "transformers.js_config": {"dtype": "q4"},
        "clip_qkv": None,
    }
    assert from_hf_config(LLAMA2_7B | more).model == from_hf_config(LLAMA2_7B).model


def test_a_window_that_no_text_notices_is_none() -> None:
    assert from_hf_config(MISTRAL_7B | {"sliding_window": 32768}).model == from_hf_config(MISTRAL_7B).model
    short = MISTRAL_7B | {"sliding_window": 4096, "max_position_embeddings": 4096}
    assert from_hf_config(short).model.max_position_embeddings == 4096


def test_a_mistral_without_the_key_would_have_a_window_in_transformers() -> None:
    with pytest.raises(ValueError, match=r"lacks sliding_window, for which transformers takes 4096 in a mistral"):
        from_hf_config({key: value for key, value in MISTRAL_7B.items() if key != "sliding_window"})
    assert from_hf_config({key: value for key, value in MIXTRAL_8X7B.items() if key != "sliding_window"})


@pytest.mark.parametrize("model_type", LACKING)
def test_a_family_that_we_know_and_lack_is_refused_by_what_is_missing(model_type: str) -> None:
    with pytest.raises(ValueError, match=rf"model_type \({model_type}\) is not converted: it has .*, which our model"):
        from_hf_config(LLAMA2_7B | {"model_type": model_type})
    assert model_type not in FAMILY_OF_MODEL_TYPE


@pytest.mark.parametrize("name", [name for name, model in MODELS.items() if model.family in FAMILIES])
def test_an_export_states_every_key_of_its_table(name: str) -> None:
    model = MODELS[name]
    config, family = to_hf_config(model, model.family, "bfloat16"), FAMILIES[model.family]
    settings = family.settings + (family.settings_of_experts if model.is_moe else ())
    assert {*family.stated, *family.written, *(setting.key for setting in settings)} <= config.keys()


def test_our_own_class_says_what_it_is_made_of() -> None:
    model = MODELS["megatron_dllm with experts"]
    config = to_hf_config(model, "megatron_dllm", "bfloat16", block_size=8)
    assert (config["use_qk_norm"], config["qkv_bias"], config["block_length"]) == (False, False, 8)
    assert (config["first_k_dense_replace"], config["num_experts"]) == (1, 4)
    changed = from_hf_config(config | {"qkv_bias": True, "use_qk_norm": True}).model
    assert changed == replace(model, add_qkv_bias=True, qk_layernorm=True)
    for key in ("qkv_bias", "use_qk_norm", "norm_topk_prob"):
        with pytest.raises(ValueError, match=f"lacks {key}"):
            from_hf_config(config | {key: None})

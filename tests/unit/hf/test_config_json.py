"""config.json: the published values, what is refused, and the way back."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_dllm.config import ModelConfig, RotaryScalingConfig
from megatron_dllm.hf.config_json import from_hf_config, read_hf_config
from megatron_dllm.hf.config_meaning import meaning
from megatron_dllm.hf.export_config import to_hf_config
from tests.unit.hf.test_name_table import LING_FLASH, LING_MINI

PUBLISHED_LING_MINI = {
    "architectures": ["BailingMoeV2ForCausalLM"],
    "model_type": "bailing_moe",
    "hidden_size": 2048,
    "num_hidden_layers": 20,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "partial_rotary_factor": 0.5,
    "rope_theta": 600000,
    "rope_scaling": None,
    "intermediate_size": 5120,
    "moe_intermediate_size": 512,
    "num_experts": 256,
    "num_experts_per_tok": 8,
    "n_group": 8,
    "topk_group": 4,
    "routed_scaling_factor": 2.5,
    "score_function": "sigmoid",
    "norm_topk_prob": True,
    "moe_router_enable_expert_bias": True,
    "num_shared_experts": 1,
    "first_k_dense_replace": 1,
    "vocab_size": 157184,
    "pad_token_id": 156892,
    "eos_token_id": 156892,
    "tie_word_embeddings": False,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 32768,
    "use_bias": False,
    "use_qkv_bias": False,
    "use_qk_norm": True,
    "router_dtype": "fp32",
    "num_nextn_predict_layers": 0,
    "norm_head": False,
    "norm_softmax": False,
    "hidden_act": "silu",
}
# The rest of the file, and how those of LLaDA2.0 differ: that for serving, and that for training.
LING_MINI_FILE = PUBLISHED_LING_MINI | {
    "attention_dropout": 0.0,
    "auto_map": {"AutoModelForCausalLM": "modeling_bailing_moe_v2.BailingMoeV2ForCausalLM"},
    "embedding_dropout": 0.0,
    "initializer_range": 0.02,
    "moe_shared_expert_intermediate_size": 512,
    "mtp_loss_scaling_factor": 0,
    "output_dropout": 0.0,
    "output_router_logits": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.56.1",
    "use_cache": True,
    "use_rmsnorm": True,
}
_LLADA2_MINI = {
    key: value
    for key, value in LING_MINI_FILE.items()
    if key not in ("eos_token_id", "mtp_loss_scaling_factor", "num_nextn_predict_layers", "use_qk_norm")
} | {
    "architectures": ["LLaDA2MoeModelLM"],
    "auto_map": {"AutoModelForCausalLM": "modeling_llada2_moe.LLaDA2MoeModelLM"},
    "max_window_layers": 28,
    "model_type": "llada2_moe",
    "rotary_dim": 64,
    "use_cache": False,
    "use_sliding_window": False,
    "using_split_qkv_in_self_attention": False,
}
FILES = {
    "Ling": LING_MINI_FILE,
    "LLaDA2, for serving": _LLADA2_MINI | {"dtype": "bfloat16", "sliding_window": 4096},
    "LLaDA2, for training": _LLADA2_MINI | {"max_position_embeddings": 16384, "model_type": "llada2_moe_veomni"},
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
PUBLISHED_QWEN3_30B = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "hidden_size": 2048,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "rope_theta": 1000000.0,
    "rope_scaling": None,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "vocab_size": 151936,
    "eos_token_id": 151645,
    "bos_token_id": 151643,
    "tie_word_embeddings": False,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 40960,
    "attention_bias": False,
    "hidden_act": "silu",
    "use_sliding_window": False,
}


def test_reads_ling_mini() -> None:
    source = from_hf_config(PUBLISHED_LING_MINI)
    expected = replace(LING_MINI, mask_token_id=-1, moe_router_topk_scaling_factor=2.5)
    assert source.model == expected
    assert not source.is_diffusion


def test_reads_ling_flash_as_llada2() -> None:
    config = PUBLISHED_LING_MINI | {
        "architectures": ["LLaDA2MoeModelLM"],
        "model_type": "llada2_moe",
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "intermediate_size": 9216,
        "moe_intermediate_size": 1024,
        "eos_token_id": None,
    }
    source = from_hf_config(config)
    assert source.model == replace(
        LING_FLASH, family="llada2_moe", mask_token_id=-1, eos_token_id=-1, moe_router_topk_scaling_factor=2.5
    )
    assert source.is_diffusion


SDAR_FILE = PUBLISHED_QWEN3_30B | {
    "architectures": ["SDARMoeForCausalLM"],
    "attn_implementation": "flex_attention",
    "auto_map": {"AutoModelForCausalLM": "modeling_sdar_moe.SDARMoeForCausalLM"},
    "block_size": 4,
    "debug": False,
    "fuse_cross_entropy": True,
    "mask_token_id": 151669,
    "micro_forward": False,
    "model_type": "sdar_moe",
    "skip_checkpoint": False,
}


@pytest.mark.parametrize("name", FILES)
def test_whole_files_are_read_and_nothing_in_them_is_unknown(name: str) -> None:
    model = from_hf_config(FILES[name]).model
    expected = from_hf_config(PUBLISHED_LING_MINI).model
    unlike = ("family", "max_position_embeddings", "eos_token_id")
    assert model == replace(expected, **{key: getattr(model, key) for key in unlike})


def test_a_whole_file_of_sdar_is_read() -> None:
    source = from_hf_config(SDAR_FILE)
    assert source.block_size == 4 and source.model.mask_token_id == 151669
    assert source.model == replace(from_hf_config(PUBLISHED_QWEN3_30B).model, family="sdar_moe", mask_token_id=151669)


@pytest.mark.parametrize("config", [*FILES.values(), SDAR_FILE])
def test_a_key_that_nobody_knows_is_refused_also_beside_code(config: dict[str, object]) -> None:
    """Clean tokens that see no later one of their block, and clipped queries: each another model, the same tensors."""
    for key, value in (("use_regular_causal", True), ("clip_qkv", 8.0)):
        with pytest.raises(ValueError, match=rf"{key} \({value}\) is no key that a model of this family has, so the"):
            from_hf_config(config | {key: value})


def test_reads_ling_1t_whose_rotary_factor_is_a_count() -> None:
    config = {key: value for key, value in PUBLISHED_LING_MINI.items() if key != "partial_rotary_factor"}
    assert from_hf_config(config | {"rotary_dim": 64}).model.rotary_percent == 0.5


def test_reads_qwen3_30b() -> None:
    model = from_hf_config(PUBLISHED_QWEN3_30B).model
    assert model == ModelConfig(
        family="qwen3_moe",
        num_layers=48,
        hidden_size=2048,
        ffn_hidden_size=6144,
        num_attention_heads=32,
        num_query_groups=4,
        kv_channels=128,
        vocab_size=151936,
        max_position_embeddings=40960,
        rotary_base=1e6,
        rotary_percent=1.0,
        num_moe_experts=128,
        moe_ffn_hidden_size=768,
        moe_router_topk=8,
        moe_router_score_function="softmax",
        moe_router_pre_softmax=False,
        moe_router_enable_expert_bias=False,
        mask_token_id=-1,
        eos_token_id=151645,
        pad_token_id=-1,
    )


def test_reads_rope_where_transformers_5_writes_it() -> None:
    config = {
        key: value for key, value in PUBLISHED_LING_MINI.items() if key not in ("rope_theta", "partial_rotary_factor")
    }
    rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25}
    model = from_hf_config(config | {"rope_parameters": rope}).model
    assert (model.rotary_base, model.rotary_percent) == (10000.0, 0.25)


def test_softmax_before_top_k_where_probabilities_are_not_normalised() -> None:
    assert from_hf_config(PUBLISHED_QWEN3_30B | {"norm_topk_prob": False}).model.moe_router_pre_softmax


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"use_qkv_bias": True}, "use_qkv_bias"),
        ({"use_bias": True}, "use_bias"),
        ({"norm_head": True}, "norm_head"),
        ({"num_nextn_predict_layers": 1}, "num_nextn_predict_layers"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, r"lacks rope_scaling.original_max_position_embeddings"),
        ({"rope_scaling": YARN | {"mscale": 1.0}}, r"rope_scaling.mscale \(1.0\) is not known in yarn"),
        ({"rope_scaling": YARN | {"truncate": False}}, r"rope_scaling.truncate \(False\)"),
        ({"rope_scaling": YARN | {"factor": "4"}}, r"rope_scaling.factor \('4'\) must be of type float"),
        ({"rope_scaling": YARN | {"factor": 0.5}}, r"rotary_scaling.factor \(0.5\) must lie in \[1, 10000\]"),
        ({"rope_scaling": YARN | {"original_max_position_embeddings": 65536}}, r"\(65536\) must lie in \[8, 32768\]"),
        ({"rope_scaling": YARN | {"rope_type": "llama3"}}, r"lacks rope_scaling.low_freq_factor"),
        ({"rope_scaling": YARN, "rope_parameters": YARN | {"factor": 2.0}}, r"rope_scaling.factor \(4.0\) state the"),
        ({"rope_theta": None}, "rope_theta"),
        ({"rope_scaling": {"factor": 4}}, r"rope_scaling \(\{'factor': 4\}\)"),
        ({"rope_scaling": "yarn"}, "rope_scaling"),
        ({"rope_scaling": YARN, "rope_parameters": {"rope_type": "default"}}, r"rope_scaling.rope_type \('yarn'\)"),
        ({"rope_scaling": {"rope_type": "default", "type": "yarn"}}, r"rope_scaling.type \('yarn'\) state the same"),
        ({"num_attention_heads": 0, "head_dim": None}, "num_attention_heads"),
        ({"rope_parameters": {"rope_type": "linear"}}, r"rope_scaling \('linear'\)"),
        ({"num_hidden_layers": "20"}, r"num_hidden_layers \('20'\) must be of type int"),
        ({"eos_token_id": "0"}, "eos"),
        ({"rms_norm_eps": True}, "rms_norm_eps"),
        ({"rope_theta": [1]}, "rope_theta"),
        ({"n_group": 8.0}, "n_group"),
        ({"model_type": ["bailing_moe"]}, "model_type"),
        ({"architectures": "BailingMoe"}, "architectures"),
        ({"topk_group": 2}, "moe_router_group_topk"),
        ({"score_function": "softmax"}, "score_function"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
        ({"hidden_size": None}, "hidden_size"),
        ({"architectures": ["BailingMoeForCausalLM"]}, "BailingMoeForCausalLM"),
        ({"model_type": "llama"}, "llama"),
        ({"moe_shared_expert_intermediate_size": 700}, "moe_shared_expert_intermediate_size"),
        ({"router_dtype": "bf16"}, "router_dtype"),
        ({"using_split_qkv_in_self_attention": True}, r"using_split_qkv_in_self_attention \(True\) must be False"),
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"moe_router_dtype": "bf16", "router_dtype": None}, r"router_dtype \('bf16'\)"),
        ({"layer_types": ["sliding_attention"] * 20}, "layer_types"),
        ({"rms_norm_eps": -1e-6}, r"layernorm_epsilon \(-1e-06\)"),
        ({"rms_norm_eps": float("nan")}, r"rms_norm_eps \(nan\) must be a finite number"),
        ({"rope_theta": float("inf")}, r"rope_theta \(inf\)"),
        ({"rope_theta": 10**400}, r"rope_theta \(1000"),
        ({"rope_theta": 0.0}, r"rotary_base \(0.0\)"),
        ({"routed_scaling_factor": -2.5}, r"moe_router_topk_scaling_factor \(-2.5\)"),
        ({"router_aux_loss_coef": -0.1}, r"router_aux_loss_coef \(-0.1\)"),
        ({"initializer_range": "0.02"}, r"initializer_range \('0.02'\)"),
        ({"num_hidden_layers": 10**9}, r"num_layers \(1000000000\) must not exceed 1024"),
        ({"num_experts": 10**9}, r"num_moe_experts \(1000000000\) must not exceed 16384"),
        ({"num_experts": 16384}, r"num_moe_experts \(16384\) x num_layers \(20\) must not exceed 131072"),
        ({"num_experts": 0}, r"num_experts \(0\) must be at least 1"),
        ({"vocab_size": 10**12}, r"vocab_size \(1000000000000\)"),
        ({"num_shared_experts": -1}, r"moe_shared_expert_intermediate_size \(-512\)"),
        ({"num_shared_experts": 10**9}, "moe_shared_expert_intermediate_size"),
        ({"n_group": -8}, r"moe_router_num_groups \(-8\)"),
        ({"head_dim": 0}, r"kv_channels \(0\)"),
        ({"head_dim": 127, "rotary_dim": None}, r"kv_channels \(127\) x rotary_percent \(0.5\) = 63 must be even"),
        ({"max_position_embeddings": -1}, r"max_position_embeddings \(-1\)"),
    ],
)
def test_refuses_by_name_what_it_cannot_express(change: dict[str, object], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        from_hf_config(PUBLISHED_LING_MINI | change)


@pytest.mark.parametrize(
    ("stated", "scaling"),
    [
        (YARN, RotaryScalingConfig("yarn", 4.0, 32768)),
        (
            {"type": "yarn", "factor": 2, "original_max_position_embeddings": 4096, "beta_fast": 20.0, "beta_slow": 2.0}
            | {"attention_factor": 1.1, "truncate": True},
            RotaryScalingConfig("yarn", 2.0, 4096, beta_fast=20.0, beta_slow=2.0, attention_factor=1.1),
        ),
        (
            {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 8192}
            | {"low_freq_factor": 1.0, "high_freq_factor": 4.0},
            RotaryScalingConfig("llama3", 8.0, 8192),
        ),
    ],
)
def test_a_stretched_rope_is_read_and_written(stated: dict[str, object], scaling: RotaryScalingConfig) -> None:
    for place in ("rope_scaling", "rope_parameters"):
        model = from_hf_config(PUBLISHED_LING_MINI | {place: stated}).model
        assert model.rotary_scaling == scaling
    written = to_hf_config(replace(model, mask_token_id=1), "bailing_moe", "bfloat16")
    assert meaning(written)["rope_scaling"] == meaning({"rope_scaling": stated})["rope_scaling"] or "truncate" in stated
    assert from_hf_config(written).model == replace(model, mask_token_id=-1)


def test_ntk_is_written_as_the_base_that_it_is() -> None:
    model = replace(
        from_hf_config(PUBLISHED_LING_MINI).model,
        rotary_scaling=RotaryScalingConfig("ntk", 4.0, 32768, distance_ahead=32),
    )
    written = to_hf_config(model, "bailing_moe", "bfloat16")
    assert written["rope_scaling"] is None
    assert written["rope_theta"] == model.rotary_scaling.ntk_base(6e5, 64) > 3e6


@pytest.mark.parametrize("size", [0, -1, 32.0, "32", True, 10**9])
def test_a_block_length_counts_tokens_of_the_context(size: object) -> None:
    config = PUBLISHED_LING_MINI | {"model_type": "llada2_moe", "architectures": ["LLaDA2MoeModelLM"]}
    assert from_hf_config(config | {"block_length": 16}).block_size == 16
    assert from_hf_config(config).block_size is None
    with pytest.raises(ValueError, match=r"block_length \("):
        from_hf_config(config | {"block_length": size})


def test_the_files_of_a_folder_agree_on_the_tokens_that_end_a_text(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED_LING_MINI))
    stops = tmp_path / "generation_config.json"
    for agreeing in (156892, [156895, 156892], None):
        stops.write_text(json.dumps({"eos_token_id": agreeing}))
        assert read_hf_config(tmp_path).model.eos_token_id == 156892
    stops.write_text(json.dumps({"eos_token_id": [156895, 3]}))
    with pytest.raises(ValueError, match=r"config\.json: eos_token_id \(156892\) and .*generation_config\.json: eos_"):
        read_hf_config(tmp_path)


@pytest.mark.parametrize("scaling", [None, {}, {"rope_type": "default"}, {"type": "default", "rope_theta": 6e5}])
def test_unscaled_rope_may_be_said_in_any_way(scaling: object) -> None:
    assert from_hf_config(PUBLISHED_LING_MINI | {"rope_scaling": scaling, "rope_parameters": scaling})


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"decoder_sparse_step": 2}, "decoder_sparse_step"),
        ({"mlp_only_layers": [3]}, "mlp_only_layers"),
        ({"mlp_only_layers": [[0]]}, "mlp_only_layers"),
        ({"norm_topk_prob": None}, "norm_topk_prob"),
        ({"attention_bias": True}, "attention_bias"),
        ({"mlp_only_layers": [0, 0]}, "mlp_only_layers"),
        ({"mlp_only_layers": [False]}, "mlp_only_layers"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
    ],
)
def test_refuses_qwen3_variants_by_name(change: dict[str, object], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        from_hf_config(PUBLISHED_QWEN3_30B | change)

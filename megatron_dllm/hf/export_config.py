"""ModelConfig -> config.json, as transformers and serving engines read it."""

from __future__ import annotations

from typing import Any

from megatron_dllm.config import ModelConfig
from megatron_dllm.hf.architectures import ARCHITECTURE_CLASS, AUTO_MAP, DIFFUSION_ARCHITECTURES
from megatron_dllm.hf.export_limits import check_architecture
from megatron_dllm.hf.families import family_keys
from megatron_dllm.hf.rope_scaling import written_scaling
from megatron_dllm.hf.serving import usual_block_size


def to_hf_config(
    model: ModelConfig,
    architecture: str,
    dtype_name: str,
    block_size: int | None = None,
    context_length: int | None = None,
) -> dict[str, Any]:
    """Build config.json.

    Args:
        model: the sizes.
        architecture: one of ARCHITECTURES_OF_FAMILY[model.family].
        dtype_name: "bfloat16" or "float32", what the tensors are stored in.
        block_size: of a diffusion model; None: the one that its class takes for granted.
        context_length: of the training; None: not stated.

    Raises:
        ValueError: the architecture cannot carry this model.
    """
    check_architecture(model, architecture)
    config = {
        "architectures": [ARCHITECTURE_CLASS[architecture]],
        "model_type": architecture,
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.num_query_groups,
        "head_dim": model.kv_channels,
        "hidden_act": "silu",
        "max_position_embeddings": model.max_position_embeddings,
        "initializer_range": model.init_method_std,
        "rms_norm_eps": model.layernorm_epsilon,
        **written_scaling(model),
        "tie_word_embeddings": model.tie_word_embeddings,
        "attention_dropout": 0.0,
        "use_cache": True,
        "eos_token_id": model.eos_token_id,
        "pad_token_id": model.pad_token_id,
        "torch_dtype": dtype_name,
    }
    if architecture in ("bailing_moe", "llada2_moe"):
        config |= _bailing_keys(model)
    else:
        config |= family_keys(model, architecture)
    if "use_sliding_window" in config:
        config |= {"sliding_window": None, "max_window_layers": model.num_layers}
    if architecture == "llada2_moe":
        config |= {
            "rotary_dim": int(model.kv_channels * model.rotary_percent),
            "norm_head": False,
            "norm_softmax": False,
        }
    if architecture in DIFFUSION_ARCHITECTURES:
        # Not "block_size": in llada2_moe SGLang takes that as a sign of routing by block.
        config |= {
            "auto_map": AUTO_MAP[architecture],
            "mask_token_id": model.mask_token_id,
            "block_length": block_size or usual_block_size(architecture),
        }
    if context_length is not None:
        # A name that no engine takes for the longest text it may serve, which is max_position_embeddings.
        config["training_context_length"] = context_length
    return config


def _bailing_keys(model: ModelConfig) -> dict[str, Any]:
    has_groups = model.moe_router_num_groups > 1
    shared = model.moe_shared_expert_intermediate_size
    if shared % max(model.moe_ffn_hidden_size, 1):
        raise ValueError(
            f"model.moe_shared_expert_intermediate_size ({shared}) must be a multiple of "
            f"moe_ffn_hidden_size ({model.moe_ffn_hidden_size}): config.json counts shared experts."
        )
    return {
        "first_k_dense_replace": model.num_dense_layers,
        "moe_intermediate_size": model.moe_ffn_hidden_size,
        "num_experts": model.num_moe_experts,
        "num_experts_per_tok": model.moe_router_topk,
        "num_shared_experts": shared // max(model.moe_ffn_hidden_size, 1),
        "n_group": model.moe_router_num_groups if has_groups else 1,
        "topk_group": model.moe_router_group_topk if has_groups else 1,
        "norm_topk_prob": True,
        "routed_scaling_factor": model.moe_router_topk_scaling_factor,
        "router_dtype": "fp32",
        "score_function": "sigmoid",
        "moe_router_enable_expert_bias": model.moe_router_enable_expert_bias,
        "num_nextn_predict_layers": 0,
        "output_router_logits": False,
        "partial_rotary_factor": model.rotary_percent,
        "use_sliding_window": False,
        "use_bias": False,
        "use_qkv_bias": False,
        "use_qk_norm": model.qk_layernorm,
        "use_rmsnorm": True,
        "embedding_dropout": 0.0,
        "output_dropout": 0.0,
    }

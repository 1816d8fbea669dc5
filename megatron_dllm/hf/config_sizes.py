"""The sizes of a model from its config.json, of every family; what our model cannot express is refused by name."""

from __future__ import annotations

from dataclasses import replace

from megatron_dllm.config import ModelConfig
from megatron_dllm.hf.config_meaning import has_full_attention
from megatron_dllm.hf.config_values import ConfigValues, brief
from megatron_dllm.hf.families import read_family
from megatron_dllm.hf.rope_scaling import read_scaling

# Settings that change the function and that our model does not have: key -> the only value we can express.
MUST_BE = {
    "use_bias": False,
    "use_qkv_bias": False,
    "using_split_qkv_in_self_attention": False,
    "attention_bias": False,
    "mlp_bias": False,
    "use_mrope": False,
    "rope_interleaved": False,
    "use_sliding_window": False,
    "norm_head": False,
    "norm_softmax": False,
    "num_nextn_predict_layers": 0,
    "hidden_act": "silu",
    "use_rmsnorm": True,
    "quantization_config": None,
    "expert_capacity": None,
    "router_dtype": "fp32",
}
_REMEDY = {
    "num_nextn_predict_layers": "export the checkpoint without its multi-token-prediction layers",
    "quantization_config": "dequantize it first",
}
_DTYPES = ("bfloat16", "float16", "float32", "float64")
# Numbers that only training reads, which is configured elsewhere; a negative one says that the file is damaged.
_NOT_NEGATIVE = (
    "initializer_range",
    "router_aux_loss_coef",
    "attention_dropout",
    "embedding_dropout",
    "output_dropout",
)


def read_sizes(reader: ConfigValues, family: str) -> ModelConfig:
    """The model that a config.json describes.

    Args:
        reader: of the file.
        family: one of config.model.FAMILIES.

    Returns:
        The sizes; token ids as the file states them, -1 if it does not.

    Raises:
        ValueError: a value is missing, of another type or size, or asks for what our model does not have.
    """
    _refuse_what_we_lack(reader)
    model = _common(reader, family)
    if family in ("bailing_moe", "llada2_moe"):
        model = _bailing(reader, model)
    else:
        model = read_family(reader, model)
    try:
        # Everything but the token ids, which may still come from the tokenizer.
        replace(model, mask_token_id=0, eos_token_id=1, pad_token_id=1).validate()
    except ValueError as error:
        raise ValueError(f"{reader.source}: {error}") from error
    return model


def read_dtype(reader: ConfigValues) -> str | None:
    """The dtype that a config.json names, None without one.

    Raises:
        ValueError: it is none that weights can have here.
    """
    name: str | None = reader.get("dtype", None, str)
    if name is not None and name not in _DTYPES:
        raise ValueError(f"{reader.source}: dtype ({brief(name)}) must be one of {', '.join(_DTYPES)}.")
    return name


def _refuse_what_we_lack(reader: ConfigValues) -> None:
    for key, only in MUST_BE.items():
        value = reader.values.get(key, only)
        if value != only:
            remedy = _REMEDY.get(key, "it would change the results silently, so the model is not converted")
            raise ValueError(
                f"{reader.source}: {key} ({brief(value)}) must be {only}: our model has nothing else; {remedy}."
            )
    layer_types = reader.get("layer_types", None, list)
    if not has_full_attention(layer_types):
        raise ValueError(
            f"{reader.source}: layer_types ({brief(layer_types)}) must all be full_attention: our model has no windows."
        )
    for key in _NOT_NEGATIVE:
        if (value := reader.get(key, 0.0, float)) < 0:
            raise ValueError(f"{reader.source}: {key} ({value}) must not be negative; the file is damaged.")


def _common(reader: ConfigValues, family: str) -> ModelConfig:
    heads = reader.need("num_attention_heads")
    hidden = reader.need("hidden_size")
    theta = reader.get("rope_theta", None, float)
    if theta is None:
        raise ValueError(
            f"{reader.source} lacks rope_theta; checkpoints of one model differ in it, so it is not guessed: add it as "
            "the model's authors gave it (10000.0 for Llama 1 and 2, whose first files have no such key)."
        )
    return ModelConfig(
        family=family,
        num_layers=_num_layers(reader),
        hidden_size=hidden,
        ffn_hidden_size=reader.need("intermediate_size"),
        num_attention_heads=heads,
        num_query_groups=reader.need("num_key_value_heads"),
        kv_channels=reader.get("head_dim", hidden // max(heads, 1)),
        vocab_size=reader.need("vocab_size"),
        max_position_embeddings=reader.need("max_position_embeddings"),
        layernorm_epsilon=reader.need("rms_norm_eps", float),
        rotary_base=theta,
        rotary_percent=1.0,
        rotary_scaling=read_scaling(reader),
        tie_word_embeddings=reader.get("tie_word_embeddings", False, bool),
        init_method_std=reader.get("initializer_range", 0.02, float),
        mask_token_id=reader.token_id("mask_token_id"),
        eos_token_id=reader.token_id("eos_token_id"),
        pad_token_id=reader.token_id("pad_token_id"),
    )


def _num_layers(reader: ConfigValues) -> int:
    num_layers = int(reader.need("num_hidden_layers"))
    layer_types = reader.get("layer_types", None, list)
    if layer_types is not None and len(layer_types) != num_layers:
        raise ValueError(
            f"{reader.source}: num_hidden_layers ({num_layers}) and layer_types ({len(layer_types)} of them) differ; "
            "correct whichever is wrong."
        )
    return num_layers


def _rotary_percent(reader: ConfigValues, kv_channels: int) -> float | None:
    """Share of a head's features that are rotated, by partial_rotary_factor, or by rotary_dim as Ling-1T gives it."""
    factor, count = reader.get("partial_rotary_factor", None, float), reader.get("rotary_dim", None)
    if factor is None:
        return None if count is None else count / max(kv_channels, 1)
    if count is not None and count != int(factor * kv_channels):
        raise ValueError(
            f"{reader.source}: rotary_dim ({count}) and partial_rotary_factor ({factor}) of {kv_channels} features a "
            "head differ; correct whichever is wrong."
        )
    return float(factor)


def _bailing(reader: ConfigValues, model: ModelConfig) -> ModelConfig:
    score_function = reader.get("score_function", "sigmoid", str)
    is_normalised = reader.get("norm_topk_prob", True, bool)
    if score_function != "sigmoid" or not is_normalised:
        raise ValueError(
            f"{reader.source}: score_function ({score_function}) and norm_topk_prob ({is_normalised}) must be sigmoid "
            "and true: our router normalises sigmoid scores."
        )
    factor = _rotary_percent(reader, model.kv_channels)
    num_groups = reader.get("n_group", 0)
    return replace(
        model,
        qk_layernorm=reader.get("use_qk_norm", True, bool),
        rotary_percent=reader.need("partial_rotary_factor", float) if factor is None else factor,
        num_dense_layers=reader.need("first_k_dense_replace"),
        num_moe_experts=_num_experts(reader),
        moe_ffn_hidden_size=reader.need("moe_intermediate_size"),
        moe_shared_expert_intermediate_size=_shared_size(reader),
        moe_router_topk=reader.need("num_experts_per_tok"),
        moe_router_num_groups=num_groups if num_groups != 1 else 0,
        moe_router_group_topk=reader.get("topk_group", 0) if num_groups > 1 else 0,
        moe_router_topk_scaling_factor=reader.need("routed_scaling_factor", float),
        moe_router_score_function="sigmoid",
        moe_router_pre_softmax=False,
        moe_router_dtype="fp32",
        moe_router_enable_expert_bias=reader.get("moe_router_enable_expert_bias", True, bool),
    )


def _num_experts(reader: ConfigValues) -> int:
    number = int(reader.need("num_experts"))
    if number < 1:
        raise ValueError(
            f"{reader.source}: num_experts ({number}) must be at least 1 in a mixture of experts; correct it as the "
            "model's authors gave it."
        )
    return number


def _shared_size(reader: ConfigValues) -> int:
    """Features of all shared experts together."""
    number, size = int(reader.get("num_shared_experts", 0)), int(reader.need("moe_intermediate_size"))
    stated = reader.get("moe_shared_expert_intermediate_size", None)
    if number and stated is not None and stated not in (number * size, size):
        raise ValueError(
            f"{reader.source}: moe_shared_expert_intermediate_size ({stated}) contradicts "
            f"num_shared_experts x moe_intermediate_size ({number * size}); correct whichever is wrong."
        )
    return number * size

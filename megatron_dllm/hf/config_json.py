"""config.json -> ModelConfig, for every family; what our model cannot express is refused by name."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_dllm.config import ModelConfig
from megatron_dllm.hf.architectures import ARCHITECTURE_CLASS, DIFFUSION_ARCHITECTURES, FAMILY_OF_MODEL_TYPE

# Settings that change the function and that our model does not have: key -> the only value we can express.
_MUST_BE = {
    "use_bias": False,
    "use_qkv_bias": False,
    "attention_bias": False,
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


@dataclass(frozen=True)
class SourceConfig:
    """What config.json says.

    Attributes:
        model: the sizes; token ids as the file states them, -1 if it does not.
        block_size: block size of a diffusion model, or None.
        is_diffusion: position i predicts token i (LLaDA2, SDAR) instead of token i + 1.
    """

    model: ModelConfig
    block_size: int | None
    is_diffusion: bool


def read_hf_config(folder: Path) -> SourceConfig:
    """Read a model folder's config.json.

    Raises:
        ValueError: a value is missing, or the model cannot be expressed exactly.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"{path} is missing; name a Hugging Face model folder.")
    try:
        config = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no JSON ({error}); download it again.") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} holds no JSON object; download it again.")
    return from_hf_config(config, str(path))


def from_hf_config(config: dict[str, Any], source: str = "config.json") -> SourceConfig:
    """Translate a config.json's content.

    Args:
        config: the parsed file.
        source: its name, for errors.

    Raises:
        ValueError: a value is missing, or the model cannot be expressed exactly.
    """
    reader = _Reader(config, source)
    family = reader.family()
    reader.refuse_what_we_lack()
    model = _common(reader, family)
    if family in ("bailing_moe", "llada2_moe"):
        model = _bailing(reader, model)
    elif family != "qwen3":
        model = _qwen3_moe(reader, model)
    _validate_sizes(model, source)
    block_size = config.get("block_length", config.get("block_size"))
    return SourceConfig(model, block_size if isinstance(block_size, int) else None, family in DIFFUSION_ARCHITECTURES)


class _Reader:
    def __init__(self, config: dict[str, Any], source: str) -> None:
        self.config = config
        self.source = source

    def need(self, key: str, kind: type = int) -> Any:
        """A value that must be there, of the given type; an int also counts as a float."""
        value = self.config.get(key)
        if value is None:
            raise ValueError(
                f"{self.source} lacks {key}; it is read, never guessed: add it as the model's authors gave it."
            )
        return self.checked(key, value, kind)

    def get(self, key: str, default: Any, kind: type = int) -> Any:
        """A value of the given type, or the default where it is missing or null."""
        value = self.config.get(key)
        return default if value is None else self.checked(key, value, kind)

    def checked(self, key: str, value: Any, kind: type) -> Any:
        accepted = (int, float) if kind is float else (kind,)
        if not isinstance(value, accepted) or (isinstance(value, bool) and kind is not bool):
            raise ValueError(
                f"{self.source}: {key} ({value!r}) must be of type {kind.__name__}; correct it as the "
                "model's authors gave it."
            )
        return kind(value)

    def family(self) -> str:
        model_type = self.config.get("model_type")
        if not isinstance(model_type, str) or model_type not in FAMILY_OF_MODEL_TYPE:
            raise ValueError(
                f"{self.source}: model_type ({model_type}) is not known; known are {', '.join(FAMILY_OF_MODEL_TYPE)}."
            )
        family = FAMILY_OF_MODEL_TYPE[model_type]
        names = self.get("architectures", [], list)
        # Ling 1.x has another architecture under the same model_type.
        if family == "bailing_moe" and names and names[0] != ARCHITECTURE_CLASS["bailing_moe"]:
            raise ValueError(
                f"{self.source}: architectures ({names[0]}) is not {ARCHITECTURE_CLASS['bailing_moe']}; "
                "only the Ling 2.0 architecture is known under this model_type."
            )
        return family

    def refuse_what_we_lack(self) -> None:
        for key, only in _MUST_BE.items():
            value = self.config.get(key, only)
            if value is not None and value != only:
                remedy = _REMEDY.get(key, "it would change the results silently, so the model is not converted")
                raise ValueError(
                    f"{self.source}: {key} ({value}) must be {only}: our model has nothing else; {remedy}."
                )
        for key in ("rope_scaling", "rope_parameters"):
            kind = _rope_kind(self.get(key, {}, dict))
            if kind != "default":
                raise ValueError(
                    f"{self.source}: {key} ({kind}) must be null: our rotary embedding is unscaled; "
                    "use the checkpoint of the native context length."
                )

    def rope(self, key: str) -> float | None:
        """A RoPE value from where transformers 4 or 5 writes it."""
        value = self.get("rope_parameters", {}, dict).get(key) if self.config.get(key) is None else self.config[key]
        return None if value is None else self.checked(key, value, float)

    def token_id(self, key: str) -> int:
        value = self.config.get(key)
        if isinstance(value, list):
            value = value[0] if value else None
        return -1 if value is None else self.checked(key, value, int)


def _rope_kind(parameters: dict[str, Any]) -> str:
    """The kind of RoPE scaling; "default" means none. A setting without a kind may only hold the basics."""
    kinds = [str(parameters[name]) for name in ("rope_type", "type") if parameters.get(name) is not None]
    if kinds:
        return next((kind for kind in kinds if kind != "default"), "default")
    return "default" if parameters.keys() <= {"rope_theta", "partial_rotary_factor"} else str(parameters)


def _common(reader: _Reader, family: str) -> ModelConfig:
    heads = reader.need("num_attention_heads")
    hidden = reader.need("hidden_size")
    theta = reader.rope("rope_theta")
    if theta is None:
        raise ValueError(
            f"{reader.source} lacks rope_theta; checkpoints of one model differ in it, so it is not guessed."
        )
    return ModelConfig(
        family=family,
        num_layers=reader.need("num_hidden_layers"),
        hidden_size=hidden,
        ffn_hidden_size=reader.need("intermediate_size"),
        num_attention_heads=heads,
        num_query_groups=reader.need("num_key_value_heads"),
        kv_channels=reader.get("head_dim", 0) or hidden // max(heads, 1),
        vocab_size=reader.need("vocab_size"),
        max_position_embeddings=reader.need("max_position_embeddings"),
        layernorm_epsilon=reader.need("rms_norm_eps", float),
        rotary_base=theta,
        rotary_percent=1.0,
        tie_word_embeddings=reader.get("tie_word_embeddings", False, bool),
        init_method_std=reader.get("initializer_range", 0.02, float),
        mask_token_id=reader.token_id("mask_token_id"),
        eos_token_id=reader.token_id("eos_token_id"),
        pad_token_id=reader.token_id("pad_token_id"),
    )


def _bailing(reader: _Reader, model: ModelConfig) -> ModelConfig:
    config = reader.config
    if config.get("score_function", "sigmoid") != "sigmoid" or config.get("norm_topk_prob", True) is not True:
        raise ValueError(
            f"{reader.source}: score_function ({config.get('score_function')}) and norm_topk_prob "
            f"({config.get('norm_topk_prob')}) must be sigmoid and true: our router normalises sigmoid "
            "scores."
        )
    factor = reader.rope("partial_rotary_factor")
    if factor is None:
        # Ling-1T gives the number of rotated features instead.
        factor = reader.need("rotary_dim") / max(model.kv_channels, 1)
    num_groups = reader.get("n_group", 0)
    num_shared = reader.get("num_shared_experts", 0)
    shared_size = num_shared * reader.need("moe_intermediate_size")
    stated = config.get("moe_shared_expert_intermediate_size")
    if num_shared and stated is not None and stated not in (shared_size, config["moe_intermediate_size"]):
        raise ValueError(
            f"{reader.source}: moe_shared_expert_intermediate_size ({stated}) contradicts "
            f"num_shared_experts x moe_intermediate_size ({shared_size}); correct whichever is wrong."
        )
    return replace(
        model,
        qk_layernorm=reader.get("use_qk_norm", True, bool),
        rotary_percent=factor,
        num_dense_layers=reader.need("first_k_dense_replace"),
        num_moe_experts=reader.need("num_experts"),
        moe_ffn_hidden_size=reader.need("moe_intermediate_size"),
        moe_shared_expert_intermediate_size=shared_size,
        moe_router_topk=reader.need("num_experts_per_tok"),
        moe_router_num_groups=num_groups if num_groups > 1 else 0,
        moe_router_group_topk=reader.get("topk_group", 0) if num_groups > 1 else 0,
        moe_router_topk_scaling_factor=reader.need("routed_scaling_factor", float),
        moe_router_score_function="sigmoid",
        moe_router_pre_softmax=False,
        moe_router_dtype="fp32",
        moe_router_enable_expert_bias=reader.get("moe_router_enable_expert_bias", True, bool),
    )


def _qwen3_moe(reader: _Reader, model: ModelConfig) -> ModelConfig:
    if reader.config.get("decoder_sparse_step", 1) != 1:
        raise ValueError(
            f"{reader.source}: decoder_sparse_step ({reader.config['decoder_sparse_step']}) must be 1: "
            "our model has dense layers only below its mixture-of-experts layers."
        )
    dense = reader.get("mlp_only_layers", [], list)
    if any(layer not in dense for layer in range(len(dense))):
        raise ValueError(
            f"{reader.source}: mlp_only_layers ({dense}) must be the lowest layers: our model has dense "
            "layers only below its mixture-of-experts layers."
        )
    return replace(
        model,
        num_dense_layers=len(dense),
        # transformers 5 saves the number of experts under another name.
        num_moe_experts=reader.get("num_local_experts", 0) or reader.need("num_experts"),
        moe_ffn_hidden_size=reader.need("moe_intermediate_size"),
        moe_router_topk=reader.need("num_experts_per_tok"),
        moe_router_score_function="softmax",
        moe_router_pre_softmax=not reader.need("norm_topk_prob", bool),
        moe_router_enable_expert_bias=False,
    )


def _validate_sizes(model: ModelConfig, source: str) -> None:
    """Check everything but the token ids, which may still come from the tokenizer."""
    try:
        replace(model, mask_token_id=0, eos_token_id=1, pad_token_id=1).validate()
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error

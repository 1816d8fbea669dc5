"""What config.json says otherwise from family to family: one table, read in both directions.

A family is what its class in transformers can compute. `fixed` are the fields of ModelConfig that the class knows one
value of: reading sets them, an export with another value is refused. `stated` are keys that may have one value, as our
model has nothing else. `settings` are keys that hold a field. What all families share stands in config_sizes.py (read)
and export_config.py (written), with the files of Ling and LLaDA2.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from megatron_dllm.config import ModelConfig
from megatron_dllm.hf.config_meaning import common_name
from megatron_dllm.hf.config_values import ConfigValues, brief


@dataclass(frozen=True)
class Setting:
    """A key of config.json that holds a field of ModelConfig.

    Attributes:
        key: as it is written; read under each of its spellings.
        field: of ModelConfig.
        read: its value from the file, where `key` is our name of the setting.
        write: what the file says for the field's value.
    """

    key: str
    field: str
    read: Callable[[ConfigValues, str], Any] = lambda reader, key: reader.need(key)
    write: Callable[[Any], Any] = lambda value: value


@dataclass(frozen=True)
class Family:
    """How a family's config.json and ModelConfig hang together.

    Attributes:
        fixed: fields of ModelConfig that the class knows one value of.
        stated: keys with the only value that our model can express; where the file lacks one, the class has that value.
        written: further keys of an export, which say what transformers would else take for granted.
        settings: keys that hold fields.
        has_experts: every model of the family, or none; None: those that state num_experts.
        fixed_of_experts: `fixed` of a model with experts.
        settings_of_experts: `settings` of a model with experts.
    """

    fixed: Mapping[str, Any]
    stated: Mapping[str, Any] = field(default_factory=dict)
    written: Mapping[str, Any] = field(default_factory=dict)
    settings: tuple[Setting, ...] = ()
    has_experts: bool | None = False
    fixed_of_experts: Mapping[str, Any] = field(default_factory=dict)
    settings_of_experts: tuple[Setting, ...] = ()


def _flag(reader: ConfigValues, key: str) -> bool:
    return bool(reader.need(key, bool))


def _without(reader: ConfigValues, key: str) -> bool:
    return not _flag(reader, key)


def _at_least_one(reader: ConfigValues, key: str) -> int:
    number = int(reader.need(key))
    if number < 1:
        raise ValueError(
            f"{reader.source}: {key} ({number}) must be at least 1 in a mixture of experts; correct it as the model's "
            "authors gave it."
        )
    return number


def _lowest_layers(reader: ConfigValues, key: str) -> int:
    layers = reader.get(key, [], list)
    if any(type(layer) is not int for layer in layers) or sorted(layers) != list(range(len(layers))):
        raise ValueError(
            f"{reader.source}: {key} ({brief(layers)}) must be the lowest layers: our model has dense layers only "
            "below its mixture-of-experts layers."
        )
    return len(layers)


_PLAIN = {"qk_layernorm": False, "qk_layernorm_spans_heads": False, "add_qkv_bias": False, "rotary_percent": 1.0}
_QWEN3 = _PLAIN | {"qk_layernorm": True}
# A softmax over the experts of a token, and nothing beside it.
_SOFTMAX = {
    "moe_router_score_function": "softmax",
    "moe_router_enable_expert_bias": False,
    "moe_shared_expert_intermediate_size": 0,
    "moe_router_num_groups": 0,
    "moe_router_topk_scaling_factor": 1.0,
}
_NO_BIAS = {"attention_bias": False}
_NO_WINDOW = {"use_sliding_window": False}
# Without a beginning of its own a Llama would be given token 1.
_NO_BOS = {"bos_token_id": None}
_NO_BALANCING = {"output_router_logits": False, "router_aux_loss_coef": 0.0}
# Qwen3's own default is 128, whatever the number of heads is.
_HEAD_DIM = Setting("head_dim", "kv_channels")
_CHOSEN = Setting("num_experts_per_tok", "moe_router_topk")
_EXPERT_SIZE = Setting("moe_intermediate_size", "moe_ffn_hidden_size")
_NORMALISED = Setting("norm_topk_prob", "moe_router_pre_softmax", _without, lambda value: not value)
_QWEN3_EXPERTS = (Setting("num_experts", "num_moe_experts", _at_least_one), _EXPERT_SIZE, _CHOSEN, _NORMALISED)
_DENSE_BELOW = Setting("mlp_only_layers", "num_dense_layers", _lowest_layers, lambda number: list(range(number)))

FAMILIES = {
    "llama": Family(_PLAIN, stated=_NO_BIAS | {"mlp_bias": False}, written=_NO_BOS),
    "mistral": Family(_PLAIN, written=_NO_BOS | {"sliding_window": None}),
    "mixtral": Family(
        _PLAIN,
        written=_NO_BOS | {"sliding_window": None} | _NO_BALANCING,
        has_experts=True,
        fixed_of_experts=_SOFTMAX | {"num_dense_layers": 0, "moe_router_pre_softmax": False},
        settings_of_experts=(
            Setting("intermediate_size", "moe_ffn_hidden_size"),
            Setting("num_local_experts", "num_moe_experts", _at_least_one),
            _CHOSEN,
        ),
    ),
    "olmoe": Family(
        _QWEN3 | {"qk_layernorm_spans_heads": True},
        stated=_NO_BIAS | {"clip_qkv": None},
        written=_NO_BALANCING,
        has_experts=True,
        fixed_of_experts=_SOFTMAX | {"num_dense_layers": 0},
        settings_of_experts=(
            Setting("intermediate_size", "moe_ffn_hidden_size"),
            Setting("num_experts", "num_moe_experts", _at_least_one),
            _CHOSEN,
            _NORMALISED,
        ),
    ),
    "qwen2": Family(_PLAIN | {"add_qkv_bias": True}, stated=_NO_WINDOW),
    "qwen3": Family(_QWEN3, stated=_NO_BIAS | _NO_WINDOW, settings=(_HEAD_DIM,)),
    "sdar": Family(_QWEN3, stated=_NO_BIAS | _NO_WINDOW),
    "qwen3_moe": Family(
        _QWEN3,
        stated=_NO_BIAS | _NO_WINDOW | {"decoder_sparse_step": 1},
        written=_NO_BALANCING,
        has_experts=True,
        fixed_of_experts=_SOFTMAX,
        settings_of_experts=(*_QWEN3_EXPERTS, _DENSE_BELOW),
    ),
    # SDAR's class builds experts in every layer.
    "sdar_moe": Family(
        _QWEN3,
        stated=_NO_BIAS | _NO_WINDOW | {"decoder_sparse_step": 1, "mlp_only_layers": []},
        written=_NO_BALANCING,
        has_experts=True,
        fixed_of_experts=_SOFTMAX | {"num_dense_layers": 0},
        settings_of_experts=_QWEN3_EXPERTS,
    ),
    # The class of our own exports, in hf/modeling: whatever the families above can be.
    "megatron_dllm": Family(
        {},
        settings=(
            Setting("use_qk_norm", "qk_layernorm", _flag),
            Setting("qk_norm_spans_heads", "qk_layernorm_spans_heads", _flag),
            Setting("qkv_bias", "add_qkv_bias", _flag),
            Setting("partial_rotary_factor", "rotary_percent", lambda reader, key: reader.need(key, float)),
            Setting("num_experts", "num_moe_experts"),
        ),
        has_experts=None,
        fixed_of_experts=_SOFTMAX,
        settings_of_experts=(_EXPERT_SIZE, _CHOSEN, _NORMALISED, Setting("first_k_dense_replace", "num_dense_layers")),
    ),
}


def read_family(reader: ConfigValues, model: ModelConfig) -> ModelConfig:
    """The model with what its family adds.

    Args:
        reader: of config.json.
        model: with what all families share.

    Raises:
        ValueError: a key is missing, or has a value that our model cannot express.
    """
    family = FAMILIES[model.family]
    for key, only in family.stated.items():
        if (value := reader.values.get(key, only)) != only:
            raise ValueError(
                f"{reader.source}: {key} ({brief(value)}) must be {only} in a {model.family}: our model has nothing "
                "else; it would change the results silently, so the model is not converted."
            )
    _refuse_part_rotation(reader, model, family)
    values = {**family.fixed, **_read(reader, family.settings)}
    has_experts = values.get("num_moe_experts", 0) > 0 if family.has_experts is None else family.has_experts
    if has_experts:
        values |= {**family.fixed_of_experts, **_read(reader, family.settings_of_experts)}
    return replace(model, **values)


def _read(reader: ConfigValues, settings: tuple[Setting, ...]) -> dict[str, Any]:
    return {setting.field: setting.read(reader, common_name(setting.key)) for setting in settings}


def _refuse_part_rotation(reader: ConfigValues, model: ModelConfig, family: Family) -> None:
    """Refuse a rotary embedding of a part of each head where a family turns the whole, and two shares that differ."""
    width, share = model.kv_channels, reader.get("partial_rotary_factor", 1.0, float)
    count = reader.get("rotary_dim", int(share * width))
    if "rotary_percent" in family.fixed and (share != 1.0 or count != width):
        raise ValueError(
            f"{reader.source}: partial_rotary_factor ({share}) and rotary_dim ({count}) must cover the whole head "
            f"({width} features) in a {model.family}; correct them as the model's authors gave them."
        )
    if count != int(share * width):
        raise ValueError(
            f"{reader.source}: partial_rotary_factor ({share}) of {width} features a head and rotary_dim ({count}) "
            "differ; correct whichever is wrong."
        )


def family_keys(model: ModelConfig, architecture: str) -> dict[str, Any]:
    """The keys of config.json that the family of an architecture adds to those that all have.

    Args:
        model: checked by `export_limits.check_architecture`.
        architecture: one of FAMILIES.
    """
    family = FAMILIES[architecture]
    settings = family.settings + (family.settings_of_experts if model.is_moe else ())
    values = {setting.key: setting.write(getattr(model, setting.field)) for setting in settings}
    return {**family.stated, **family.written, **values}

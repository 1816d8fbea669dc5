"""A config.json in one spelling.

Versions of transformers and authors of models write one setting under different names and in different places. Here
each has one name and one place, so that reading and comparing need to know no other; where a file states a setting
twice, both must say the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_dllm.hf.config_values import brief

# Our name of a setting, and its other names.
SPELLINGS = {
    "dtype": ("torch_dtype",),
    "num_hidden_layers": ("num_layers",),
    "num_experts": ("num_local_experts", "n_routed_experts"),
    "num_shared_experts": ("n_shared_experts",),
    "num_experts_per_tok": ("num_experts_per_token", "moe_topk"),
    "score_function": ("scoring_func",),
    "router_dtype": ("moe_router_dtype",),
    "block_length": ("block_size",),
}
# Written at the top, by transformers 5 into rope_parameters, by earlier ones sometimes into rope_scaling.
_ROPE_VALUES = ("rope_theta", "partial_rotary_factor")
_ROPE_PLACES = ("rope_parameters", "rope_scaling")
# What changes neither a weight nor what it means: traces of how a model was loaded, saved or trained.
BOOKKEEPING = (
    "transformers_version",
    "_name_or_path",
    "_commit_hash",
    "_attn_implementation",
    "_attn_implementation_autoset",
    "attn_implementation",
    "dtype",  # of the tensors themselves, which are compared
    "use_cache",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "return_dict",
    "initializer_range",
    "router_aux_loss_coef",
    "attention_dropout",
    "embedding_dropout",
    "output_dropout",
)
_FULL = "full_attention"
# What says nothing as long as there are no windows.
_WINDOWS = ("use_sliding_window", "sliding_window", "max_window_layers")


def canonical(config: Mapping[str, Any], source: str = "config.json") -> dict[str, Any]:
    """The settings that a config.json states, each under one name; null counts as not stated.

    Args:
        config: the parsed file.
        source: its name, for errors.

    Raises:
        ValueError: two statements of one setting differ; both are named.
    """
    stated = {key: value for key, value in config.items() if value is not None}
    for name, others in SPELLINGS.items():
        found = {spelling: stated.pop(spelling) for spelling in (name, *others) if spelling in stated}
        if found:
            stated[name] = agreed({key: _plain(value) for key, value in found.items()}, source)
    return _with_one_rope(stated, source)


def meaning(config: Mapping[str, Any], source: str = "config.json") -> dict[str, Any]:
    """What two models must have in common to be the same model: `canonical` without `BOOKKEEPING`."""
    stated = {key: value for key, value in canonical(config, source).items() if key not in BOOKKEEPING}
    if not stated.get("use_sliding_window"):
        stated = {key: value for key, value in stated.items() if key not in _WINDOWS}
        if has_full_attention(stated.get("layer_types")):
            stated.pop("layer_types", None)
    if isinstance(code := stated.get("auto_map"), dict):
        # transformers puts the repository that the code came from before its name.
        stated["auto_map"] = {key: str(value).rpartition("--")[2] for key, value in code.items()}
    return stated


def common_name(key: str) -> str:
    """Our name of a setting, by any of its spellings."""
    return next((name for name, others in SPELLINGS.items() if key in others), key)


def has_full_attention(layer_types: Any) -> bool:
    """Whether a config.json's layer_types says what its absence says: no layer has a window."""
    return layer_types is None or (isinstance(layer_types, list) and all(kind == _FULL for kind in layer_types))


def agreed(statements: dict[str, Any], source: str) -> Any:
    """The value that all statements of one setting give.

    Raises:
        ValueError: two differ.
    """
    (first, value), *others = statements.items()
    for name, other in others:
        if other != value:
            raise ValueError(
                f"{source}: {first} ({brief(value)}) and {name} ({brief(other)}) state the same setting and differ; "
                "correct whichever is wrong."
            )
    return value


def _plain(value: Any) -> Any:
    """A dtype without the name of the library."""
    return value.removeprefix("torch.") if isinstance(value, str) else value


def _with_one_rope(stated: dict[str, Any], source: str) -> dict[str, Any]:
    """RoPE's values at the top, and whatever scales it in rope_scaling."""
    places = {place: stated.pop(place) for place in _ROPE_PLACES if place in stated}
    for place, value in places.items():
        if not isinstance(value, dict):
            raise ValueError(
                f"{source}: {place} ({brief(value)}) must be an object or null; correct it as the model's authors "
                "gave it."
            )
    for name in _ROPE_VALUES:
        found = {name: stated[name]} if name in stated else {}
        found |= {f"{place}.{name}": value[name] for place, value in places.items() if value.get(name) is not None}
        if found:
            stated[name] = agreed(found, source)
    scaling = _scaling_in(places, source)
    if scaling.get("rope_type", "default") == "default":
        scaling.pop("rope_type", None)
    if scaling:
        stated["rope_scaling"] = scaling
    return stated


def _scaling_in(places: dict[str, dict[str, Any]], source: str) -> dict[str, Any]:
    """What stretches RoPE, each value once; its kind is rope_type, which older files call type."""
    found: dict[str, dict[str, Any]] = {}
    for place, values in places.items():
        for key, value in values.items():
            if key not in _ROPE_VALUES and value is not None:
                name = "rope_type" if key == "type" else key
                found.setdefault(name, {})[f"{place}.{key}"] = value
    return {name: agreed(statements, source) for name, statements in found.items()}

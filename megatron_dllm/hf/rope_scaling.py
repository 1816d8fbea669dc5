"""The rope_scaling of a config.json (rope_parameters in transformers 5), read and written."""

from __future__ import annotations

from typing import Any

from megatron_dllm.config import ModelConfig, RotaryScalingConfig
from megatron_dllm.config.rotary_scaling import LLAMA3, NTK, YARN
from megatron_dllm.hf.config_values import ConfigValues, brief

# Keys of each kind by our names of them, which are transformers'; the first two must be there.
_KEYS = {
    YARN: ("factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "attention_factor"),
    LLAMA3: ("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"),
}
_REQUIRED = {YARN: 2, LLAMA3: 4}
# Keys with one value that our frequencies have.
_MUST_BE = {"truncate": True}


def read_scaling(reader: ConfigValues) -> RotaryScalingConfig | None:
    """The scaling that a config.json states, None for none.

    Args:
        reader: of its canonical values, whose rope_scaling is that of either place.

    Raises:
        ValueError: a kind or a key that our rotary embedding does not have, or one that is missing.
    """
    stated = reader.get("rope_scaling", None, dict)
    if stated is None:
        return None
    kind = stated.get("rope_type")
    if not isinstance(kind, str) or kind not in _KEYS:
        raise ValueError(
            f"{reader.source}: rope_scaling ({brief(kind or stated)}) must be null, {' or '.join(_KEYS)}: our rotary "
            "embedding is not stretched otherwise; use the checkpoint of the native context length."
        )
    values = ConfigValues({f"rope_scaling.{key}": value for key, value in stated.items()}, reader.source)
    for key, value in stated.items():
        if key not in ("rope_type", *_KEYS[kind]) and value != _MUST_BE.get(key):
            raise ValueError(
                f"{reader.source}: rope_scaling.{key} ({brief(value)}) is not known in {kind}; it would change the "
                "results silently, so the model is not converted."
            )
    found: dict[str, Any] = {}
    for number, key in enumerate(_KEYS[kind]):
        wanted = int if key == "original_max_position_embeddings" else float
        name = f"rope_scaling.{key}"
        if number < _REQUIRED[kind] or values.get(name, None, wanted) is not None:
            found[key] = values.need(name, wanted)
    return RotaryScalingConfig(kind=kind, **found)


def written_scaling(model: ModelConfig) -> dict[str, Any]:
    """The rope_theta and rope_scaling of an export.

    Engines have no ntk of this form; it is nothing but another base, and is written as that.
    """
    scaling = model.rotary_scaling
    if scaling is None:
        return {"rope_theta": model.rotary_base, "rope_scaling": None}
    if scaling.kind == NTK:
        num_features = int(model.kv_channels * model.rotary_percent)
        return {"rope_theta": scaling.ntk_base(model.rotary_base, num_features), "rope_scaling": None}
    usual, stated = RotaryScalingConfig(), {}
    for number, key in enumerate(_KEYS[scaling.kind]):
        value = getattr(scaling, key)
        if number < _REQUIRED[scaling.kind] or value != getattr(usual, key):
            stated[key] = value
    return {"rope_theta": model.rotary_base, "rope_scaling": {"rope_type": scaling.kind, **stated}}

"""What the class of an architecture can hold: what it has no place for is refused, what it must have is filled in."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from megatron_dllm.config import ModelConfig
from megatron_dllm.hf.architectures import ARCHITECTURE_CLASS, ARCHITECTURES_OF_FAMILY

_DENSE = ("qwen3", "sdar")
_BAILING = ("bailing_moe", "llada2_moe")
# Fields of ModelConfig that Qwen3's classes, and SDAR's, know one value of.
_QWEN3_ONLY: dict[str, Any] = {"qk_layernorm": True, "rotary_percent": 1.0}
_QWEN3_MOE_ONLY: dict[str, Any] = {
    "moe_router_score_function": "softmax",
    "moe_router_enable_expert_bias": False,
    "moe_shared_expert_intermediate_size": 0,
    "moe_router_num_groups": 0,
    "moe_router_topk_scaling_factor": 1.0,
}
_BAILING_ONLY: dict[str, Any] = {"moe_router_score_function": "sigmoid"}


def check_architecture(model: ModelConfig, architecture: str) -> None:
    """Refuse an architecture whose class would lose a part of the model, or compute something else.

    Raises:
        ValueError: naming the part.
    """
    choices = ARCHITECTURES_OF_FAMILY[model.family]
    if architecture not in choices:
        raise ValueError(
            f"architecture ({architecture}) has other tensors than a model of family {model.family}; "
            f"use one of {', '.join(choices)}."
        )
    name = ARCHITECTURE_CLASS[architecture]
    if model.is_moe == (architecture in _DENSE):
        layers = "dense" if architecture in _DENSE else "a mixture of experts"
        raise ValueError(
            f"model.num_moe_experts ({model.num_moe_experts}) has no place in {name}, which is {layers}; "
            "correct model.family in the recipe."
        )
    for field, only in _only(architecture).items():
        if (value := getattr(model, field)) != only:
            raise ValueError(
                f"model.{field} ({value}) must be {only} in {name}: no serving engine has a class that computes "
                "anything else under these names; megatron_dllm.generate decodes the checkpoint as it is."
            )


def _only(architecture: str) -> dict[str, Any]:
    """Fields of the model that the class knows one value of."""
    if architecture in _BAILING:
        return _BAILING_ONLY
    if architecture in _DENSE:
        return _QWEN3_ONLY
    # Qwen3-MoE may have dense layers below; SDAR's class builds experts in every layer.
    return _QWEN3_ONLY | _QWEN3_MOE_ONLY | ({"num_dense_layers": 0} if architecture == "sdar_moe" else {})


def as_exported(model: ModelConfig, architecture: str) -> ModelConfig:
    """The model as an export states it: SGLang's LLaDA2 and Ling classes want a bias beside sigmoid scores; 0 is none.

    Args:
        model: of the checkpoint.
        architecture: of the export.
    """
    return replace(model, moe_router_enable_expert_bias=True) if architecture in _BAILING else model

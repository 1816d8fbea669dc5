"""What the class of an architecture can hold: what it has no place for is refused, what it must have is filled in."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from megatron_dllm.config import ModelConfig
from megatron_dllm.hf.architectures import ARCHITECTURE_CLASS, ARCHITECTURES_OF_FAMILY
from megatron_dllm.hf.families import FAMILIES

_BAILING = ("bailing_moe", "llada2_moe")
_BAILING_ONLY: dict[str, Any] = {
    "moe_router_score_function": "sigmoid",
    "qk_layernorm_spans_heads": False,
    "add_qkv_bias": False,
}


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
    has_experts = FAMILIES[architecture].has_experts if architecture in FAMILIES else True
    if has_experts is not None and model.is_moe != has_experts:
        layers = "a mixture of experts" if has_experts else "dense"
        raise ValueError(
            f"model.num_moe_experts ({model.num_moe_experts}) has no place in {name}, which is {layers}; "
            "correct model.family in the recipe."
        )
    for field, only in _only(model, architecture).items():
        if (value := getattr(model, field)) != only:
            raise ValueError(
                f"model.{field} ({value}) must be {only} in {name}, which computes nothing else under these names; "
                f"{_elsewhere(model, architecture)}megatron_dllm.generate decodes the checkpoint as it is."
            )


def _only(model: ModelConfig, architecture: str) -> dict[str, Any]:
    """Fields of the model that the class knows one value of."""
    if architecture in _BAILING:
        return _BAILING_ONLY
    family = FAMILIES[architecture]
    return {**family.fixed, **(family.fixed_of_experts if model.is_moe else {})}


def _elsewhere(model: ModelConfig, architecture: str) -> str:
    """Which other class may hold the model."""
    own = "megatron_dllm"
    return f"use {own}, or " if own in ARCHITECTURES_OF_FAMILY[model.family] and architecture != own else ""


def as_exported(model: ModelConfig, architecture: str) -> ModelConfig:
    """The model as an export states it: SGLang's LLaDA2 and Ling classes want a bias beside sigmoid scores; 0 is none.

    Args:
        model: of the checkpoint.
        architecture: of the export.
    """
    return replace(model, moe_router_enable_expert_bias=True) if architecture in _BAILING else model

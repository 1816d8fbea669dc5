"""Rotary frequencies for contexts longer than those of training: YaRN, and that of Llama 3.1, as transformers has them.

Plain PyTorch, and no module of transformers, whose functions read a configuration in ways that differ by version.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

_KEYS = {"yarn": ("factor", "original_max_position_embeddings"),
         "llama3": ("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor")}
_OPTIONAL = {"yarn": ("beta_fast", "beta_slow", "attention_factor"), "llama3": ()}


def scaling_of(rope: dict[str, Any] | None) -> dict[str, Any]:
    """The part of rope_scaling, or of rope_parameters, that says how the rotary embedding is stretched; {} for none.

    Raises:
        ValueError: a kind or a key that is not known, or one that is missing.
    """
    stated = {key: value for key, value in (rope or {}).items()
              if value is not None and key not in ("rope_theta", "partial_rotary_factor")}
    kind = stated.pop("rope_type", stated.pop("type", "default"))
    stated.pop("type", None)
    if kind == "default":
        return {}
    if kind not in _KEYS:
        raise ValueError(f"rope_scaling ({kind}) must be null, yarn or llama3; the model's layers have no other.")
    known = (*_KEYS[kind], *_OPTIONAL[kind])
    wrong = [key for key in stated if key not in known and (key, stated[key]) != ("truncate", True)]
    missing = [key for key in _KEYS[kind] if key not in stated]
    if wrong or missing:
        raise ValueError(f"rope_scaling ({stated}) must have {', '.join(_KEYS[kind])} and may have "
                         f"{', '.join(_OPTIONAL[kind]) or 'nothing else'}; correct {', '.join(wrong + missing)}.")
    return {"rope_type": kind, **{key: stated[key] for key in known if key in stated}}


def temperature_of(scaling: dict[str, Any]) -> float:
    """Factor on the rotated features of queries and keys."""
    if scaling.get("rope_type") != "yarn" or scaling["factor"] == 1:
        return 1.0
    return scaling.get("attention_factor") or 0.1 * math.log(scaling["factor"]) + 1.0


def scaled_frequencies(frequencies: Tensor, theta: float, scaling: dict[str, Any]) -> Tensor:
    """Frequencies of the longer context.

    Args:
        frequencies: [rotary_dim / 2] of the original context.
        theta: their base.
        scaling: of `scaling_of`.

    Returns:
        [rotary_dim / 2].
    """
    if not scaling or scaling["factor"] == 1:
        return frequencies
    slowed = frequencies / scaling["factor"]
    if scaling["rope_type"] == "yarn":
        share = _yarn_share(2 * len(frequencies), theta, scaling).to(frequencies.device)
        return slowed * share + frequencies * (1 - share)
    length = scaling["original_max_position_embeddings"]
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = length * frequencies / (2 * math.pi)
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - kept) * slowed + kept * frequencies


def _yarn_share(rotary_dim: int, theta: float, scaling: dict[str, Any]) -> Tensor:
    """[rotary_dim / 2] share of the factor that each pair takes."""
    length = scaling["original_max_position_embeddings"]
    low, high = (rotary_dim * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(theta))
                 for turns in (scaling.get("beta_fast") or 32, scaling.get("beta_slow") or 1))
    low, high = max(math.floor(low), 0), min(math.ceil(high), rotary_dim - 1)
    width = high - low if high != low else 0.001
    return ((torch.arange(rotary_dim // 2).float() - low) / width).clamp(0, 1)

"""Sliding windows, which our attention does not have: refused, unless no text is long enough to notice one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_dllm.config import ModelConfig
from megatron_dllm.hf.config_values import ConfigValues

# Families in which every layer has the window that config.json names; what transformers takes where it names none.
_WINDOW_WITHOUT_KEY = {"mistral": 4096, "mixtral": None}


def refuse_window(config: Mapping[str, Any], model: ModelConfig, source: str) -> None:
    """Refuse a window that the longest text would notice.

    Args:
        config: the parsed file, where null is another thing than a missing key.
        model: that it describes.
        source: its name, for errors.

    Raises:
        ValueError: naming the window and the lengths.
    """
    if model.family not in _WINDOW_WITHOUT_KEY:
        return
    usual, longest = _WINDOW_WITHOUT_KEY[model.family], model.max_position_embeddings
    if "sliding_window" not in config and usual is not None:
        raise ValueError(
            f"{source} lacks sliding_window, for which transformers takes {usual} in a {model.family}; write null for "
            "none, or the window as the model's authors gave it."
        )
    window = ConfigValues(dict(config), source).get("sliding_window", None)
    if window is not None and window < longest:
        raise ValueError(
            f"{source}: sliding_window ({window}) must be null or at least max_position_embeddings ({longest}): our "
            f"attention has no windows; set max_position_embeddings to {window}, up to which the model is the same."
        )

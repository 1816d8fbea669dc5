"""The architectures that we read and write: their names, classes, and which of them hold the same tensors."""

from __future__ import annotations

from pathlib import Path

# Code that goes into exports of our own classes.
MODELING_FILES = Path(__file__).parent / "modeling"
FAMILY_OF_MODEL_TYPE = {
    # dFactory calls its training form of llada2_moe by a name of its own.
    "bailing_moe": "bailing_moe",
    "bailing_moe_v2": "bailing_moe",
    "llada2_moe": "llada2_moe",
    "llada2_moe_veomni": "llada2_moe",
    "qwen3_moe": "qwen3_moe",
    "sdar_moe": "sdar_moe",
    "qwen3": "qwen3",
}
ARCHITECTURE_CLASS = {
    "bailing_moe": "BailingMoeV2ForCausalLM",
    "llada2_moe": "LLaDA2MoeModelLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "sdar_moe": "SDARMoeForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
# Architectures an export may be written as: those with the same tensors.
ARCHITECTURES_OF_FAMILY = {
    "bailing_moe": ("bailing_moe", "llada2_moe"),
    "llada2_moe": ("llada2_moe", "bailing_moe"),
    "qwen3_moe": ("qwen3_moe", "sdar_moe"),
    "sdar_moe": ("sdar_moe", "qwen3_moe"),
    "qwen3": ("qwen3",),
}
DIFFUSION_ARCHITECTURES = ("llada2_moe", "sdar_moe")
# Tokens that LLaDA2's and SGLang's decoding denoise together.
DEFAULT_BLOCK_SIZE = 32

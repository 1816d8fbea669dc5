"""The architectures that we read and write: their names, classes, and which of them hold the same tensors."""

from __future__ import annotations

from pathlib import Path

# Code that goes into exports, as transformers has none for these architectures: the configuration file, the modeling
# file, and what both kinds of models share. transformers 4 copies only what a modeling file itself imports.
MODELING_FILES = Path(__file__).parent / "modeling"
_SHARED_CODE = ("block_diffusion_generation.py", "block_diffusion_layers.py", "block_diffusion_model.py")
_LLADA2_CODE = ("configuration_llada2_moe.py", "modeling_llada2_moe.py", *_SHARED_CODE)
_SDAR_CODE = ("configuration_sdar.py", "modeling_sdar.py", *_SHARED_CODE)
CODE_OF_ARCHITECTURE = {"llada2_moe": _LLADA2_CODE, "sdar_moe": _SDAR_CODE, "sdar": _SDAR_CODE}
# Where transformers finds the classes in that code.
AUTO_MAP = {
    "llada2_moe": {
        "AutoConfig": "configuration_llada2_moe.LLaDA2MoeConfig",
        "AutoModel": "modeling_llada2_moe.LLaDA2MoeModel",
        "AutoModelForCausalLM": "modeling_llada2_moe.LLaDA2MoeModelLM",
    },
    "sdar_moe": {
        "AutoConfig": "configuration_sdar.SDARMoeConfig",
        "AutoModel": "modeling_sdar.SDARMoeModel",
        "AutoModelForCausalLM": "modeling_sdar.SDARMoeForCausalLM",
    },
    "sdar": {
        "AutoConfig": "configuration_sdar.SDARConfig",
        "AutoModel": "modeling_sdar.SDARModel",
        "AutoModelForCausalLM": "modeling_sdar.SDARForCausalLM",
    },
}
FAMILY_OF_MODEL_TYPE = {
    "bailing_moe": "bailing_moe",
    "bailing_moe_v2": "bailing_moe",
    "llada2_moe": "llada2_moe",
    # dFactory calls its training form of llada2_moe by a name of its own.
    "llada2_moe_veomni": "llada2_moe",
    "qwen3_moe": "qwen3_moe",
    "sdar_moe": "sdar_moe",
    "qwen3": "qwen3",
    "sdar": "sdar",
}
ARCHITECTURE_CLASS = {
    "bailing_moe": "BailingMoeV2ForCausalLM",
    "llada2_moe": "LLaDA2MoeModelLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "sdar_moe": "SDARMoeForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "sdar": "SDARForCausalLM",
}
# Architectures an export may be written as: those with the same tensors.
ARCHITECTURES_OF_FAMILY = {
    "bailing_moe": ("bailing_moe", "llada2_moe"),
    "llada2_moe": ("llada2_moe", "bailing_moe"),
    "qwen3_moe": ("qwen3_moe", "sdar_moe"),
    "sdar_moe": ("sdar_moe", "qwen3_moe"),
    "qwen3": ("qwen3", "sdar"),
    "sdar": ("sdar", "qwen3"),
}
DIFFUSION_ARCHITECTURES = ("llada2_moe", "sdar_moe", "sdar")

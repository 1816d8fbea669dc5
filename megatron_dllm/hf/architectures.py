"""The architectures that we read and write: their names, classes, and which of them hold the same tensors."""

from __future__ import annotations

from pathlib import Path

# Code that goes into exports, as transformers has none for these architectures: the configuration file, the modeling
# file, and what both kinds of models share. transformers 4 copies only what a modeling file itself imports.
MODELING_FILES = Path(__file__).parent / "modeling"
_SHARED_CODE = (
    "block_diffusion_generation.py",
    "block_diffusion_layers.py",
    "block_diffusion_model.py",
    "rotary_scaling.py",
)
_LLADA2_CODE = ("configuration_llada2_moe.py", "modeling_llada2_moe.py", *_SHARED_CODE)
_SDAR_CODE = ("configuration_sdar.py", "modeling_sdar.py", *_SHARED_CODE)
_OWN_CODE = ("configuration_megatron_dllm.py", "modeling_megatron_dllm.py", *_SHARED_CODE)
CODE_OF_ARCHITECTURE = {
    "llada2_moe": _LLADA2_CODE,
    "sdar_moe": _SDAR_CODE,
    "sdar": _SDAR_CODE,
    "megatron_dllm": _OWN_CODE,
}
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
    "megatron_dllm": {
        "AutoConfig": "configuration_megatron_dllm.MegatronDllmConfig",
        "AutoModel": "modeling_megatron_dllm.MegatronDllmModel",
        "AutoModelForCausalLM": "modeling_megatron_dllm.MegatronDllmForCausalLM",
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
    "qwen2": "qwen2",
    "llama": "llama",
    "mistral": "mistral",
    "mixtral": "mixtral",
    "olmoe": "olmoe",
    "megatron_dllm": "megatron_dllm",
}
# Known by name, and what they have that our model does not.
LACKING = {
    "deepseek_v2": "multi-head latent attention (kv_lora_rank)",
    "deepseek_v3": "multi-head latent attention (kv_lora_rank)",
    "qwen2_moe": "a gate on its shared expert",
    "gpt_oss": "attention sinks, and biases in its experts",
    "gemma2": "norms behind attention and MLP, and capped logits",
    "gemma3_text": "norms behind attention and MLP",
    "olmo2": "its norms behind attention and MLP",
}
ARCHITECTURE_CLASS = {
    "bailing_moe": "BailingMoeV2ForCausalLM",
    "llada2_moe": "LLaDA2MoeModelLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "sdar_moe": "SDARMoeForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "sdar": "SDARForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "olmoe": "OlmoeForCausalLM",
    "megatron_dllm": "MegatronDllmForCausalLM",
}
# Architectures an export may be written as: those that can hold the tensors, first of each kind the usual one.
ARCHITECTURES_OF_FAMILY = {
    "bailing_moe": ("bailing_moe", "llada2_moe"),
    "llada2_moe": ("llada2_moe", "bailing_moe"),
    "qwen3_moe": ("qwen3_moe", "sdar_moe", "megatron_dllm"),
    "sdar_moe": ("sdar_moe", "qwen3_moe", "megatron_dllm"),
    "qwen3": ("qwen3", "sdar", "megatron_dllm"),
    "sdar": ("sdar", "qwen3", "megatron_dllm"),
    "qwen2": ("qwen2", "megatron_dllm"),
    "llama": ("llama", "megatron_dllm"),
    "mistral": ("mistral", "megatron_dllm"),
    "mixtral": ("mixtral", "megatron_dllm"),
    "olmoe": ("olmoe", "megatron_dllm"),
    "megatron_dllm": ("megatron_dllm",),
}
DIFFUSION_ARCHITECTURES = ("llada2_moe", "sdar_moe", "sdar", "megatron_dllm")

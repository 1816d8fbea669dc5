"""Tiny models of every family, as values, HF folders and checkpoints (the fixtures are known to all unit tests)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.synthetic import write_synthetic
from checkpoints_tools import hf_to_mcore
from megatron_dllm.checkpoint.manifest import checksum, payload_files
from megatron_dllm.config import ModelConfig
from megatron_dllm.run.files import write_json
from megatron_dllm.run.names import MANIFEST

LING = ModelConfig(
    family="bailing_moe",
    num_layers=3,
    hidden_size=24,
    ffn_hidden_size=20,
    num_attention_heads=4,
    num_query_groups=2,
    kv_channels=8,
    vocab_size=40,
    max_position_embeddings=64,
    num_dense_layers=1,
    num_moe_experts=4,
    moe_ffn_hidden_size=10,
    moe_shared_expert_intermediate_size=10,
    moe_router_topk=2,
    moe_router_num_groups=2,
    moe_router_group_topk=1,
    moe_router_topk_scaling_factor=2.5,
    mask_token_id=2,
    eos_token_id=0,
    pad_token_id=1,
)


def as_qwen3(model: ModelConfig, family: str) -> ModelConfig:
    """A Ling without what the classes of Qwen3 and SDAR have no place for; a dense one also without its experts."""
    dense = {} if family.endswith("_moe") else dict(num_moe_experts=0, moe_ffn_hidden_size=0, moe_router_topk=0)
    return replace(
        model,
        family=family,
        num_dense_layers=0,
        moe_shared_expert_intermediate_size=0,
        moe_router_num_groups=0,
        moe_router_group_topk=0,
        moe_router_topk_scaling_factor=1.0,
        moe_router_score_function="softmax",
        moe_router_enable_expert_bias=False,
        rotary_percent=1.0,
        **dense,
    )


QWEN3_MOE = replace(as_qwen3(LING, "qwen3_moe"), rotary_base=1e6)
QWEN3 = ModelConfig(
    family="qwen3",
    num_layers=3,
    hidden_size=24,
    ffn_hidden_size=20,
    num_attention_heads=4,
    num_query_groups=2,
    kv_channels=8,
    vocab_size=40,
    max_position_embeddings=64,
    rotary_percent=1.0,
    rotary_base=1e6,
    mask_token_id=2,
    eos_token_id=0,
    pad_token_id=1,
)
LLAMA = replace(QWEN3, family="llama", qk_layernorm=False, rotary_base=1e4)
MIXTRAL = replace(QWEN3_MOE, family="mixtral", qk_layernorm=False, ffn_hidden_size=10)
MODELS = {
    "bailing_moe": LING,
    "llada2_moe": replace(LING, family="llada2_moe"),
    "qwen3_moe": QWEN3_MOE,
    "sdar_moe": replace(QWEN3_MOE, family="sdar_moe"),
    "qwen3": QWEN3,
    "sdar": replace(QWEN3, family="sdar"),
    "qwen3 tied": replace(QWEN3, tie_word_embeddings=True),
    "qwen2": replace(LLAMA, family="qwen2", add_qkv_bias=True),
    "llama": LLAMA,
    "mistral": replace(LLAMA, family="mistral"),
    "mixtral": MIXTRAL,
    "olmoe": replace(MIXTRAL, family="olmoe", qk_layernorm=True, qk_layernorm_spans_heads=True),
    "megatron_dllm": replace(LLAMA, family="megatron_dllm", add_qkv_bias=True, tie_word_embeddings=True),
    "megatron_dllm with experts": replace(MIXTRAL, family="megatron_dllm", num_dense_layers=1, rotary_percent=0.5),
    "two dense layers, two shared experts": replace(LING, num_dense_layers=2, moe_shared_expert_intermediate_size=20),
}


@pytest.fixture
def hf(tmp_path: Path) -> Path:
    """A tiny Ling in bf16, one file."""
    write_synthetic(tmp_path / "hf", LING)
    return tmp_path / "hf"


@pytest.fixture
def checkpoint(hf: Path, tmp_path: Path) -> Path:
    """The same as a torch_dist checkpoint."""
    hf_to_mcore.convert(hf, tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


@pytest.fixture
def make_checkpoint(tmp_path: Path):
    """Makes torch_dist checkpoints of a tiny Ling by seed: make("name", seed, dtype)."""

    def make(name: str, seed: int, dtype: torch.dtype = torch.bfloat16, model: ModelConfig = LING) -> Path:
        write_synthetic(tmp_path / f"{name}_hf", model, seed=seed, dtype=dtype)
        hf_to_mcore.convert(tmp_path / f"{name}_hf", tmp_path / name)
        return tmp_path / name

    return make


def left_in(folder: Path) -> set[str]:
    """Names in a folder, hidden ones included: an error must leave no output behind."""
    return {path.name for path in folder.iterdir()}


def seal(checkpoint: Path) -> None:
    """Write the manifest of the files as they are, so that a change made on purpose is no damage."""
    write_json(checkpoint / MANIFEST, {name: checksum(checkpoint / name) for name in payload_files(checkpoint)})

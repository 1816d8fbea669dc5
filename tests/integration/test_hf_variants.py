"""Folders as transformers itself writes them: fused experts, a tied head, and settings that no longer agree."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks.synthetic import write_synthetic
from checkpoints_tools import hf_to_mcore, mcore_to_hf
from checkpoints_tools.compare import compare
from megatron_dllm.checkpoint.stored_model import read_stored_model
from tests.tiny_models import LING

transformers = pytest.importorskip("transformers", minversion="5")
SIZES = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "eos_token_id": 0,
    "pad_token_id": 1,
}


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one Qwen3-MoE in two forms: `each` expert by itself, and `fused`."""
    folder = tmp_path_factory.mktemp("experts")
    config = transformers.Qwen3MoeConfig(
        **SIZES, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, norm_topk_prob=True, rope_theta=1e6
    )
    torch.manual_seed(0)
    model = transformers.Qwen3MoeForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(folder / "each")
    model.save_pretrained(folder / "fused", save_original_format=False)
    return folder


def test_fused_experts_are_the_same_model(experts: Path, tmp_path: Path) -> None:
    assert any(name.endswith("experts.gate_up_proj") for name in load_file(experts / "fused" / "model.safetensors"))
    for form in ("each", "fused"):
        hf_to_mcore.convert(experts / form, tmp_path / form, mask_token_id=2)
    assert compare(tmp_path / "each", tmp_path / "fused").is_equal
    assert compare(tmp_path / "fused", experts / "each").is_equal
    assert compare(tmp_path / "each", experts / "fused").is_equal


def _with(source: Path, target: Path, **changes: Any) -> Path:
    shutil.copytree(source, target)
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config | changes))
    return target


def test_a_theta_of_an_earlier_version_does_not_go_before_the_new_one(experts: Path, tmp_path: Path) -> None:
    folder = _with(experts / "each", tmp_path / "conflict", rope_theta=10000.0)
    with pytest.raises(ValueError, match=r"rope_theta \(10000.0\) and rope_parameters.rope_theta \(1000000.0\)"):
        hf_to_mcore.convert(folder, tmp_path / "out", mask_token_id=2)
    hf_to_mcore.convert(_with(experts / "each", tmp_path / "equal", rope_theta=1000000), tmp_path / "out", 2)
    assert read_stored_model(tmp_path / "out").model.rotary_base == 1e6


def test_a_tied_model_saved_with_its_head(tmp_path: Path) -> None:
    config = transformers.Qwen3Config(**SIZES, tie_word_embeddings=True)
    transformers.Qwen3ForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "tied")
    tensors = load_file(tmp_path / "tied" / "model.safetensors")
    assert "lm_head.weight" not in tensors
    for name, head in (
        ("equal", tensors["model.embed_tokens.weight"].clone()),
        ("other", torch.ones(40, 32).bfloat16()),
    ):
        save_file({**tensors, "lm_head.weight": head}, _with(tmp_path / "tied", tmp_path / name) / "model.safetensors")
    hf_to_mcore.convert(tmp_path / "tied", tmp_path / "expected", mask_token_id=2)
    hf_to_mcore.convert(tmp_path / "equal", tmp_path / "actual", mask_token_id=2)
    assert compare(tmp_path / "actual", tmp_path / "expected").is_equal
    with pytest.raises(ValueError, match=r"lm_head\.weight \(\[40, 32\]\) differs from model\.embed_tokens\.weight"):
        hf_to_mcore.convert(tmp_path / "other", tmp_path / "out", mask_token_id=2)


def test_an_export_of_ours_saved_again_with_another_theta(tmp_path: Path) -> None:
    write_synthetic(tmp_path / "hf", LING)
    hf_to_mcore.convert(tmp_path / "hf", tmp_path / "mcore")
    mcore_to_hf.convert(tmp_path / "mcore", tmp_path / "export", "llada2_moe")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "export", trust_remote_code=True, dtype="auto")
    model.save_pretrained(tmp_path / "same")
    hf_to_mcore.convert(tmp_path / "same", tmp_path / "back")
    assert compare(tmp_path / "back", tmp_path / "mcore").is_equal
    model.config.rope_parameters = {**model.config.rope_parameters, "rope_theta": 500000.0}
    model.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=r"rope_theta \(600000.*\) and rope_parameters.rope_theta \(500000.0\)"):
        hf_to_mcore.convert(tmp_path / "other", tmp_path / "out")

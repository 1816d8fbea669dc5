"""Folders that hold a model in another form than the published one, and folders that hold another model."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks.synthetic import write_synthetic
from checkpoints_tools import hf_to_mcore, mcore_to_hf
from megatron_dllm.config import ModelConfig
from megatron_dllm.hf.model_folder import HEAD, open_model_folder
from megatron_dllm.hf.name_table import FUSED, STACKED
from tests.tiny_models import LING, MODELS, QWEN3, QWEN3_MOE, left_in

TIED = replace(QWEN3, tie_word_embeddings=True)


def _rewrite(folder: Path, change) -> dict[str, torch.Tensor]:
    """Change the tensors of a folder."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    return tensors


@pytest.mark.parametrize("model", [LING, QWEN3_MOE, MODELS["sdar_moe"]])
@pytest.mark.parametrize("form", [STACKED, FUSED])
def test_experts_in_one_tensor_become_the_published_form(model: ModelConfig, form: str, tmp_path: Path) -> None:
    write_synthetic(tmp_path / "hf", model)
    expected = load_file(tmp_path / "hf" / "model.safetensors")

    def stack(tensors: dict[str, torch.Tensor]) -> None:
        for layer in range(model.num_dense_layers, model.num_layers):
            prefix = f"model.layers.{layer}.mlp.experts"
            gate, up, down = (
                torch.stack([tensors.pop(f"{prefix}.{e}.{part}_proj.weight") for e in range(4)])
                for part in ("gate", "up", "down")
            )
            tensors[f"{prefix}.down_proj"] = down
            if form == FUSED:
                tensors[f"{prefix}.gate_up_proj"] = torch.cat([gate, up], dim=1)
            else:
                tensors |= {f"{prefix}.gate_proj": gate, f"{prefix}.up_proj": up}

    _rewrite(tmp_path / "hf", stack)
    hf_to_mcore.convert(tmp_path / "hf", tmp_path / "mcore")
    mcore_to_hf.convert(tmp_path / "mcore", tmp_path / "back", model.family)
    actual = load_file(tmp_path / "back" / "model.safetensors")
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[name], value) for name, value in expected.items())


def test_fused_experts_of_another_orientation_are_refused(tmp_path: Path) -> None:
    write_synthetic(tmp_path / "hf", QWEN3_MOE, experts=FUSED)
    name = "model.layers.0.mlp.experts.gate_up_proj"
    _rewrite(tmp_path / "hf", lambda tensors: tensors.update({name: tensors[name].mT.contiguous()}))
    with pytest.raises(ValueError, match=rf"{name} has shape \[4, 24, 20\], config.json asks for \[4, 20, 24\]"):
        open_model_folder(tmp_path / "hf", QWEN3_MOE)


def test_a_tied_model_may_ship_its_head_if_it_is_the_embedding(tmp_path: Path) -> None:
    write_synthetic(tmp_path / "hf", TIED)
    embedding = "model.embed_tokens.weight"
    _rewrite(tmp_path / "hf", lambda tensors: tensors.update({HEAD: tensors[embedding].clone()}))
    hf_to_mcore.convert(tmp_path / "hf", tmp_path / "mcore")
    mcore_to_hf.convert(tmp_path / "mcore", tmp_path / "back")
    assert HEAD not in load_file(tmp_path / "back" / "model.safetensors")

    def touch(tensors: dict[str, torch.Tensor]) -> None:
        tensors[HEAD][-1, -1] += 1

    _rewrite(tmp_path / "hf", touch)
    with pytest.raises(ValueError, match=rf"{HEAD} .* differs from {embedding}.*tie_word_embeddings"):
        hf_to_mcore.convert(tmp_path / "hf", tmp_path / "other")
    _rewrite(tmp_path / "hf", lambda tensors: tensors.update({HEAD: tensors[embedding].float()}))
    with pytest.raises(ValueError, match="tie_word_embeddings"):
        hf_to_mcore.convert(tmp_path / "hf", tmp_path / "other")
    assert left_in(tmp_path) == {"hf", "mcore", "back"}


@pytest.mark.parametrize("name", ["model.rotary_emb.inv_freq", "model.layers.1.self_attn.rotary_emb.inv_freq"])
def test_frequencies_that_old_versions_saved_are_passed_over(name: str, tmp_path: Path) -> None:
    write_synthetic(tmp_path / "hf", QWEN3)
    _rewrite(tmp_path / "hf", lambda tensors: tensors.update({name: torch.ones(4)}))
    assert name not in open_model_folder(tmp_path / "hf", QWEN3).tensors


def test_two_sets_of_shards_are_refused(tmp_path: Path) -> None:
    write_synthetic(tmp_path / "hf", QWEN3, max_shard_bytes=4000)
    save_file({"model.norm.weight": torch.ones(24)}, tmp_path / "hf" / "model.safetensors")
    with pytest.raises(ValueError, match=r"model\.safetensors lies beside model\.safetensors\.index\.json"):
        open_model_folder(tmp_path / "hf", QWEN3)


def test_a_configuration_without_model_type_is_known_by_its_class(tmp_path: Path) -> None:
    write_synthetic(tmp_path / "hf", LING)
    path = tmp_path / "hf" / "config.json"
    config = json.loads(path.read_text())
    del config["model_type"]
    path.write_text(json.dumps(config))
    hf_to_mcore.convert(tmp_path / "hf", tmp_path / "mcore")
    path.write_text(json.dumps(config | {"architectures": ["FalconForCausalLM"]}))
    with pytest.raises(ValueError, match=r"lacks model_type, and architectures \(\['FalconForCausalLM'\]\) names none"):
        hf_to_mcore.convert(tmp_path / "hf", tmp_path / "other")

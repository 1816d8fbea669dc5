"""inspect and compare."""

from __future__ import annotations

import sys
from math import prod
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks.synthetic import write_synthetic
from checkpoints_tools import compare, hf_to_mcore, inspect, mcore_to_hf
from megatron_dllm.hf.name_table import weight_map
from megatron_dllm.run.files import write_json
from megatron_dllm.run.names import CONTRACT, VALIDATION
from tests.tiny_models import LING, MODELS, seal


def test_inspect_counts_parameters_alike_in_both_formats(checkpoint: Path, hf: Path) -> None:
    total = sum(prod(shape) for name, shape in weight_map(LING).hf_shapes.items() if not name.endswith("expert_bias"))
    per_expert = 3 * 10 * 24
    for folder in (checkpoint, hf):
        found = inspect.describe(folder)
        assert found["parameters"] == total == sum(found["parameters_of"].values())
        assert found["active_parameters"] == total - 2 * (4 - 2) * per_expert
        assert found["parameters_of"]["experts"] == 2 * 4 * per_expert
        assert found["parameters_of"]["shared experts"] == 2 * per_expert
        assert found["parameters_of"]["norms"] == 3 * (24 + 24 + 8 + 8) + 24
        assert found["parameters_of"]["dense MLP"] == 3 * 20 * 24
        assert found["elements_of_dtype"] == {"bfloat16": total, "float32": 8}
        assert found["contract"]["shift"] is True


@pytest.mark.parametrize("name", ["mixtral", "olmoe", "qwen2"])
def test_inspect_knows_the_parts_of_every_family(name: str, tmp_path: Path) -> None:
    write_synthetic(tmp_path / "hf", MODELS[name])
    hf_to_mcore.convert(tmp_path / "hf", tmp_path / "mcore")
    of_hf, of_mcore = (inspect.describe(tmp_path / folder)["parameters_of"] for folder in ("hf", "mcore"))
    assert of_hf == of_mcore and "other" not in of_hf
    assert of_hf.get("router", 0) == (3 * 4 * 24 if MODELS[name].is_moe else 0)


def test_inspect_shows_step_contract_and_validation(checkpoint: Path) -> None:
    write_json(
        checkpoint / VALIDATION,
        {"elbo": {"32": 2.5, "4": 2.25}, "bits_per_byte": {"32": 1.5}, "target_block_size": 32, "num_tokens": 10},
    )
    text = inspect.show(inspect.describe(checkpoint))
    assert "2.50000" in text and "target" in text and "1.50000" in text
    assert "mask_token_id            2" in text
    assert inspect.describe(checkpoint)["has_optimizer"] is False


def test_inspect_reads_headers_only(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_dllm.checkpoint.torch_dist_read.TorchDistReader.read", None)
    assert inspect.describe(checkpoint)["num_tensors"] == len(weight_map(LING).mcore_shapes)


def test_inspect_refuses_another_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no complete checkpoint"):
        inspect.describe(tmp_path)


def test_compare_across_formats(checkpoint: Path, hf: Path, tmp_path: Path) -> None:
    mcore_to_hf.convert(checkpoint, tmp_path / "back")
    for pair in ((checkpoint, hf), (hf, checkpoint), (hf, tmp_path / "back"), (checkpoint, checkpoint)):
        assert compare.compare(*pair).is_equal


@pytest.mark.parametrize("is_across", [True, False])
def test_compare_finds_the_changed_value(checkpoint: Path, hf: Path, tmp_path: Path, is_across: bool) -> None:
    tensors = load_file(hf / "model.safetensors")
    mcore_to_hf.convert(checkpoint, tmp_path / "other")
    weight = tensors["model.layers.1.attention.query_key_value.weight"]
    old = float(weight[40, 5])
    weight[40, 5] = old + 1.0
    tensors["model.norm.weight"] = tensors["model.norm.weight"] * float("nan")
    save_file(tensors, tmp_path / "other" / "model.safetensors")
    result = compare.compare(checkpoint if is_across else hf, tmp_path / "other")
    first, second = result.values[:2]
    assert (first.name, first.num_not_finite) == ("model.norm.weight", 24)
    assert second.name == "model.layers.1.attention.query_key_value.weight"
    assert second.largest == pytest.approx(abs(float(weight[40, 5]) - old))
    assert second.mean == pytest.approx(second.largest / weight.numel())
    assert all(item.is_equal for item in result.values[2:])
    assert "different" in compare.show(result, 5)


def test_compare_finds_missing_extra_shape_and_dtype(checkpoint: Path, hf: Path, tmp_path: Path) -> None:
    mcore_to_hf.convert(checkpoint, tmp_path / "other")
    tensors = load_file(hf / "model.safetensors")
    del tensors["model.norm.weight"]
    tensors["extra"] = torch.ones(2)
    tensors["lm_head.weight"] = torch.ones(41, 24).bfloat16()
    tensors["model.word_embeddings.weight"] = tensors["model.word_embeddings.weight"].float()
    save_file(tensors, tmp_path / "other" / "model.safetensors")
    for a in (checkpoint, hf):
        result = compare.compare(a, tmp_path / "other")
        assert result.only_a == ["model.norm.weight"]
        assert result.only_b == ["extra"]
        assert result.shapes == ["lm_head.weight: [40, 24] in A, [41, 24] in B"]
        assert result.dtypes == ["model.word_embeddings.weight: torch.bfloat16 in A, torch.float32 in B"]
        assert all(item.is_equal for item in result.values)
        assert not result.is_equal


def test_compare_across_formats_finds_what_has_no_place_in_the_other(checkpoint: Path, hf: Path) -> None:
    path = checkpoint / CONTRACT
    path.write_text(path.read_text().replace('"tie_word_embeddings": false', '"tie_word_embeddings": true'))
    seal(checkpoint)
    tensors = load_file(hf / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, hf / "model.safetensors")
    assert compare.compare(checkpoint, hf).only_a == ["output_layer.weight"]
    assert not compare.compare(hf, checkpoint).is_equal


def test_compare_exit_codes(checkpoint: Path, hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def code(*arguments: object) -> int:
        monkeypatch.setattr(sys, "argv", ["compare", *map(str, arguments)])
        return compare.main()

    assert code(checkpoint, hf) == 0
    mcore_to_hf.convert(checkpoint, tmp_path / "wide", dtype="fp32")
    assert code(checkpoint, tmp_path / "wide") == 1
    with pytest.raises(ValueError):
        code(checkpoint, tmp_path)

"""HF -> torch_dist -> HF is the identity, and bad input leaves nothing behind."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from benchmarks.synthetic import write_synthetic
from checkpoints_tools import compare as compare_tool
from checkpoints_tools import hf_to_mcore, mcore_to_hf
from checkpoints_tools.compare import compare
from checkpoints_tools.merge_topk import merge
from megatron_dllm.checkpoint import output_folder
from megatron_dllm.checkpoint.folder import resolve_checkpoint
from megatron_dllm.checkpoint.manifest import damaged_files, read_json
from megatron_dllm.checkpoint.meta import CheckpointMeta, Position, Provenance, Semantics, read_meta, write_meta
from megatron_dllm.checkpoint.stored_model import StoredModel, read_stored_model
from megatron_dllm.checkpoint.torch_dist_read import TorchDistReader
from megatron_dllm.compose import compose_train_config
from megatron_dllm.hf.architectures import ARCHITECTURES_OF_FAMILY
from megatron_dllm.hf.safetensors_io import INDEX_NAME, SafetensorsFolder
from megatron_dllm.hf.tokenizer_folder import TokenizerFiles
from megatron_dllm.run.names import MANIFEST
from tests.tiny_models import LING, MODELS, left_in, seal
from tests.unit.hf.test_tokenizer_folder import make_tokenizer


def _bits(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of an HF folder, as bytes."""
    return {
        name: value.contiguous().view(torch.uint8)
        for path in sorted(folder.glob("*.safetensors"))
        for name, value in load_file(path).items()
    }


def _assert_same_tensors(actual: Path, expected: Path) -> None:
    found, wanted = SafetensorsFolder(actual).tensors, SafetensorsFolder(expected).tensors
    assert {n: (t.dtype, t.shape) for n, t in found.items()} == {n: (t.dtype, t.shape) for n, t in wanted.items()}
    bits, expected_bits = _bits(actual), _bits(expected)
    assert all(torch.equal(bits[name], value) for name, value in expected_bits.items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("name", MODELS)
def test_round_trip_is_exact(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = MODELS[name]
    write_synthetic(tmp_path / "hf", model, dtype=dtype, max_shard_bytes=4000)
    hf_to_mcore.convert(tmp_path / "hf", tmp_path / "mcore", None)
    mcore_to_hf.convert(tmp_path / "mcore", tmp_path / "back", model.family, max_shard_bytes=3000)
    _assert_same_tensors(tmp_path / "back", tmp_path / "hf")
    assert not any(name.startswith(".") for name in left_in(tmp_path))


def test_stacked_experts_become_the_published_form(tmp_path: Path) -> None:
    write_synthetic(tmp_path / "hf", LING)
    tensors = load_file(tmp_path / "hf" / "model.safetensors")
    for layer in (1, 2):
        for part in ("gate_proj", "up_proj", "down_proj"):
            prefix = f"model.layers.{layer}.mlp.experts"
            tensors[f"{prefix}.{part}"] = torch.stack([tensors.pop(f"{prefix}.{e}.{part}.weight") for e in range(4)])
    (tmp_path / "stacked").mkdir()
    save_file(tensors, tmp_path / "stacked" / "model.safetensors")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    (tmp_path / "stacked" / "config.json").write_text(
        json.dumps(config | {"model_type": "llada2_moe_veomni", "architectures": ["LLaDA2MoeModelLM"]})
    )
    hf_to_mcore.convert(tmp_path / "stacked", tmp_path / "mcore")
    mcore_to_hf.convert(tmp_path / "mcore", tmp_path / "back")
    _assert_same_tensors(tmp_path / "back", tmp_path / "hf")
    assert json.loads((tmp_path / "back" / "config.json").read_text())["model_type"] == "llada2_moe"


def test_checkpoint_says_what_it_is(checkpoint: Path, hf: Path) -> None:
    stored = read_stored_model(checkpoint)
    assert stored.model == LING
    assert stored.meta == CheckpointMeta(
        asdict(LING),
        Semantics(shift=True, block_origin="document", mask_token_id=2, block_size=1, context_length=64),
        Position(),
        Provenance(source=str(hf.absolute())),
    )
    assert stored.tokenizer is None
    manifest = read_json(checkpoint / MANIFEST)
    assert damaged_files(checkpoint, manifest, manifest) == []
    assert {path.name for path in checkpoint.iterdir()} == {*manifest, MANIFEST}


def test_blocks_with_a_shift_are_not_exported(checkpoint: Path) -> None:
    stored = read_stored_model(checkpoint)

    def with_blocks(size: int) -> StoredModel:
        semantics = replace(stored.meta.semantics, block_size=size)
        return replace(stored, meta=replace(stored.meta, semantics=semantics))

    assert mcore_to_hf.settle_architecture(with_blocks(1), None) == "bailing_moe"
    with pytest.raises(ValueError, match=r"contract.shift \(true\) with blocks of 8 .* no class that is exported does"):
        mcore_to_hf.settle_architecture(with_blocks(8), None)


def test_keys_are_those_of_both_layer_specs(checkpoint: Path) -> None:
    """Where megatron-core's local and TransformerEngine specs name a tensor differently, both names are there."""
    keys = set(TorchDistReader(checkpoint).metadata.tensors)
    shared = {"embedding.word_embeddings.weight", "decoder.final_layernorm.weight", "output_layer.weight"}
    for layer in range(3):
        shared |= {
            f"decoder.layers.{layer}.self_attention.{name}"
            for name in (
                "linear_qkv.layer_norm_weight",
                "linear_qkv.weight",
                "q_layernorm.weight",
                "k_layernorm.weight",
                "linear_proj.weight",
            )
        }
    shared |= {
        f"decoder.layers.0.mlp.{name}"
        for name in ("linear_fc1.layer_norm_weight", "linear_fc1.weight", "linear_fc2.weight")
    }
    for layer in (1, 2):
        shared |= {
            f"decoder.layers.{layer}.mlp.{name}"
            for name in (
                "router.weight",
                "router.expert_bias",
                "experts.experts.linear_fc1.weight",
                "experts.experts.linear_fc2.weight",
                "shared_experts.linear_fc1.weight",
                "shared_experts.linear_fc2.weight",
            )
        }
    expected_local = shared | {f"decoder.layers.{layer}.mlp.linear_fc1.layer_norm_weight" for layer in (1, 2)}
    expected_te = shared | {f"decoder.layers.{layer}.pre_mlp_layernorm.weight" for layer in (1, 2)}
    assert keys == expected_local | expected_te


@pytest.mark.parametrize(("stated", "is_said"), [("bfloat16", False), (None, False), ("float32", True)])
def test_a_dtype_that_is_not_that_of_the_tensors_is_said(
    hf: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, stated: str | None, is_said: bool
) -> None:
    content = json.loads((hf / "config.json").read_text())
    (hf / "config.json").write_text(json.dumps(content | {"torch_dtype": stated}))
    hf_to_mcore.convert(hf, tmp_path / "mcore")
    assert ("dtype (float32) differs from that of the tensors (bfloat16), which is kept" in caplog.text) == is_said


def test_expert_bias_is_fp32_even_from_a_bf16_file(tmp_path: Path, hf: Path) -> None:
    tensors = load_file(hf / "model.safetensors")
    name = "model.layers.1.mlp.gate.expert_bias"
    tensors[name] = tensors[name].bfloat16()
    save_file(tensors, hf / "model.safetensors")
    hf_to_mcore.convert(hf, tmp_path / "mcore")
    mcore_to_hf.convert(tmp_path / "mcore", tmp_path / "back", dtype="bf16")
    back = load_file(tmp_path / "back" / "model.safetensors")[name]
    assert back.dtype == torch.float32
    assert torch.equal(back, tensors[name].float())


def test_dtype_of_the_export(checkpoint: Path, hf: Path, tmp_path: Path) -> None:
    mcore_to_hf.convert(checkpoint, tmp_path / "wide", dtype="fp32")
    wide, original = load_file(tmp_path / "wide" / "model.safetensors"), load_file(hf / "model.safetensors")
    assert all(
        value.dtype == torch.float32 and torch.equal(value, original[name].float()) for name, value in wide.items()
    )
    assert json.loads((tmp_path / "wide" / "config.json").read_text())["torch_dtype"] == "float32"


@pytest.mark.parametrize(
    ("family", "architecture", "expected_class", "code"),
    [
        ("bailing_moe", None, "BailingMoeV2ForCausalLM", None),
        ("bailing_moe", "llada2_moe", "LLaDA2MoeModelLM", "llada2_moe"),
        ("llada2_moe", None, "LLaDA2MoeModelLM", "llada2_moe"),
        ("qwen3_moe", None, "Qwen3MoeForCausalLM", None),
        ("qwen3_moe", "sdar_moe", "SDARMoeForCausalLM", "sdar"),
        ("sdar_moe", None, "SDARMoeForCausalLM", "sdar"),
        ("qwen3", None, "Qwen3ForCausalLM", None),
        ("qwen3 tied", "sdar", "SDARForCausalLM", "sdar"),
        ("sdar", None, "SDARForCausalLM", "sdar"),
        ("qwen2", None, "Qwen2ForCausalLM", None),
        ("mixtral", None, "MixtralForCausalLM", None),
        ("llama", "megatron_dllm", "MegatronDllmForCausalLM", "megatron_dllm"),
        ("olmoe", "megatron_dllm", "MegatronDllmForCausalLM", "megatron_dllm"),
        ("megatron_dllm", None, "MegatronDllmForCausalLM", "megatron_dllm"),
    ],
)
def test_architectures(
    family: str, architecture: str | None, expected_class: str, code: str | None, tmp_path: Path
) -> None:
    write_synthetic(tmp_path / "hf", MODELS[family])
    hf_to_mcore.convert(tmp_path / "hf", tmp_path / "mcore")
    mcore_to_hf.convert(tmp_path / "mcore", tmp_path / "out", architecture)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["architectures"] == [expected_class]
    shared = {f"block_diffusion_{part}.py" for part in ("generation", "layers", "model")} | {"rotary_scaling.py"}
    expected_code = {f"configuration_{code}.py", f"modeling_{code}.py", *shared} if code else set()
    assert {path.name for path in (tmp_path / "out").glob("*.py")} == expected_code
    assert expected_class in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("name", ["llada2_moe", "sdar_moe", "sdar"])
def test_clean_blocks_that_no_server_computes_are_refused(name: str, tmp_path: Path) -> None:
    write_synthetic(tmp_path / "hf", MODELS[name])
    hf_to_mcore.convert(tmp_path / "hf", tmp_path / "mcore")
    folder = resolve_checkpoint(tmp_path / "mcore")
    meta = read_meta(folder)
    write_meta(folder, replace(meta, semantics=replace(meta.semantics, clean_block_size=1)))
    seal(folder)
    with pytest.raises(ValueError, match=r"clean_block_size \(1\) of .* must be its block_size .*; train a last"):
        mcore_to_hf.convert(tmp_path / "mcore", tmp_path / "out")
    assert left_in(tmp_path) == {"hf", "mcore"}


@pytest.mark.parametrize("name", ["llada2_moe", "sdar_moe", "sdar"])
def test_a_diffusion_model_never_becomes_autoregressive(name: str, tmp_path: Path) -> None:
    write_synthetic(tmp_path / "hf", MODELS[name])
    hf_to_mcore.convert(tmp_path / "hf", tmp_path / "mcore")
    own, autoregressive = ARCHITECTURES_OF_FAMILY[name][:2]
    with pytest.raises(ValueError, match=rf"architecture \({autoregressive}\) predicts the next token.*; use {own}\."):
        mcore_to_hf.convert(tmp_path / "mcore", tmp_path / "out", autoregressive)
    assert left_in(tmp_path) == {"hf", "mcore"}


def test_dense_layers_have_no_place_in_sdar(tmp_path: Path) -> None:
    write_synthetic(tmp_path / "hf", replace(MODELS["qwen3_moe"], num_dense_layers=1))
    hf_to_mcore.convert(tmp_path / "hf", tmp_path / "mcore")
    with pytest.raises(ValueError, match=r"num_dense_layers \(1\) must be 0 in SDARMoeForCausalLM"):
        mcore_to_hf.convert(tmp_path / "mcore", tmp_path / "out", "sdar_moe")
    assert left_in(tmp_path) == {"hf", "mcore"}


@pytest.mark.parametrize("architecture", ["llada2_moe", "bailing_moe"])
def test_a_bias_of_zero_is_written_where_the_class_wants_one(architecture: str, tmp_path: Path) -> None:
    """SGLang: score_function and correction_bias should be in 2 combination (softmax, None) or (sigmoid, not None)."""
    write_synthetic(tmp_path / "hf", replace(LING, moe_router_enable_expert_bias=False))
    hf_to_mcore.convert(tmp_path / "hf", tmp_path / "mcore")
    mcore_to_hf.convert(tmp_path / "mcore", tmp_path / "out", architecture, max_shard_bytes=3000)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["moe_router_enable_expert_bias"] is True and config["score_function"] == "sigmoid"
    # SGLang multiplies the one by the other.
    assert config["num_shared_experts"] == 1 and "moe_shared_expert_intermediate_size" not in config
    tensors = {n: t for path in (tmp_path / "out").glob("*.safetensors") for n, t in load_file(path).items()}
    original = load_file(tmp_path / "hf" / "model.safetensors")
    added = {f"model.layers.{layer}.mlp.gate.expert_bias" for layer in (1, 2)}
    assert tensors.keys() - original.keys() == added
    assert all(tensors[name].dtype == torch.float32 and not tensors[name].any() for name in added)
    assert all(torch.equal(tensors[name], value) for name, value in original.items())


def test_the_export_says_what_sglang_would_not_do(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_synthetic(tmp_path / "hf", MODELS["sdar"])
    hf_to_mcore.convert(tmp_path / "hf", tmp_path / "mcore")
    mcore_to_hf.convert(tmp_path / "mcore", tmp_path / "out")
    warned = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert any("mask_token_id (2) is not the 151669" in text for text in warned)
    assert not any("block_size" in text for text in warned)
    assert (tmp_path / "out" / "dllm_algorithm.yaml").read_text().endswith("block_size: 4\nthreshold: 0.95\n")


def _drop(name: str):
    def change(tensors: dict[str, torch.Tensor]) -> None:
        del tensors[name]

    return change


def _put(name: str, value: torch.Tensor):
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name] = value

    return change


def _poison(name: str, value: float):
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name].view(-1)[3] = value

    return change


DOWN = "model.layers.2.mlp.experts.3.down_proj.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_drop(DOWN), f"tensor {DOWN} and 0 more are missing"),
        (_put("model.layers.3.enorm.weight", torch.ones(24)), r"tensor model\.layers\.3\.enorm\.weight .* not part of"),
        (_put(DOWN, torch.zeros(24, 11).bfloat16()), rf"{DOWN} has shape \[24, 11\], config\.json asks for \[24, 10\]"),
        (_put(DOWN, torch.zeros(24, 10)), f"{DOWN} has dtype torch.float32, others"),
        (_put(DOWN, torch.zeros(24, 10, dtype=torch.int8)), "dequantize"),
        (_poison(DOWN, float("nan")), rf"model\.safetensors: {DOWN} holds 1 NaN or Inf"),
        (_poison("lm_head.weight", float("-inf")), r"lm_head\.weight holds 1 NaN or Inf"),
    ],
)
def test_bad_tensors_are_named_and_leave_nothing(change, message: str, hf: Path, tmp_path: Path) -> None:
    tensors = load_file(hf / "model.safetensors")
    change(tensors)
    save_file(tensors, hf / "model.safetensors")
    with pytest.raises(ValueError, match=message):
        hf_to_mcore.convert(hf, tmp_path / "mcore")
    assert left_in(tmp_path) == {"hf"}


def test_truncated_and_missing_shards(tmp_path: Path) -> None:
    write_synthetic(tmp_path / "hf", LING, max_shard_bytes=4000)
    shard = sorted((tmp_path / "hf").glob("*.safetensors"))[1]
    data = shard.read_bytes()
    shard.write_bytes(data[:-1])
    with pytest.raises(ValueError, match=rf"{shard.name} is truncated"):
        hf_to_mcore.convert(tmp_path / "hf", tmp_path / "mcore")
    shard.unlink()
    with pytest.raises(ValueError, match=rf"{INDEX_NAME} names the shard {shard.name}, which is missing"):
        hf_to_mcore.convert(tmp_path / "hf", tmp_path / "mcore")
    assert left_in(tmp_path) == {"hf"}


def test_existing_output_and_small_disk(
    hf: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match="exists; nothing is overwritten"):
        hf_to_mcore.convert(hf, checkpoint)
    with pytest.raises(ValueError, match="exists; nothing is overwritten"):
        mcore_to_hf.convert(checkpoint, hf)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(output_folder.shutil, "disk_usage", lambda _: usage._replace(free=1000))
    for convert, source in ((hf_to_mcore.convert, hf), (mcore_to_hf.convert, checkpoint)):
        with pytest.raises(ValueError, match="make room"):
            convert(source, tmp_path / "deep" / "new")
    assert left_in(tmp_path) == {"hf", "checkpoint"}


def test_half_written_checkpoints_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    data = checkpoint / "__0_0.distcp"
    whole = data.read_bytes()
    data.write_bytes(whole[:-100])
    with pytest.raises(ValueError, match=r"__0_0\.distcp has .* bytes instead of"):
        mcore_to_hf.convert(checkpoint, tmp_path / "out")
    seal(checkpoint)
    with pytest.raises(ValueError, match=r"__0_0\.distcp is truncated: "):
        mcore_to_hf.convert(checkpoint, tmp_path / "out")
    data.unlink()
    with pytest.raises(ValueError, match=r"__0_0\.distcp is missing"):
        mcore_to_hf.convert(checkpoint, tmp_path / "out")
    seal(checkpoint)
    with pytest.raises(ValueError, match=r"__0_0\.distcp is missing"):
        mcore_to_hf.convert(checkpoint, tmp_path / "out")
    (checkpoint / ".metadata").unlink()
    seal(checkpoint)
    with pytest.raises(ValueError, match=r"\.metadata is missing"):
        mcore_to_hf.convert(checkpoint, tmp_path / "out")
    (checkpoint / MANIFEST).unlink()
    with pytest.raises(ValueError, match=r"manifest\.json is missing"):
        mcore_to_hf.convert(checkpoint, tmp_path / "out")
    with pytest.raises(ValueError, match="no complete checkpoint"):
        mcore_to_hf.convert(tmp_path / "hf", tmp_path / "out")
    assert left_in(tmp_path) == {"hf", "checkpoint"}


def test_checkpoint_of_another_model_than_its_contract(checkpoint: Path, tmp_path: Path) -> None:
    def contract_with(**changes: object) -> None:
        content = json.loads((checkpoint / "contract.json").read_text())
        content["model"] |= changes
        (checkpoint / "contract.json").write_text(json.dumps(content))
        seal(checkpoint)

    contract_with(num_layers=4)
    with pytest.raises(ValueError, match=r"decoder\.layers\.3\.input_layernorm|decoder\.layers\.3\..* are missing"):
        mcore_to_hf.convert(checkpoint, tmp_path / "out")
    contract_with(num_layers=2)
    with pytest.raises(ValueError, match=r"decoder\.layers\.2\..* have no place"):
        mcore_to_hf.convert(checkpoint, tmp_path / "out")
    contract_with(num_layers=3, vocab_size=50)
    with pytest.raises(ValueError, match=r"word_embeddings\.weight has shape \[40, 24\], .* asks for \[50, 24\]"):
        mcore_to_hf.convert(checkpoint, tmp_path / "out")
    contract_with(vocab_size=40, colour="red")
    with pytest.raises(ValueError, match=r"model\.colour is not known"):
        mcore_to_hf.convert(checkpoint, tmp_path / "out")
    assert left_in(tmp_path) == {"hf", "checkpoint"}


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.json", []),
        ("config.json", b"\xff"),
        ("contract.json", b"\xff"),
        ("contract.json", []),
        ("contract.json", {"format": 1}),
        (MANIFEST, []),
        ("contract.json", {"format": 1, "model": {"num_layers": "3"}, "contract": {}}),
        (MANIFEST, {"common.pt": 5}),
        ("contract.json", {"format": 1, "model": asdict(LING), "contract": {"shift": "no", "block_size": 1}}),
        ("validation.json", []),
        ("validation.json", {"elbo": {"32": "2.5"}}),
    ],
)
def test_json_of_another_shape_is_named(name: str, content: object, hf: Path, checkpoint: Path, tmp_path: Path) -> None:
    folder = hf if name == "config.json" else checkpoint
    (folder / name).write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    with pytest.raises(ValueError, match=name):
        (hf_to_mcore if folder == hf else mcore_to_hf).convert(folder, tmp_path / "out")
    assert left_in(tmp_path) == {"hf", "checkpoint"}


def _poison_checkpoint(folder: Path, value: float) -> str:
    """Write a number into the head of a checkpoint without telling its manifest; returns the file's name."""
    reader = TorchDistReader(folder)
    chunk = reader.metadata.tensors["output_layer.weight"].chunks[0]
    out = torch.empty(40 * 24, dtype=torch.bfloat16)
    reader.read("output_layer.weight", (0, 0), (40, 24), out)
    reader.close()
    data = bytearray((folder / chunk.file_name).read_bytes())
    place = data.index(out.view(torch.uint8).numpy().tobytes(), chunk.start)
    data[place : place + 2] = torch.tensor([value]).bfloat16().view(torch.uint8).numpy().tobytes()
    (folder / chunk.file_name).write_bytes(data)
    return chunk.file_name


def test_nan_in_a_checkpoint(tmp_path: Path, make_checkpoint) -> None:
    folder = make_checkpoint("poisoned", 0)
    _poison_checkpoint(folder, float("nan"))
    seal(folder)
    with pytest.raises(ValueError, match=r"poisoned: output_layer\.weight holds 1 NaN"):
        mcore_to_hf.convert(folder, tmp_path / "out")
    assert left_in(tmp_path) == {"poisoned", "poisoned_hf"}


def test_what_lies_beside_the_weights_is_refused_before_them(hf: Path, make_checkpoint, tmp_path: Path) -> None:
    """Each input has bad weights too, which take hours to come to."""
    folder = make_checkpoint("poisoned", 0)
    _poison_checkpoint(folder, float("nan"))
    (folder / "validation.json").write_text("[]")
    with pytest.raises(ValueError, match=r"validation\.json"):
        mcore_to_hf.convert(folder, tmp_path / "out")
    tensors = load_file(hf / "model.safetensors")
    tensors["model.norm.weight"][2] = float("nan")
    save_file(tensors, hf / "model.safetensors")
    (hf / "LICENSE").symlink_to("gone")
    with pytest.raises(ValueError, match="LICENSE"):
        merge([hf, hf], tmp_path / "out")
    (hf / "tokenizer_config.json").write_text('{"eos_token": "x"}')
    with pytest.raises(ValueError, match=r"has no tokenizer\.json"):
        hf_to_mcore.convert(hf, tmp_path / "out")
    assert left_in(tmp_path) == {"hf", "poisoned", "poisoned_hf"}


@pytest.mark.parametrize("value", [1.5, float("nan")])
def test_a_changed_byte_is_no_export(tmp_path: Path, make_checkpoint, value: float) -> None:
    """The number is as good as any: only the checksum knows. Of a NaN it says where it comes from."""
    folder = make_checkpoint("changed", 0)
    name = _poison_checkpoint(folder, value)
    with pytest.raises(ValueError, match=rf"changed/{name} does not have the checksum it was written with; choose"):
        mcore_to_hf.convert(folder, tmp_path / "out")
    with pytest.raises(ValueError, match=rf"changed/{name} does not have the checksum"):
        compare(folder, tmp_path / "changed_hf")
    with pytest.raises(ValueError, match=rf"changed/{name} does not have the checksum"):
        merge([make_checkpoint("whole", 1), folder], tmp_path / "out")
    assert left_in(tmp_path) == {"changed", "changed_hf", "whole", "whole_hf"}


@pytest.mark.ranks
def test_commands_say_one_sentence_and_exit_non_zero(hf: Path, tmp_path: Path) -> None:
    (hf / "model.safetensors").write_bytes(b"")
    command = [sys.executable, "-m", "checkpoints_tools.hf_to_mcore", "--hf", str(hf), "--output", str(tmp_path / "a")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert str(hf) in done.stderr
    assert "Traceback" not in done.stderr
    assert left_in(tmp_path) == {"hf"}


def test_mask_token_needs_a_row_and_an_id(tmp_path: Path) -> None:
    write_synthetic(tmp_path / "hf", LING)
    with pytest.raises(ValueError, match=r"mask_token_id \(40\) has no row"):
        hf_to_mcore.convert(tmp_path / "hf", tmp_path / "out", 40)
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    del config["mask_token_id"]
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="--mask_token_id"):
        hf_to_mcore.convert(tmp_path / "hf", tmp_path / "out")
    hf_to_mcore.convert(tmp_path / "hf", tmp_path / "out", 7)
    assert read_stored_model(tmp_path / "out").model == replace(LING, mask_token_id=7)


def test_an_argument_that_is_no_number_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for tool, arguments, message in (
        (hf_to_mcore, ["--mask_token_id", "1.5"], "--mask_token_id: (1.5) must be the id of a token, or auto"),
        (compare_tool, ["--limit", "-1"], "--limit: (-1) must be a whole number of at least 0"),
    ):
        monkeypatch.setattr(sys, "argv", ["tool", *arguments])
        with pytest.raises(SystemExit, match="2"):
            tool.main()
        assert message in capsys.readouterr().err


def test_the_mask_token_enters_with_the_tokenizer(
    hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As for a chat model: its tokenizer gives the mask token's id to another token, another tokenizer does not."""

    def convert(output: str, *arguments: str) -> None:
        monkeypatch.setattr(
            sys, "argv", ["hf_to_mcore", "--hf", str(hf), "--output", str(tmp_path / output), *arguments]
        )
        hf_to_mcore.main()

    make_tokenizer(tmp_path / "chat", {"<eos>": 3, "<|role_end|>": 5})
    make_tokenizer(tmp_path / "base", {"<eos>": 3})
    for path in (tmp_path / "chat").iterdir():
        shutil.copy(path, hf)
    config = json.loads((hf / "config.json").read_text())
    (hf / "config.json").write_text(json.dumps(config | {"mask_token_id": 5}))
    with pytest.raises(ValueError, match=r"mask_token_id \(5\) is <\|role_end\|>"):
        convert("refused")
    convert("my model", "--tokenizer", str(tmp_path / "base"))
    lines = capsys.readouterr().out.splitlines()
    tokenize, train = ([*shlex.split(line)] for line in lines[1:])
    assert lines[0].startswith("next") and len(lines) == 3
    assert tokenize[2] == "megatron_dllm.data.tokenize" and str(tmp_path / "my model" / "tokenizer") in tokenize
    words = train[train.index("experiment=convert") :]
    assert words == ["experiment=convert", f"checkpoint.load={tmp_path / 'my model'}", "data.train=CORPUS"]
    assert compose_train_config(words).model == read_stored_model(tmp_path / "my model").model
    (tmp_path / "my model").rename(tmp_path / "mcore")
    mcore_to_hf.convert(tmp_path / "mcore", tmp_path / "back")
    for folder in (tmp_path / "mcore" / "tokenizer", tmp_path / "back"):
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        assert tokenizer.token_to_id("<|mask|>") == 5 == TokenizerFiles(folder).special_id("mask_token")
        assert tokenizer.token_to_id("<|role_end|>") is None
    assert not any(name.startswith((".", "refused")) for name in left_in(tmp_path))

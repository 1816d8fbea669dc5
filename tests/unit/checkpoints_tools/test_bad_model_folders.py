"""Two hundred model folders that are not what they should be: each is refused in one sentence naming file or key."""

from __future__ import annotations

import json
import os
import shutil
import struct
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks.synthetic import write_synthetic
from checkpoints_tools import hf_to_mcore
from megatron_dllm.hf.safetensors_io import INDEX_NAME, SINGLE_NAME
from megatron_dllm.run.command import sentence
from tests.tiny_models import LING, left_in
from tests.unit.hf.test_tokenizer_folder import make_tokenizer

MODEL = replace(LING, eos_token_id=3, pad_token_id=4, mask_token_id=5)
NORM, HEAD = "model.norm.weight", "lm_head.weight"
EXPERT = "model.layers.1.mlp.experts.2.down_proj.weight"
Change = Callable[[Path], object]


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that converts."""
    folder = tmp_path_factory.mktemp("sound") / "hf"
    write_synthetic(folder, MODEL)
    make_tokenizer(folder.with_name("tokenizer"), {"<eos>": 3, "<pad>": 4, "<|mask|>": 5}, mask="<|mask|>")
    shutil.copytree(folder.with_name("tokenizer"), folder, dirs_exist_ok=True)
    return folder


def _content(name: str, content: bytes | str) -> Change:
    """Another content of a file."""
    return lambda folder: (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())


def _json(name: str, **changes: Any) -> Change:
    """Other values in a JSON file; ... removes one."""

    def change(folder: Path) -> None:
        path = folder / name
        content = json.loads(path.read_text()) if path.exists() else {}
        content = {key: value for key, value in (content | changes).items() if value is not ...}
        path.write_text(json.dumps(content))

    return change


def _config(**changes: Any) -> Change:
    return _json("config.json", **changes)


def _gone(name: str) -> Change:
    return lambda folder: (folder / name).unlink()


def _folder(name: str) -> Change:
    def change(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).mkdir()

    return change


def _dead_link(name: str) -> Change:
    def change(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to("../blobs/none")

    return change


def _pipe(name: str) -> Change:
    """A named pipe, at which a reader would wait for ever."""

    def change(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)

    return change


def _twice(name: str, key: str) -> Change:
    """A JSON file that names a key a second time."""

    def change(folder: Path) -> None:
        text = (folder / name).read_text().strip()
        (folder / name).write_text(f'{{"{key}": 1, {text[1:]}')

    return change


def _tensors(edit: Callable[[dict[str, torch.Tensor]], object]) -> Change:
    def change(folder: Path) -> None:
        tensors = load_file(folder / SINGLE_NAME)
        edit(tensors)
        save_file(tensors, folder / SINGLE_NAME)

    return change


def _put(name: str, value: torch.Tensor) -> Change:
    return _tensors(lambda tensors: tensors.update({name: value}))


def _poison(name: str, value: float) -> Change:
    return _tensors(lambda tensors: tensors[name].view(-1)[-1:].fill_(value))


def _bytes(edit: Callable[[bytes], bytes]) -> Change:
    return lambda folder: (folder / SINGLE_NAME).write_bytes(edit((folder / SINGLE_NAME).read_bytes()))


def _header(edit: Callable[[dict[str, Any]], object]) -> Change:
    """Another header of the same tensors."""

    def change(data: bytes) -> bytes:
        (length,) = struct.unpack("<Q", data[:8])
        header = json.loads(data[8 : 8 + length])
        edit(header)
        encoded = json.dumps(header).encode()
        return struct.pack("<Q", len(encoded)) + encoded + data[8 + length :]

    return _bytes(change)


def _index(weight_map: object) -> Change:
    """An index beside the file."""
    return _content(INDEX_NAME, json.dumps({"metadata": {}, "weight_map": weight_map}))


def _rope(**values: Any) -> Change:
    return _config(rope_parameters=values)


HUGE = 10**9
CASES: dict[str, tuple[Change, str]] = {
    # config.json as a file
    "no config": (_gone("config.json"), "config.json is missing"),
    "empty config": (_content("config.json", ""), "config.json is damaged"),
    "half a config": (_content("config.json", '{"vocab_size": 40,'), "config.json is damaged"),
    "list": (_content("config.json", "[]"), "config.json is damaged"),
    "text": (_content("config.json", '"llada2_moe"'), "config.json is damaged"),
    "null": (_content("config.json", "null"), "config.json is damaged"),
    "not UTF-8": (_content("config.json", b"\xff\xfe{}"), "config.json is damaged"),
    "deep": (_content("config.json", '{"a":' * 50000), "config.json is damaged"),
    "many digits": (_content("config.json", '{"vocab_size": ' + "9" * 5000 + "}"), "config.json is damaged"),
    "config twice": (_twice("config.json", "rope_theta"), "'rope_theta' stands there twice"),
    "config is a folder": (_folder("config.json"), "config.json is missing"),
    "config is a dead link": (_dead_link("config.json"), "config.json is a link to ../blobs/none"),
    "config is a pipe": (_pipe("config.json"), "config.json is missing"),
    "empty object": (_content("config.json", "{}"), "lacks model_type"),
    # what model it is
    "unknown model_type": (_config(model_type="falcon"), "model_type ('falcon')"),
    "model_type is a number": (_config(model_type=3), "model_type (3)"),
    "no model_type, another class": (_config(model_type=..., architectures=["FalconForCausalLM"]), "FalconForCausalLM"),
    "no model_type, no class": (_config(model_type=..., architectures=...), "lacks model_type"),
    "class of another model": (_config(architectures=["Qwen3MoeForCausalLM"]), "Qwen3MoeForCausalLM"),
    "classes are no list": (_config(architectures={"a": 1}), "architectures ({'a': 1})"),
    "classes are a zero": (_config(architectures=0), "architectures (0)"),
    "class is a list": (_config(architectures=[["a"]]), "architectures (['a'])"),
    # sizes
    **{
        f"{key} {value!r}": (_config(**{key: value}), named)
        for key, named in {
            "num_hidden_layers": "num_",
            "hidden_size": "hidden_size",
            "intermediate_size": "intermediate_size|ffn_hidden_size",
            "num_attention_heads": "num_attention_heads",
            "num_key_value_heads": "num_key_value_heads|num_query_groups",
            "vocab_size": "vocab_size",
            "max_position_embeddings": "max_position_embeddings",
            "num_experts": "num_experts|num_moe_experts",
            "moe_intermediate_size": "moe_intermediate_size|moe_",
            "num_experts_per_tok": "num_experts_per_tok|moe_router_topk",
        }.items()
        for value in (-1, 0, 2.5, "8", True, [8], HUGE**2)
    },
    **{
        f"no {key}": (_config(**{key: ...}), f"lacks {key}")
        for key in ("num_hidden_layers", "hidden_size", "vocab_size", "rms_norm_eps", "rope_theta", "num_experts")
    },
    "a billion layers": (_config(num_hidden_layers=HUGE), "num_layers (1000000000)"),
    "a billion experts": (_config(num_experts=HUGE), "num_moe_experts (1000000000)"),
    "experts of all layers": (
        _config(num_experts=16384, num_hidden_layers=1000),
        "num_moe_experts (16384) x num_layers",
    ),
    "a billion shared experts": (_config(num_shared_experts=HUGE), "moe_shared_expert_intermediate_size"),
    "negative shared experts": (_config(num_shared_experts=-1), "moe_shared_expert_intermediate_size"),
    "more dense layers than layers": (_config(first_k_dense_replace=9), "num_dense_layers (9)"),
    "negative dense layers": (_config(first_k_dense_replace=-1), "num_dense_layers (-1)"),
    "head_dim 7": (_config(head_dim=7, rotary_dim=...), "kv_channels (7)"),
    "head_dim -8": (_config(head_dim=-8, rotary_dim=...), "kv_channels (-8)"),
    "heads do not divide": (_config(num_key_value_heads=3), "num_query_groups (3)"),
    "groups do not divide": (_config(n_group=3), "moe_router_num_groups (3)"),
    "negative groups": (_config(n_group=-2), "moe_router_num_groups (-2)"),
    "groups ranked otherwise": (_config(topk_group=2), "moe_router_topk (2)"),
    # numbers
    "epsilon 0": (_config(rms_norm_eps=0.0), "layernorm_epsilon (0.0)"),
    "epsilon negative": (_config(rms_norm_eps=-1e-6), "layernorm_epsilon (-1e-06)"),
    "epsilon 2": (_config(rms_norm_eps=2), "layernorm_epsilon (2.0)"),
    "epsilon NaN": (_config(rms_norm_eps=float("nan")), "rms_norm_eps (nan)"),
    "epsilon text": (_config(rms_norm_eps="1e-6"), "rms_norm_eps ('1e-6')"),
    "theta 0": (_config(rope_theta=0), "rotary_base (0.0)"),
    "theta beyond any model": (_config(rope_theta=1e30), "rotary_base (1e+30)"),
    "theta infinite": (_config(rope_theta=float("inf")), "rope_theta (inf)"),
    "theta beyond floats": (_config(rope_theta=10**400), "rope_theta (1000"),
    "theta is a list": (_config(rope_theta=[1e4]), "rope_theta ([10000.0])"),
    "rotary factor 0": (_config(partial_rotary_factor=0.0, rotary_dim=...), "rotary_percent (0.0)"),
    "rotary factor 1.5": (_config(partial_rotary_factor=1.5, rotary_dim=...), "rotary_percent (1.5)"),
    "scaling factor negative": (_config(routed_scaling_factor=-2.5), "moe_router_topk_scaling_factor (-2.5)"),
    "scaling factor text": (_config(routed_scaling_factor="2.5"), "routed_scaling_factor ('2.5')"),
    "coefficient negative": (_config(router_aux_loss_coef=-1.0), "router_aux_loss_coef (-1.0)"),
    "initializer infinite": (_config(initializer_range=float("inf")), "initializer_range (inf)"),
    # what our model does not have
    "unknown activation": (_config(hidden_act="swishy"), "hidden_act ('swishy')"),
    "activation is a list": (_config(hidden_act=["silu"]), "hidden_act (['silu'])"),
    "bias": (_config(use_bias=True), "use_bias (True)"),
    "bias as text": (_config(use_qkv_bias="false"), "use_qkv_bias ('false')"),
    "window": (_config(use_sliding_window=True), "use_sliding_window (True)"),
    "windows by layer": (_config(layer_types=["full_attention", "sliding_attention", "full_attention"]), "layer_types"),
    "layer types are no list": (_config(layer_types="full_attention"), "layer_types ('full_attention')"),
    "layer types are objects": (_config(layer_types=[{}, {}, {}]), "layer_types ([{}, {}, {}])"),
    "prediction layers": (_config(num_nextn_predict_layers=1), "num_nextn_predict_layers (1)"),
    "quantized": (_config(quantization_config={"quant_method": "gptq"}), "quantization_config"),
    "softmax": (_config(score_function="softmax"), "score_function (softmax)"),
    "not normalised": (_config(norm_topk_prob=False), "norm_topk_prob (False)"),
    "router in bf16": (_config(router_dtype="bf16"), "router_dtype ('bf16')"),
    "router in bf16, another name": (_config(router_dtype=..., moe_router_dtype="bf16"), "router_dtype ('bf16')"),
    "yarn": (_config(rope_scaling={"rope_type": "yarn", "factor": 4}), "rope_scaling.original_max_position_embeddings"),
    "scaling without a kind": (_config(rope_scaling={"factor": 4}), "rope_scaling ({'factor': 4})"),
    "rope is a text": (_config(rope_scaling="yarn"), "rope_scaling ('yarn')"),
    "rope kind is a list": (_rope(rope_type=["yarn"]), "rope_scaling (['yarn'])"),
    "rope by layer": (_rope(full_attention={"rope_theta": 6e5}), "rope_scaling ({'full_attention'"),
    # two statements that differ
    "two thetas": (_rope(rope_theta=1e6, rope_type="default"), "rope_parameters.rope_theta (1000000.0)"),
    "two rotary factors": (_rope(partial_rotary_factor=0.25), "rope_parameters.partial_rotary_factor (0.25)"),
    "rotary_dim": (_config(rotary_dim=8), "rotary_dim (8)"),
    "two numbers of experts": (_config(num_local_experts=8), "num_local_experts (8)"),
    "two dtypes": (_config(dtype="float32"), "dtype ('float32')"),
    "unknown dtype of the config": (_config(torch_dtype="int4"), "dtype ('int4')"),
    "dtype is a number": (_config(torch_dtype=16), "dtype (16)"),
    "two numbers of layers": (_config(layer_types=["full_attention"] * 2), "layer_types (2 of them)"),
    "shared size": (_config(moe_shared_expert_intermediate_size=13), "moe_shared_expert_intermediate_size (13)"),
    "two ends": (_json("generation_config.json", eos_token_id=[7, 8]), "eos_token_id ([7, 8])"),
    "two mask tokens": (_json("generation_config.json", mask_token_id=7), "mask_token_id (7)"),
    "generation is a list": (_content("generation_config.json", "[]"), "generation_config.json is damaged"),
    "generation is half": (_content("generation_config.json", "{"), "generation_config.json is damaged"),
    # tokens
    "mask without a row": (_config(mask_token_id=4000), "mask_token_id (4000)"),
    "mask is another token": (_config(mask_token_id=2), "mask_token_id (2)"),
    "mask is the end": (_config(eos_token_id=5), "mask_token_id (5) equals eos_token_id"),
    "end without a row": (_config(eos_token_id=40), "eos_token_id (40)"),
    "end is a text": (_config(eos_token_id="</s>"), "eos_token_id ('</s>')"),
    "end is a float": (_config(eos_token_id=3.0), "eos_token_id (3.0)"),
    "padding without a row": (_config(pad_token_id=99), "pad_token_id (99)"),
    "end is negative": (_config(eos_token_id=-7), "eos_token_id (-7)"),
    # the tokenizer
    "tokenizer half": (_content("tokenizer.json", '{"model": {'), "tokenizer.json is damaged"),
    "tokenizer is a list": (_content("tokenizer.json", "[1]"), "tokenizer.json is damaged"),
    "tokenizer of larger model": (_json("added_tokens.json", far=4000), "4001"),
    "ids negative": (_json("added_tokens.json", low=-3), "token 'low' has the id -3"),
    "ids are texts": (_json("added_tokens.json", odd="x"), "the tokenizer's files name its tokens in an unknown way"),
    "added tokens no list": (_json("tokenizer.json", added_tokens=5), "in an unknown way"),
    "vocabulary a number": (_json("tokenizer.json", model={"vocab": 5}), "in an unknown way"),
    "tokenizer dead link": (_dead_link("tokenizer.json"), "tokenizer.json is a link to"),
    "template dead link": (_dead_link("chat_template.jinja"), "chat_template.jinja is a link to"),
    "tokenizer_config twice": (_twice("tokenizer_config.json", "eos_token"), "'eos_token' stands there twice"),
    "tokenizer_config not UTF-8": (_content("tokenizer_config.json", b"\xff"), "tokenizer_config.json is damaged"),
    "special tokens a list": (_content("special_tokens_map.json", "[]"), "special_tokens_map.json is damaged"),
    # the files of tensors
    "no weights": (_gone(SINGLE_NAME), "holds no .safetensors file"),
    "pickled weights": (
        lambda folder: (folder / SINGLE_NAME).rename(folder / "pytorch_model.bin"),
        "pytorch_model.bin is a pickle",
    ),
    "weights are empty": (_content(SINGLE_NAME, ""), "model.safetensors (0 bytes) is no whole"),
    "weights are text": (_content(SINGLE_NAME, "version https://git-lfs.github.com/spec/v1"), "is no whole"),
    "weights are a folder": (_folder(SINGLE_NAME), "model.safetensors is no file"),
    "weights are a dead link": (_dead_link(SINGLE_NAME), "model.safetensors is a link to ../blobs/none"),
    "weights are a pipe": (_pipe(SINGLE_NAME), "model.safetensors is no file"),
    "weights cut off": (_bytes(lambda data: data[:-1]), "model.safetensors is truncated"),
    "weights cut off in the header": (_bytes(lambda data: data[:100]), "is no whole safetensors file"),
    "weights too long": (_bytes(lambda data: data + b"x"), "1 bytes after its last tensor"),
    "header length": (_bytes(lambda data: b"\xff" * 8 + data[8:]), "is no whole safetensors file"),
    "header damaged": (_bytes(lambda data: data[:20] + b"\xff" + data[21:]), "corrupt safetensors header"),
    "header a list": (_content(SINGLE_NAME, struct.pack("<Q", 2) + b"[]"), "corrupt safetensors header"),
    "header deep": (_content(SINGLE_NAME, struct.pack("<Q", 10**5) + b"[" * 10**5), "nested too deeply"),
    "tensor twice": (_content(SINGLE_NAME, struct.pack("<Q", 17) + b'{"a": 1, "a": 2} '), "'a' stands there twice"),
    "tensors overlap": (
        _header(lambda header: header[NORM].update(data_offsets=[0, 48])),
        "does not begin where the one before it ends",
    ),
    "negative shape": (_header(lambda header: header[NORM].update(shape=[-24])), f"tensor {NORM} has a corrupt entry"),
    "huge shape": (_header(lambda header: header[NORM].update(shape=[2**70])), f"tensor {NORM} does not lie where"),
    "unknown dtype": (_header(lambda header: header[NORM].update(dtype="F8_E4M3")), f"tensor {NORM} has dtype F8_E4M3"),
    # the index
    "index half": (_content(INDEX_NAME, "{"), f"{INDEX_NAME} is damaged"),
    "index without map": (_content(INDEX_NAME, "{}"), f"{INDEX_NAME} is no safetensors index"),
    "index with numbers": (_index({NORM: 3}), f"{INDEX_NAME} is no safetensors index"),
    "index names an absent file": (
        _index({NORM: SINGLE_NAME, HEAD: "two.safetensors"}),
        "two.safetensors, which is missing",
    ),
    "index leaves the folder": (
        _index({NORM: "../hf/model.safetensors", HEAD: SINGLE_NAME}),
        "'../hf/model.safetensors'",
    ),
    "index leaves it by the root": (_index({NORM: "/etc/passwd", HEAD: SINGLE_NAME}), "'/etc/passwd'"),
    "index names the folder": (_index({NORM: SINGLE_NAME, HEAD: ".."}), ".., which is missing"),
    "index names a null byte": (_index({NORM: SINGLE_NAME, HEAD: "a\0b"}), "which is missing"),
    "index names no such tensor": (_index({"model.other": SINGLE_NAME}), "model.other"),
    "index beside another file": (
        lambda folder: (
            save_file({NORM: torch.ones(24)}, folder / "one.safetensors"),
            _index({NORM: "one.safetensors"})(folder),
        ),
        "model.safetensors lies beside",
    ),
    "two sets of shards": (
        lambda folder: shutil.copy(folder / SINGLE_NAME, folder / "model-00001-of-00001.safetensors"),
        "is also in model-00001-of-00001.safetensors",
    ),
    "training context of text": (_config(training_context_length="512"), "training_context_length ('512') must be"),
    "training context of nothing": (_config(training_context_length=0), "training_context_length (0) must lie"),
    "training context too long": (_config(training_context_length=65), "training_context_length (65) must lie"),
    # the tensors
    "tensor missing": (_tensors(lambda tensors: tensors.pop(EXPERT)), f"tensor {EXPERT} and 0 more are missing"),
    "tensor unknown": (_put("model.layers.1.mlp.gate.bias", torch.ones(4)), "tensor model.layers.1.mlp.gate.bias"),
    "layer too many": (_put("model.layers.3.input_layernorm.weight", torch.ones(24)), "model.layers.3.input_layernorm"),
    "shape": (_put(EXPERT, torch.ones(24, 11).bfloat16()), f"tensor {EXPERT} has shape [24, 11]"),
    "transposed": (_put(EXPERT, torch.ones(10, 24).bfloat16()), f"tensor {EXPERT} has shape [10, 24]"),
    "number instead of a tensor": (_put(NORM, torch.tensor(1.0).bfloat16()), f"tensor {NORM} has shape []"),
    "dtype of one expert": (_put(EXPERT, torch.ones(24, 10)), f"tensor {EXPERT} has dtype torch.float32"),
    "whole numbers": (_put(EXPERT, torch.ones(24, 10, dtype=torch.int8)), "dequantize the checkpoint"),
    "NaN": (_poison(EXPERT, float("nan")), f"{EXPERT} holds 1 NaN"),
    "infinity": (_poison(HEAD, float("inf")), f"{HEAD} holds 1 NaN or Inf"),
    "infinite bias": (_poison("model.layers.1.mlp.gate.expert_bias", float("-inf")), "gate.expert_bias holds 1 NaN"),
    "tied with another head": (_config(tie_word_embeddings=True), "lm_head.weight ([40, 24]) differs"),
    "experts in two forms": (
        _put("model.layers.1.mlp.experts.gate_up_proj", torch.ones(4, 20, 24).bfloat16()),
        "model.layers.1.mlp.experts.down_proj and 2 more are missing",
    ),
    "larger vocabulary": (_config(vocab_size=48), "model.word_embeddings.weight has shape [40, 24]"),
    "another head size": (_config(head_dim=16, rotary_dim=8), "query_key_value.weight has shape"),
}


@pytest.mark.parametrize("case", CASES)
def test_each_is_refused_in_one_sentence(
    case: str, sound: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`run_command` makes exit code 2 and one line of a ValueError or OSError, and a traceback of anything else."""
    change, named = CASES[case]
    shutil.copytree(sound, tmp_path / "hf")
    change(tmp_path / "hf")
    monkeypatch.setattr(sys, "argv", ["", "--hf", str(tmp_path / "hf"), "--output", str(tmp_path / "out")])
    with pytest.raises((ValueError, OSError)) as refusal:
        hf_to_mcore.main()
    said = sentence(refusal.value)
    assert any(part in said for part in named.split("|")), said
    assert "\n" not in said and len(said) < 1000
    assert left_in(tmp_path) == {"hf"}


def test_the_sound_one_is_not_refused(sound: Path, tmp_path: Path) -> None:
    hf_to_mcore.convert(sound, tmp_path / "out")
    assert len(CASES) > 200

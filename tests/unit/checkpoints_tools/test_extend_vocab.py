"""More rows in a vocabulary: what was there keeps its bits, the new rows are what was asked for."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor

from benchmarks.synthetic import write_synthetic
from checkpoints_tools import extend_vocab, hf_to_mcore
from checkpoints_tools.compare import compare
from megatron_dllm.checkpoint.meta import read_meta
from megatron_dllm.checkpoint.stored_model import read_stored_model
from megatron_dllm.checkpoint.torch_dist_read import TorchDistReader
from megatron_dllm.config import ModelConfig, ParallelConfig
from megatron_dllm.hf.name_table import key_aliases
from tests.golden.earlier_run import CHECKPOINT, FOLDER
from tests.tiny_models import LING, MODELS, left_in
from tests.unit.hf.test_tokenizer_folder import make_tokenizer

EMBEDDING, HEAD = "model.word_embeddings.weight", "lm_head.weight"
TRAINED = FOLDER / CHECKPOINT  # with the state of its optimizer; 128 rows


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8)


def _same_but_for_new_rows(before: dict[str, Tensor], after: dict[str, Tensor], longer: set[str]) -> None:
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert (after[name].shape != tensor.shape) == (name in longer), name
        assert torch.equal(_bits(after[name][: len(tensor)]), _bits(tensor)), name


def _tensors_of(checkpoint: Path) -> dict[str, Tensor]:
    reader = TorchDistReader(checkpoint)
    found = {}
    for key, entry in reader.metadata.tensors.items():
        flat = torch.empty(entry.num_bytes // entry.dtype.itemsize, dtype=entry.dtype)
        reader.read(key, (0,) * len(entry.shape), entry.shape, flat)
        found[key] = flat.view(entry.shape)
    reader.close()
    return found


@pytest.mark.parametrize("name", ["bailing_moe", "qwen3 tied", "qwen2"])
def test_a_hugging_face_folder_keeps_its_bits(name: str, tmp_path: Path) -> None:
    write_synthetic(tmp_path / "hf", MODELS[name])
    extend_vocab.convert(tmp_path / "hf", tmp_path / "out", 64, noise=0.0)
    before, after = (load_file(tmp_path / folder / "model.safetensors") for folder in ("hf", "out"))
    longer = {key for key in before if key == HEAD or "embed" in key}
    assert len(longer) == (1 if MODELS[name].tie_word_embeddings else 2)
    _same_but_for_new_rows(before, after, longer)
    for key in longer:
        expected_mean = before[key].double().mean(dim=0).to(before[key].dtype)
        assert torch.equal(after[key][40:], expected_mean.expand(24, -1))
    config, old = (json.loads((tmp_path / folder / "config.json").read_text()) for folder in ("out", "hf"))
    assert config == old | {"vocab_size": 64}


@pytest.mark.parametrize("name", ["bailing_moe", "qwen3 tied"])
def test_both_formats_give_the_same_model(name: str, tmp_path: Path) -> None:
    write_synthetic(tmp_path / "hf", MODELS[name])
    hf_to_mcore.convert(tmp_path / "hf", tmp_path / "mcore")
    for folder in ("hf", "mcore"):
        extend_vocab.convert(tmp_path / folder, tmp_path / f"{folder}_out", 48, seed=3)
    assert compare(tmp_path / "mcore_out", tmp_path / "hf_out").is_equal
    hf_to_mcore.convert(tmp_path / "hf_out", tmp_path / "again")
    assert compare(tmp_path / "again", tmp_path / "mcore_out").is_equal
    stored = read_stored_model(tmp_path / "mcore_out")
    assert stored.model.vocab_size == 48 and stored.meta.semantics == read_meta(tmp_path / "mcore").semantics


def test_an_output_that_exists_is_refused_before_anything_is_read(hf: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("kept")
    with pytest.raises(ValueError, match=r"output \(.*out\) exists; nothing is overwritten"):
        extend_vocab.convert(hf, tmp_path / "out", 64, rows=tmp_path / "no_such_file")
    assert (tmp_path / "out" / "mine").read_text() == "kept" and left_in(tmp_path) == {"hf", "out"}


def test_what_belongs_to_a_model_is_copied(hf: Path, tmp_path: Path) -> None:
    """Also where a folder is called as a licence may be."""
    for name in ("README.md", "LICENSE", "modeling_own.py", "notes.txt"):
        (hf / name).write_text(name)
    (hf / "LICENSES").mkdir()
    extend_vocab.convert(hf, tmp_path / "out", 64)
    assert left_in(tmp_path / "out") == left_in(hf) - {"LICENSES", "notes.txt"}
    assert (tmp_path / "out" / "LICENSE").read_text() == "LICENSE"


def test_noise_is_a_share_of_the_deviation_and_comes_from_the_seed(hf: Path, tmp_path: Path) -> None:
    for name, noise, seed in (("a", 0.5, 0), ("b", 0.5, 0), ("c", 0.5, 1)):
        extend_vocab.convert(hf, tmp_path / name, 4040, noise=noise, seed=seed)
    rows = {name: load_file(tmp_path / name / "model.safetensors")[EMBEDDING].float() for name in "abc"}
    assert torch.equal(rows["a"], rows["b"]) and not torch.equal(rows["a"], rows["c"])
    old, new = rows["a"][:40], rows["a"][40:]
    assert torch.allclose(new.mean(dim=0), old.mean(dim=0), atol=0.005)
    assert torch.allclose(new.std(dim=0), 0.5 * old.std(dim=0, correction=0), rtol=0.1)
    head = load_file(tmp_path / "a" / "model.safetensors")[HEAD][40:].float()
    assert abs(float(torch.corrcoef(torch.stack([new.flatten(), head.flatten()]))[0, 1])) < 0.1


def test_given_rows_are_put_behind_the_others(hf: Path, tmp_path: Path) -> None:
    rows = {"embedding": torch.arange(48.0).view(2, 24), "output_layer": -torch.arange(48.0).view(2, 24)}
    save_file(rows, tmp_path / "rows.safetensors")
    extend_vocab.convert(hf, tmp_path / "out", 42, rows=tmp_path / "rows.safetensors")
    after = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(after[EMBEDDING][40:].float(), rows["embedding"])
    assert torch.equal(after[HEAD][40:].float(), rows["output_layer"])
    with pytest.raises(ValueError, match=r"tensor embedding is torch.float32 \[2, 24\], the new rows are .* \[3, 24\]"):
        extend_vocab.convert(hf, tmp_path / "other", 43, rows=tmp_path / "rows.safetensors")
    save_file({"embedding": rows["embedding"]}, tmp_path / "half.safetensors")
    with pytest.raises(ValueError, match=r"half.safetensors holds no tensor output_layer \(found embedding\)"):
        extend_vocab.convert(hf, tmp_path / "other", 42, rows=tmp_path / "half.safetensors")
    assert left_in(tmp_path) == {"hf", "out", "rows.safetensors", "half.safetensors"}


def test_new_tokens_get_the_first_free_ids_and_the_mask_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A vocabulary that is full to the last row, as Llama 2's."""
    write_synthetic(tmp_path / "hf", MODELS["llama"])
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config | {"mask_token_id": None}))
    make_tokenizer(tmp_path / "tokenizer", {f"<t{number}>": number for number in range(3, 40)})
    for path in (tmp_path / "tokenizer").iterdir():
        shutil.copy(path, tmp_path / "hf")
    with pytest.raises(ValueError, match=r"no row of the embedding is free; add rows with checkpoints_tools.extend_vo"):
        hf_to_mcore.convert(tmp_path / "hf", tmp_path / "mcore")
    words = ["--input", str(tmp_path / "hf"), "--output", str(tmp_path / "out"), "--tokens", "<|mask|>", "<|image|>"]
    monkeypatch.setattr(sys, "argv", ["extend_vocab", *words])
    extend_vocab.main()
    tokenizer = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    assert tokenizer.encode("ab<|image|>a<|mask|>").ids == [2, 41, 0, 40]
    assert tokenizer.decode([2, 41, 40]) == "ab", "special tokens are left out of a text"
    hf_to_mcore.convert(tmp_path / "out", tmp_path / "mcore")
    model = read_stored_model(tmp_path / "mcore").model
    assert (model.mask_token_id, model.vocab_size) == (40, 64)
    extend_vocab.convert(tmp_path / "mcore", tmp_path / "more", 128, ("<|audio|>",))
    assert Tokenizer.from_file(str(tmp_path / "more" / "tokenizer" / "tokenizer.json")).token_to_id("<|audio|>") == 42


def test_the_optimizer_is_kept_with_zeros_for_the_new_rows(tmp_path: Path) -> None:
    extend_vocab.convert(TRAINED, tmp_path / "kept", 130, keeps_optimizer=True)
    before, after = _tensors_of(TRAINED), _tensors_of(tmp_path / "kept")
    for alias in key_aliases(read_stored_model(TRAINED).model).values():
        del after[alias]  # a tool carries both names of a norm
    longer = {key for key in before if key.endswith(("word_embeddings.weight", "output_layer.weight"))}
    assert len(longer) == 2 * 4, "weights, main weights and two moments of either"
    _same_but_for_new_rows(before, after, longer)
    for key in ("embedding.word_embeddings.weight", "output_layer.weight"):
        assert torch.equal(after[f"optimizer.state.param.{key}"][128:].to(after[key].dtype), after[key][128:])
        for moment in ("exp_avg", "exp_avg_sq"):
            assert not after[f"optimizer.state.{moment}.{key}"][128:].any()
            assert after[f"optimizer.state.{moment}.{key}"][:128].any()
    assert (tmp_path / "kept" / "state.json").read_bytes() == (TRAINED / "state.json").read_bytes()
    assert read_meta(tmp_path / "kept").position == read_meta(TRAINED).position


def test_the_optimizer_is_left_behind_unless_it_is_asked_for(tmp_path: Path) -> None:
    extend_vocab.convert(TRAINED, tmp_path / "weights", 130)
    assert not [key for key in _tensors_of(tmp_path / "weights") if key.startswith("optimizer")]
    assert not (tmp_path / "weights" / "state.json").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"vocab_size": 40}, r"vocab_size \(40\) must exceed the 40 rows of the model .* at least 41"),
        ({"vocab_size": 41, "tokens": ("x", "y")}, r"vocab_size \(41\) must exceed .* 42 tokens .* at least 42"),
        ({"tokens": ("<t5>",)}, r"tokens \(<t5>\) is token 5 of"),
        ({"tokens": ("x", "x")}, r"tokens \('x'\) must be texts of their own"),
        ({"tokens": ("",)}, r"tokens \(''\)"),
        ({"vocab_size": 64, "keeps_optimizer": True}, r"optimizer \(keep\): .* Hugging Face folder"),
    ],
)
def test_what_cannot_be_is_refused(arguments: dict[str, object], message: str, hf: Path, tmp_path: Path) -> None:
    make_tokenizer(tmp_path / "tokenizer", {f"<t{number}>": number for number in range(3, 40)})
    for path in (tmp_path / "tokenizer").iterdir():
        shutil.copy(path, hf)
    with pytest.raises(ValueError, match=message):
        extend_vocab.convert(hf, tmp_path / "out", **arguments)  # type: ignore[arg-type]
    assert left_in(tmp_path) == {"hf", "tokenizer"}


def test_nothing_is_added_where_the_embedding_has_room(hf: Path, checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no tokenizer.json, so tokens \(<\|mask\|>\) cannot be added"):
        extend_vocab.convert(hf, tmp_path / "out", tokens=("<|mask|>",))
    make_tokenizer(tmp_path / "tokenizer", {})
    for path in (tmp_path / "tokenizer").iterdir():
        shutil.copy(path, hf)
    with pytest.raises(ValueError, match=r"vocab_size \(none given\): the 40 rows of the model have room for 4 tokens"):
        extend_vocab.convert(hf, tmp_path / "out", tokens=("<|mask|>",))
    with pytest.raises(ValueError, match=r"optimizer \(keep\): .* holds weights alone"):
        extend_vocab.convert(checkpoint, tmp_path / "out", 64, keeps_optimizer=True)
    assert left_in(tmp_path) == {"hf", "checkpoint", "tokenizer"}


def test_a_vocabulary_that_no_tensor_rank_divides_is_named_with_the_way_out() -> None:
    model = ModelConfig(**{**vars(LING), "vocab_size": 50257})
    layout = ParallelConfig(tensor_model_parallel_size=4, sequence_parallel=True)
    with pytest.raises(
        ValueError, match=r"size \(4\) must divide model.vocab_size \(50257\); extend_vocab makes 50260 rows of them"
    ):
        layout.validate(4, model)

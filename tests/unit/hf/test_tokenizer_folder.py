"""Which tokens a folder names, and the mask token added at its id."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from megatron_dllm.hf.tokenizer_folder import (
    TokenizerFiles,
    copy_tokenizer,
    fingerprint,
    name_tokenizer_class,
    tokenizer_files,
)
from tests.tiny_models import left_in


def make_tokenizer(folder: Path, added: dict[str, int], mask: str | None = None) -> TokenizerFiles:
    """A byte-level BPE tokenizer with three words and the given added tokens."""
    folder.mkdir()
    vocabulary = {"a": 0, "b": 1, "ab": 2}
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "normalizer": None,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "added_tokens": [
            {
                "id": n,
                "content": text,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
            for text, n in added.items()
        ],
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "vocab": {**vocabulary, **added},
            "merges": ["a b"],
        },
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": next(iter(added), None)}
    (folder / "tokenizer_config.json").write_text(json.dumps(config | ({"mask_token": mask} if mask else {})))
    return TokenizerFiles(folder)


@pytest.mark.parametrize(
    ("added", "text"), [({"<eos>": 3}, "<|mask|>"), ({"<eos>": 3, "<|reserved_9|>": 9}, "<|mask|>")]
)
def test_adds_the_token_at_exactly_its_id(tmp_path: Path, added: dict[str, int], text: str) -> None:
    files = make_tokenizer(tmp_path / "source", added)
    (tmp_path / "target").mkdir()
    copy_tokenizer(files, tmp_path / "target", 9, 16)
    tokenizer = Tokenizer.from_file(str(tmp_path / "target" / "tokenizer.json"))
    assert tokenizer.token_to_id(text) == 9
    assert tokenizer.encode(f"ab{text}ab<eos>").ids == [2, 9, 2, 3]
    assert tokenizer.decode([2, 9], skip_special_tokens=True) == "ab"
    again = TokenizerFiles(tmp_path / "target")
    assert again.mask_id() == again.special_id("mask_token") == 9
    assert "<|reserved_9|>" not in again.ids
    from transformers import AutoTokenizer

    assert AutoTokenizer.from_pretrained(tmp_path / "target").mask_token_id == 9


def test_a_tokenizer_that_has_it_is_copied_as_it_is(tmp_path: Path) -> None:
    files = make_tokenizer(tmp_path / "source", {"<eos>": 3, "<|mask|>": 5}, mask="<|mask|>")
    (tmp_path / "target").mkdir()
    copy_tokenizer(files, tmp_path / "target", 5, 16)
    assert left_in(tmp_path / "target") == {"tokenizer.json", "tokenizer_config.json"}
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "target" / name).read_bytes() == (tmp_path / "source" / name).read_bytes()


def test_a_model_folder_is_no_part_of_its_tokenizer(tmp_path: Path) -> None:
    """A run keeps its tokenizer; weights beside it may be huge, or links to what was never downloaded."""
    make_tokenizer(tmp_path / "a", {"<eos>": 3})
    (tmp_path / "a" / "model-00001-of-00002.safetensors").write_bytes(bytes(100))
    (tmp_path / "a" / "model.safetensors").symlink_to("../../blobs/none")
    (tmp_path / "a" / "generation_config.json").write_text('{"eos_token_id": 3}')
    found = [path.name for path in tokenizer_files(tmp_path / "a")]
    assert found == ["tokenizer.json", "tokenizer_config.json", "generation_config.json"]
    (tmp_path / "a" / "tokenizer_config.json").unlink()
    (tmp_path / "a" / "tokenizer_config.json").symlink_to("../../blobs/none")
    for read in (tokenizer_files, TokenizerFiles):
        with pytest.raises(
            ValueError, match=r"tokenizer_config\.json is a link to \.\./\.\./blobs/none, which does not"
        ):
            read(tmp_path / "a")


def test_end_of_text_is_the_tokenizer_s_own_token(tmp_path: Path) -> None:
    make_tokenizer(tmp_path / "a", {"<eos>": 3})
    (tmp_path / "a" / "generation_config.json").write_text('{"eos_token_id": [7, 9]}')
    files = TokenizerFiles(tmp_path / "a")
    assert (files.eos_id(), files.stop_ids()) == (3, [7, 9])
    (tmp_path / "a" / "tokenizer_config.json").write_text("{}")
    assert TokenizerFiles(tmp_path / "a").eos_id() == 7


def test_tokenizer_config_goes_before_the_older_special_tokens_map(tmp_path: Path) -> None:
    make_tokenizer(tmp_path / "a", {"<eos>": 3, "[M]": 4, "<pad>": 6}, mask="[M]")
    (tmp_path / "a" / "special_tokens_map.json").write_text(
        json.dumps({"eos_token": "<pad>", "pad_token": {"content": "<pad>"}})
    )
    files = TokenizerFiles(tmp_path / "a")
    assert [files.special_id(name) for name in ("eos_token", "mask_token", "pad_token")] == [3, 4, 6]
    assert (files.special_text("pad_token"), files.special_id("bos_token")) == ("<pad>", None)


def test_vocabulary_ends_behind_the_largest_id(tmp_path: Path) -> None:
    assert make_tokenizer(tmp_path / "a", {"<eos>": 3, "<far>": 40}).vocab_size == 41
    (tmp_path / "empty").mkdir()
    assert (TokenizerFiles(tmp_path / "empty").vocab_size, TokenizerFiles(tmp_path / "empty").exists) == (0, False)


def test_equal_tokenizers_have_one_fingerprint(tmp_path: Path) -> None:
    make_tokenizer(tmp_path / "a", {"<eos>": 3})
    make_tokenizer(tmp_path / "b", {"<eos>": 3}, mask="<eos>")
    make_tokenizer(tmp_path / "c", {"<eos>": 4})
    assert fingerprint(tmp_path / "a") == fingerprint(tmp_path / "b") != fingerprint(tmp_path / "c")
    assert fingerprint(tmp_path) is None


@pytest.mark.parametrize(
    ("named", "expected"),
    [(None, "PreTrainedTokenizerFast"), ("TokenizersBackend", "PreTrainedTokenizerFast"), ("GPT2Tokenizer", None)],
)
def test_an_export_names_a_class_that_every_transformers_has(
    named: str | None, expected: str | None, tmp_path: Path
) -> None:
    config = {"eos_token": "x"} | ({"tokenizer_class": named} if named else {})
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    name_tokenizer_class(tmp_path)
    assert json.loads((tmp_path / "tokenizer_config.json").read_text()) == config
    (tmp_path / "tokenizer.json").write_text("{}")
    name_tokenizer_class(tmp_path)
    named_now = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert named_now == config | {"tokenizer_class": expected or named}


def test_damaged_json_is_named(tmp_path: Path) -> None:
    make_tokenizer(tmp_path / "a", {"<eos>": 3})
    (tmp_path / "a" / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer\.json is damaged"):
        TokenizerFiles(tmp_path / "a")
    for content in (
        {"model": {"vocab": {"a": -1}}},
        {"model": {"vocab": {"a": 0.5}}},
        {"added_tokens": [{"id": "3", "content": "a"}]},
        {"model": ["BPE"]},
        {"model": {"vocab": {}}, "added_tokens": [{"id": 3}]},
        {"added_tokens": [5]},
    ):
        (tmp_path / "a" / "tokenizer.json").write_text(json.dumps(content))
        with pytest.raises(ValueError, match=f"{tmp_path / 'a'}: the tokenizer's files"):
            TokenizerFiles(tmp_path / "a")

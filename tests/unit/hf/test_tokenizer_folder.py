"""The mask token: found, added at its id, or refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from megatron_dllm.hf.tokenizer_folder import TokenizerFiles, copy_tokenizer, settle_mask_id

LING_VOCAB, QWEN_VOCAB = 157184, 151936


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


def test_small_tokenizers_say_it_themselves(tmp_path: Path) -> None:
    assert settle_mask_id(make_tokenizer(tmp_path / "a", {"<eos>": 3, "[M]": 4}, mask="[M]"), 16, -1, None) == 4
    assert settle_mask_id(make_tokenizer(tmp_path / "b", {"<eos>": 3, "<|mask|>": 5}), 16, -1, None) == 5


def test_known_vocabularies_have_a_reserved_id(tmp_path: Path) -> None:
    ling = make_tokenizer(tmp_path / "ling", {"<|endoftext|>": 156892, "<|reserved_token_3|>": 156895})
    assert settle_mask_id(ling, LING_VOCAB, -1, None) == 156895
    qwen = make_tokenizer(tmp_path / "qwen", {"<|endoftext|>": 151643, "</think>": 151668})
    assert settle_mask_id(qwen, QWEN_VOCAB, -1, None) == 151669
    llada2 = make_tokenizer(tmp_path / "llada2", {"<|endoftext|>": 156892, "<|mask|>": 156895, "<|role_end|>": 156900})
    assert settle_mask_id(llada2, LING_VOCAB, 156895, None) == 156895


def test_instruct_tokenizer_whose_id_means_something_else(tmp_path: Path) -> None:
    ling = make_tokenizer(tmp_path / "ling", {"<|endoftext|>": 156892, "<|role_end|>": 156895})
    with pytest.raises(ValueError, match=r"mask_token_id \(156895\) is <\|role_end\|>.*--tokenizer"):
        settle_mask_id(ling, LING_VOCAB, -1, None)


def test_contradictions_are_refused(tmp_path: Path) -> None:
    files = make_tokenizer(tmp_path / "a", {"<eos>": 3, "<|mask|>": 5})
    with pytest.raises(ValueError, match=r"mask_token_id \(7\) differs from the tokenizer's own mask token \(5"):
        settle_mask_id(files, 16, -1, 7)
    with pytest.raises(ValueError, match="no row in the embedding"):
        settle_mask_id(files, 4, -1, None)
    with pytest.raises(ValueError, match="cannot be found"):
        settle_mask_id(make_tokenizer(tmp_path / "b", {"<eos>": 3}), 16, -1, None)


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
    assert copy_tokenizer(files, tmp_path / "target", 5, 16) == ["tokenizer.json", "tokenizer_config.json"]
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "target" / name).read_bytes() == (tmp_path / "source" / name).read_bytes()


def test_end_of_text(tmp_path: Path) -> None:
    files = make_tokenizer(tmp_path / "a", {"<eos>": 3})
    assert files.eos_id() == 3
    (tmp_path / "a" / "generation_config.json").write_text('{"eos_token_id": [7, 9]}')
    assert TokenizerFiles(tmp_path / "a").eos_id() == 7


def test_damaged_json_is_named(tmp_path: Path) -> None:
    make_tokenizer(tmp_path / "a", {"<eos>": 3})
    (tmp_path / "a" / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer\.json is damaged"):
        TokenizerFiles(tmp_path / "a")
    for content in ({"model": ["BPE"]}, {"model": {"vocab": {}}, "added_tokens": [{"id": 3}]}, {"added_tokens": [5]}):
        (tmp_path / "a" / "tokenizer.json").write_text(json.dumps(content))
        with pytest.raises(ValueError, match=f"{tmp_path / 'a'}: the tokenizer's files"):
            TokenizerFiles(tmp_path / "a")

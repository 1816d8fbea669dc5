"""What counts of a tokenizer is how it encodes text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_dllm.hf.encoding_fingerprint import encoding_fingerprint
from megatron_dllm.hf.tokenizer_folder import TokenizerFiles, copy_tokenizer, fingerprint
from tests.unit.hf.test_tokenizer_folder import make_tokenizer


@pytest.mark.parametrize("added", [{"<eos>": 3}, {"<eos>": 3, "<|reserved_9|>": 9}])
def test_the_mask_token_that_a_conversion_adds_changes_nothing(tmp_path: Path, added: dict[str, int]) -> None:
    files = make_tokenizer(tmp_path / "base", added)
    (tmp_path / "converted").mkdir()
    copy_tokenizer(files, tmp_path / "converted", 9, 16)
    assert fingerprint(tmp_path / "base") != fingerprint(tmp_path / "converted")
    assert encoding_fingerprint(TokenizerFiles(tmp_path / "base")) == encoding_fingerprint(
        TokenizerFiles(tmp_path / "converted")
    )


def _changed(folder: Path, **changes: Any) -> str | None:
    path = folder / "tokenizer.json"
    before = path.read_text()
    content = json.loads(before)
    model = {**content["model"], **changes.pop("model", {})}
    path.write_text(json.dumps({**content, **changes, "model": model}, indent=1))
    found = encoding_fingerprint(TokenizerFiles(folder))
    path.write_text(before)
    return found


def test_whatever_changes_the_tokens_of_a_text_counts(tmp_path: Path) -> None:
    make_tokenizer(tmp_path / "a", {"<eos>": 3})
    expected = encoding_fingerprint(TokenizerFiles(tmp_path / "a"))
    assert _changed(tmp_path / "a") == expected
    assert _changed(tmp_path / "a", truncation={"max_length": 9}, decoder=None, version="2") == expected
    assert _changed(tmp_path / "a", model={"merges": [["a", "b"]]}) == expected
    others = [
        _changed(tmp_path / "a", model={"merges": []}),
        _changed(tmp_path / "a", model={"vocab": {"a": 1, "b": 0, "ab": 2, "<eos>": 3}}),
        _changed(tmp_path / "a", model={"byte_fallback": True}),
        _changed(tmp_path / "a", normalizer={"type": "NFC"}),
        _changed(tmp_path / "a", pre_tokenizer=None),
        _changed(tmp_path / "a", added_tokens=[]),
    ]
    assert len({expected, *others}) == 1 + len(others)


def test_a_vocabulary_with_scores_counts_too(tmp_path: Path) -> None:
    make_tokenizer(tmp_path / "a", {"<eos>": 3})
    first, second = (_changed(tmp_path / "a", model={"vocab": [["x", -1.0], ["y", score]]}) for score in (-2.0, -3.0))
    assert first != second


def test_a_folder_without_a_tokenizer_has_none(tmp_path: Path) -> None:
    assert encoding_fingerprint(TokenizerFiles(tmp_path)) is None

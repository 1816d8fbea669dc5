"""The ids that end, pad and mask: found, or refused."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_dllm.hf.special_tokens import settle_mask_id, settle_special_tokens
from megatron_dllm.hf.tokenizer_folder import TokenizerFiles
from tests.tiny_models import LING
from tests.unit.hf.test_tokenizer_folder import make_tokenizer

LING_VOCAB, QWEN_VOCAB = 157184, 151936


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
    with pytest.raises(ValueError, match=r"cannot be found.*no row of the embedding is free"):
        settle_mask_id(make_tokenizer(tmp_path / "b", {"<eos>": 3}), 4, -1, None)
    (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match="cannot be found"):
        settle_mask_id(TokenizerFiles(tmp_path / "none"), 16, -1, None)


def test_a_base_model_without_a_mask_token_gives_it_a_row_that_no_token_has(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert settle_mask_id(make_tokenizer(tmp_path / "a", {"<eos>": 3, "<far>": 9}), 16, -1, None) == 10
    assert "it becomes 10, the first row of the embedding that no token has" in caplog.text


# What config.json of a base model leaves open.
OPEN = replace(LING, mask_token_id=-1, eos_token_id=-1, pad_token_id=-1)


def test_config_json_goes_before_the_tokenizer_and_a_difference_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    files = make_tokenizer(tmp_path / "a", {"<eos>": 3, "<|mask|>": 5})
    model = settle_special_tokens(OPEN, files)
    assert (model.eos_token_id, model.pad_token_id, model.mask_token_id) == (3, 3, 5)
    assert caplog.text == ""
    model = settle_special_tokens(replace(OPEN, eos_token_id=7, pad_token_id=8), files)
    assert (model.eos_token_id, model.pad_token_id) == (7, 8)
    assert "eos_token_id (7) differs from the tokenizer's eos_token (3, <eos>)" in caplog.text


def test_generation_that_never_stops_at_the_end_of_text_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make_tokenizer(tmp_path / "a", {"<eos>": 3, "<|mask|>": 5})
    path = tmp_path / "a" / "generation_config.json"
    for stops, is_said in (([7, 3], False), (3, False), ([7, 9], True)):
        caplog.clear()
        path.write_text(json.dumps({"eos_token_id": stops}))
        with caplog.at_level(logging.WARNING):
            assert settle_special_tokens(OPEN, TokenizerFiles(tmp_path / "a")).eos_token_id == 3
        assert ("is none of those at which" in caplog.text) == is_said


def test_llada2_states_its_end_of_text_as_padding_alone(tmp_path: Path) -> None:
    files = make_tokenizer(tmp_path / "a", {"<|mask|>": 5})
    (tmp_path / "a" / "tokenizer_config.json").write_text("{}")
    files = TokenizerFiles(files.folder)
    assert settle_special_tokens(replace(OPEN, pad_token_id=6), files).eos_token_id == 6
    with pytest.raises(ValueError, match=r"eos_token_id is neither in config\.json nor in the tokenizer of .*a; add"):
        settle_special_tokens(OPEN, files)

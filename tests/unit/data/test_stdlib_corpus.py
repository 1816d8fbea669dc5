"""The standard library as a corpus: stable split, loadable tokenizer, nothing done twice."""

from __future__ import annotations

import json
import sysconfig
from pathlib import Path

import pytest

from megatron_dllm.data.stdlib_corpus import (
    EOS_TOKEN,
    MASK_TOKEN,
    PAD_TOKEN,
    build,
    is_validation,
    list_documents,
    main,
    read_document,
)

SETTINGS = {"vocab_size": 512, "validation_fraction": 0.2, "max_bytes": 400_000}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("stdlib") / "corpus"
    build(output, **SETTINGS)
    return output


def lines_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_documents_are_files_split_by_their_path(corpus: Path) -> None:
    root = Path(sysconfig.get_path("stdlib"))
    parts = {name: lines_of(corpus / f"{name}.jsonl") for name in ("train", "validation")}
    description = json.loads((corpus / "corpus.json").read_text())
    for name, lines in parts.items():
        assert [line["path"] for line in lines] == sorted(line["path"] for line in lines)
        assert all(is_validation(line["path"], 0.2) == (name == "validation") for line in lines)
        assert all(line["text"] == (root / line["path"]).read_bytes().decode() for line in lines)
        assert description[f"num_{name}_documents"] == len(lines) > 0
        assert description[f"num_{name}_bytes"] == sum(len(line["text"].encode()) for line in lines)
    num_bytes = sum(len(line["text"].encode()) for lines in parts.values() for line in lines)
    assert 200_000 < num_bytes <= 400_000


def test_share_held_out_and_its_stability() -> None:
    paths = [f"folder{n}/file{n}.py" for n in range(10_000)]
    small, large = ({path for path in paths if is_validation(path, share)} for share in (0.05, 0.1))
    assert 430 < len(small) < 570 and small < large  # 500 +- 3.2 standard deviations


def test_transformers_loads_the_tokenizer(corpus: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(corpus / "tokenizer")
    assert (tokenizer.eos_token, tokenizer.pad_token, tokenizer.mask_token) == (EOS_TOKEN, PAD_TOKEN, MASK_TOKEN)
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.mask_token_id) == (0, 1, 2)
    assert len(tokenizer) == 512
    text = "def größe(x):\n\treturn  x + 12  # 字\n"
    ids = tokenizer(text).input_ids
    assert tokenizer.decode(ids) == text and not {0, 1, 2} & set(ids)


def test_the_tokenizer_writes_chats_and_numbers_digit_by_digit(corpus: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(corpus / "tokenizer")
    messages = [
        {"role": "system", "content": "Brief"},
        {"role": "user", "content": "12+3"},
        {"role": "assistant", "content": "15"},
    ]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    assert text == "<|system|>Brief<|end|><|user|>12+3<|end|><|assistant|>15<|end|>"
    assert tokenizer.apply_chat_template(messages[:2], tokenize=False, add_generation_prompt=True) == text[:-9]
    expected = ["<|user|>", *"12+3", "<|end|>", "<|assistant|>", *"15", "<|end|>"]
    assert tokenizer.tokenize(text)[-len(expected) :] == expected
    with pytest.raises(Exception, match="unknown role tool"):
        tokenizer.apply_chat_template([{"role": "tool", "content": "x"}], tokenize=False)


def test_second_call_does_nothing_and_another_setting_is_refused(corpus: Path) -> None:
    expected_times = {path: path.stat().st_mtime_ns for path in corpus.rglob("*")}
    build(corpus, **SETTINGS)
    assert (
        main(["--output", str(corpus), "--vocab_size", "512", "--validation_fraction", "0.2", "--max_bytes", "400000"])
        == 0
    )
    with pytest.raises(ValueError, match=r"other settings or another Python \(vocab_size\)"):
        main(["--output", str(corpus), "--vocab_size", "1024", "--validation_fraction", "0.2", "--max_bytes", "400000"])
    with pytest.raises(ValueError, match=r"other settings or another Python \(vocab_size\)"):
        build(corpus, **(SETTINGS | {"vocab_size": 600}))
    assert {path: path.stat().st_mtime_ns for path in corpus.rglob("*")} == expected_times


def test_same_settings_give_the_same_bytes(corpus: Path, tmp_path: Path) -> None:
    build(tmp_path / "again", **SETTINGS)
    for path in corpus.rglob("*"):
        if path.is_file():
            assert path.read_bytes() == (tmp_path / "again" / path.relative_to(corpus)).read_bytes()


def test_what_is_left_out(tmp_path: Path) -> None:
    for name in ("a.py", "sub/b.txt", "sub/c.so", "site-packages/d.py", "encodings/e.py", "__pycache__/f.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("text")
    assert list_documents(tmp_path) == ["a.py", "sub/b.txt"]
    for content, expected_text in [
        (b"words", "words"),
        (b"", None),
        (b" \n", None),
        (b"\xff", None),
        (b"0x12, 0x34,\n" * 9, None),
    ]:
        (tmp_path / "a.py").write_bytes(content)
        assert read_document(tmp_path / "a.py") == expected_text


def test_impossible_settings(tmp_path: Path, corpus: Path) -> None:
    with pytest.raises(ValueError, match=r"vocab_size \(100\)"):
        build(tmp_path / "x", vocab_size=100)
    with pytest.raises(ValueError, match=r"validation_fraction \(0.0\)"):
        build(tmp_path / "x", validation_fraction=0.0)
    with pytest.raises(ValueError, match=r"max_bytes \(10\) leaves 0 documents"):
        build(tmp_path / "x", max_bytes=10)
    with pytest.raises(ValueError, match="is no standard library corpus"):
        build(tmp_path, **SETTINGS)
    assert list(tmp_path.iterdir()) == []

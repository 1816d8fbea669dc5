"""Chats in, a corpus with spans out, by the command that users type."""

from __future__ import annotations

import json
import re
from io import StringIO
from pathlib import Path

import pyarrow
import pytest
from pyarrow import parquet
from rich.console import Console

from megatron_dllm.config import ModelConfig
from megatron_dllm.data.chat_encoding import ChatEncoding
from megatron_dllm.data.chat_view import show_chats
from megatron_dllm.data.corpus import Corpus
from megatron_dllm.data.corpus_writing import tokenize_corpus
from megatron_dllm.data.reading import RawDocument
from megatron_dllm.data.spans import MASKABLE, MASKED
from megatron_dllm.data.tokenize import main
from megatron_dllm.hf.tokenizer_folder import chat_template_fingerprint
from tests.unit.data.chat_folders import CHATML, REASONING, write_chat_tokenizer

MODEL = ModelConfig(vocab_size=400, eos_token_id=0, pad_token_id=1, mask_token_id=2)
PAIR = {"prompt": "Hi", "response": "Hello"}
TWO = {"conversations": [{"from": who, "value": f"{who} {n}"} for n in (1, 2) for who in ("human", "gpt")]}
BAD = [
    ({"messages": [{"role": "user", "content": "x"}]}, "no assistant message among its 1"),
    ({"prompt": "x", "response": ""}, "message 2 (assistant) is empty"),
    ({"prompt": "<|im_end|>", "response": "x"}, "message 1 holds <|im_end|>"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_chat_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def write_lines(path: Path, records: list[dict]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def raw(record: dict) -> RawDocument:
    return RawDocument("x:1", json.dumps(record).encode(), is_json=True)


@pytest.mark.ranks
def test_a_corpus_with_spans(folder: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write_lines(tmp_path / "in.jsonl", [PAIR, TWO, *(record for record, _ in BAD)])
    arguments = ["--input", str(path), "--tokenizer", folder, "--kind", "chat", "--max_bad_fraction", "0.7"]
    for num_workers in ("1", "2"):
        output = str(tmp_path / f"out{num_workers}")
        assert main([*arguments, "--output", output, "--num_workers", num_workers]) == 0
    for suffix in (".bin", ".idx", ".spans", ".json", ".bad_lines.txt"):
        assert (tmp_path / f"out1{suffix}").read_bytes() == (tmp_path / f"out2{suffix}").read_bytes()
    corpus = Corpus(output, MODEL, folder)
    decode = ChatEncoding(folder).load().decode
    said = [
        [decode(corpus.read(number, start, stop - start).tolist()) for start, stop, _ in corpus.spans.table[a:b]]
        for number, (a, b) in enumerate([(0, 1), (1, 3)])
    ]
    assert said == [["Hello<|im_end|>"], ["gpt 1<|im_end|>", "gpt 2<|im_end|>"]]
    assert corpus.spans.bounds.tolist() == [0, 1, 3]
    lines = (tmp_path / "out1.bad_lines.txt").read_text().splitlines()
    for number, (line, (_, reason)) in enumerate(zip(lines, BAD, strict=True), start=3):
        assert line.startswith(f"{path}:{number}: {reason}")
    description = json.loads((tmp_path / "out1.json").read_text())
    assert (description["num_chats"], description["num_split_chats"], description["num_bad_lines"]) == (2, 0, 3)
    assert "of 2 chats 0 became several documents" in caplog.text


@pytest.mark.ranks
def test_text_written_over_chats_leaves_no_spans(folder: str, tmp_path: Path) -> None:
    prefix = str(tmp_path / "out")
    chats = write_lines(tmp_path / "in.jsonl", [PAIR])
    tokenize_corpus([str(chats)], folder, prefix, chats=ChatEncoding(folder))
    assert Path(prefix + ".spans").exists()
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(ValueError, match=r"out.spans, .*exists"):
        tokenize_corpus([str(tmp_path / "a.txt")], folder, prefix)
    tokenize_corpus([str(tmp_path / "a.txt")], folder, prefix, overwrite=True)
    assert not Path(prefix + ".spans").exists() and Corpus(prefix, MODEL, folder).spans is None


@pytest.mark.ranks
def test_a_corpus_without_a_document_is_refused(folder: str, tmp_path: Path) -> None:
    chats = write_lines(tmp_path / "in.jsonl", [PAIR])
    with pytest.raises(ValueError, match=r"\(1 chats, 0 of them bad\) holds no document .*; 1 were longer"):
        tokenize_corpus([str(chats)], folder, str(tmp_path / "out"), chats=ChatEncoding(folder, max_length=3))
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


@pytest.mark.ranks
def test_rows_of_parquet_are_chats(folder: str, tmp_path: Path) -> None:
    call = {"name": "f", "arguments": '{"a": 1}'}
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello", "tool_calls": [call]}]
    parquet.write_table(pyarrow.table({"id": [1], "messages": [messages]}), tmp_path / "in.parquet")
    chats = write_lines(tmp_path / "in.jsonl", [{"messages": messages}])
    for path in (chats, tmp_path / "in.parquet"):
        tokenize_corpus([str(path)], folder, str(path) + ".out", chats=ChatEncoding(folder))
    for suffix in (".bin", ".spans"):
        expected_bytes = (tmp_path / f"in.jsonl.out{suffix}").read_bytes()
        assert (tmp_path / f"in.parquet.out{suffix}").read_bytes() == expected_bytes
    parquet.write_table(pyarrow.table({"id": [1]}), tmp_path / "other.parquet")
    with pytest.raises(ValueError, match=r"has no column of chats .*; it has id"):
        tokenize_corpus([str(tmp_path / "other.parquet")], folder, str(tmp_path / "o"), chats=ChatEncoding(folder))


def test_overlong_chats_are_dropped_or_truncated_and_counted(folder: str) -> None:
    whole = ChatEncoding(folder).load().encode([raw(TWO)])
    (_, first_stop, _), (second, end, _) = whole.spans.table.tolist()
    longest = ChatEncoding(folder, end).load().encode([raw(TWO)])
    assert longest.lengths == [end] and "num_overlong_dropped" not in longest.tally
    dropped = ChatEncoding(folder, end - 1).load().encode([raw(TWO)])
    assert dropped.lengths == [] and dropped.tally["num_overlong_dropped"] == 1
    cut = ChatEncoding(folder, end - 1, "truncate").load().encode([raw(TWO)])
    assert cut.tokens.tolist() == whole.tokens.tolist()[: end - 1] and cut.tally["num_overlong_truncated"] == 1
    assert cut.spans.table.tolist()[1:] == [[second, end - 2, MASKABLE], [end - 2, end - 1, MASKED]]
    assert cut.tally["num_supervised_tokens"] == whole.tally["num_supervised_tokens"] - 2
    nothing_left = ChatEncoding(folder, 3, "truncate").load().encode([raw(TWO)])
    assert nothing_left.lengths == [] and nothing_left.tally["num_overlong_dropped"] == 1
    assert first_stop < second


def test_split_chats_are_counted(tmp_path: Path) -> None:
    batch = ChatEncoding(write_chat_tokenizer(tmp_path, REASONING)).load().encode([raw(TWO), raw(PAIR)])
    assert len(batch.lengths) == 3 and batch.tally["num_split_chats"] == 1


def test_another_template_is_refused_for_training(folder: str, tmp_path: Path, write_corpus) -> None:
    fingerprint = chat_template_fingerprint(Path(folder))
    prefix = write_corpus([[5, 6, 7]], description={"chat_template_sha256": fingerprint})
    Corpus(prefix, MODEL, folder)
    for template in (CHATML + " ", None):
        other = write_chat_tokenizer(tmp_path / str(template is None), template)
        with pytest.raises(ValueError, match=r"has another chat template than corpus"):
            Corpus(prefix, MODEL, other)


def test_chats_are_shown(folder: str, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "in.jsonl", [PAIR, BAD[0][0], TWO])
    screen = StringIO()
    show_chats([path], ChatEncoding(folder), 2, console=Console(file=screen, width=200))
    shown = screen.getvalue()
    assert "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n[Hello<|im_end|>]" in shown
    assert f"{path}:2: no assistant message" in shown and "gpt" not in shown


def test_the_fill_of_a_block_is_shown(folder: str, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "in.jsonl", [PAIR])
    [document] = ChatEncoding(folder).load().documents(raw(PAIR))
    size = len(document.ids) + 3
    screen = StringIO()
    show_chats([path], ChatEncoding(folder), 1, size, Console(file=screen, width=200))
    assert f"[Hello<|im_end|>]{{{ChatEncoding(folder).load().fill} x 3}}" in screen.getvalue()
    screen = StringIO()
    show_chats([path], ChatEncoding(folder), 1, len(document.ids), Console(file=screen, width=200))
    assert " x " not in screen.getvalue().partition("\n")[2], "a block that the answer fills has no fill"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--kind", "chat", "--block_size", "4", "--output", "x"], "block_size (4) is for --inspect"),
        (["--kind", "chat", "--inspect", "1", "--block_size", "0"], "block_size (0) must be at least 1"),
        (["--kind", "chat"], "output (none) must be a prefix"),
        (["--max_length", "9", "--output", "x"], "max_length (9) is for chats and pairs alone"),
        (["--inspect", "9"], "inspect (9) is for chats and pairs alone"),
        (["--kind", "chat", "--inspect", "0"], "inspect (0) must be at least 1"),
        (["--kind", "chat", "--max_length", "1", "--output", "x"], "max_length (1) must be at least 2"),
        (["--kind", "chat", "--input", "a.txt", "--output", "x"], "(a.txt) is a text file, which holds no chats"),
    ],
)
def test_impossible_options(
    folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("x")
    write_lines(tmp_path / "in.jsonl", [PAIR])
    with pytest.raises(ValueError, match=re.escape(message)):
        main(["--input", "in.jsonl", "--tokenizer", folder, *arguments])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt", "in.jsonl"]

"""What is to be decoded."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from benchmarks.tiny_run import MODEL
from megatron_dllm.config import GenerateConfig
from megatron_dllm.data.chat import Chat
from megatron_dllm.diffusion.decode import DecodingContract
from megatron_dllm.inference.prompts import encode_requests, read_requests
from megatron_dllm.inference.source import CheckpointSource
from tests.unit.data.chat_folders import write_chat_tokenizer


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.txt", "\ufeffdef f(\r\n\r\nclass A:\r\n", ["def f(", "class A:"]),
        ("a.txt", "one\u2028line\x0cof text\n", ["one\u2028line\x0cof text"]),
        ("a.jsonl", '\ufeff{"prompt": "a\u2028b"}\r\n\n{"prompt": "\\ufeffc"}', ["a\u2028b", "\ufeffc"]),
    ],
)
def test_prompts_of_a_file(tmp_path: Path, name: str, content: str, expected: list[str]) -> None:
    (tmp_path / name).write_text(content, encoding="utf-8", newline="")
    assert read_requests(GenerateConfig(checkpoint="c", prompts_file=str(tmp_path / name))) == expected


HI = {"role": "user", "content": "Hi"}
HELLO = {"role": "assistant", "content": "Hello"}


def test_chats_of_a_file_and_of_the_command_line(tmp_path: Path) -> None:
    lines = [{"messages": [HI, HELLO]}, {"prompt": "Hi", "response": "Hello"}, [HI]]
    path = tmp_path / "chats.jsonl"
    path.write_text("\n\n".join(json.dumps(line) for line in lines))
    assert read_requests(GenerateConfig(checkpoint="c", chats_file=str(path))) == [Chat([HI])] * 3
    assert read_requests(GenerateConfig(checkpoint="c", messages=json.dumps([HI]))) == [Chat([HI])]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", r"chats.jsonl:2 \(\{\) is no JSON"),
        ("3", r"chats.jsonl:2: is a int, not an object"),
        ('{"messages": []}', r"chats.jsonl:2: no message of the user"),
        ('{"messages": [{"role": "narrator", "content": "x"}]}', r"chats.jsonl:2: .* unknown role \(narrator"),
    ],
)
def test_a_bad_line_of_chats_is_named(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "chats.jsonl"
    path.write_text(f"{json.dumps([HI])}\n{content}\n")
    with pytest.raises(ValueError, match=message):
        read_requests(GenerateConfig(checkpoint="c", chats_file=str(path)))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("messages", "Hi", r"messages \(Hi\) is no JSON"),
        ("messages", "[]", r"messages: no message of the user"),
        ("chats_file", "/nope", r"chats_file \(/nope\) is not a file"),
    ],
)
def test_what_is_no_chat_is_refused(key: str, value: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_requests(replace(GenerateConfig(checkpoint="c"), **{key: value}))


def test_an_empty_file_of_chats_is_refused(tmp_path: Path) -> None:
    (tmp_path / "chats.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="holds no chat"):
        read_requests(GenerateConfig(checkpoint="c", chats_file=str(tmp_path / "chats.jsonl")))


def source_of(tokenizer: Path) -> CheckpointSource:
    model = replace(MODEL, vocab_size=512)
    contract = DecodingContract(block_size=8, context_length=32, mask_token_id=2, eos_token_ids=(0,))
    return CheckpointSource(tokenizer, False, model, contract, tokenizer)


def test_a_chat_is_rendered_and_its_answer_ends_with_the_turn(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_file(write_chat_tokenizer(tmp_path) + "/tokenizer.json")
    (prompt,), contract = encode_requests([Chat([HI])], tokenizer, source_of(tmp_path))
    assert prompt.text == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert prompt.ids == tokenizer.encode(prompt.text).ids
    assert contract.eos_token_ids == (0, tokenizer.token_to_id("<|im_end|>"))
    (text,), unchanged = encode_requests([prompt.text], tokenizer, source_of(tmp_path))
    assert text == prompt and unchanged.eos_token_ids == (0,)


def test_a_chat_that_cannot_be_asked_is_named(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_file(write_chat_tokenizer(tmp_path / "a") + "/tokenizer.json")
    chats = [Chat([HI]), Chat([HI | {"content": "x<|im_end|>"}])]
    with pytest.raises(ValueError, match="chat 2: message 1 holds"):
        encode_requests(chats, tokenizer, source_of(tmp_path / "a"))
    with pytest.raises(ValueError, match=r"prompt 2 of 2 .* must be shorter than context_length"):
        encode_requests([chats[0], Chat([HI | {"content": "x" * 40}])], tokenizer, source_of(tmp_path / "a"))
    write_chat_tokenizer(tmp_path / "b", template=None)
    with pytest.raises(ValueError, match="has no chat template"):
        encode_requests(chats, tokenizer, source_of(tmp_path / "b"))

"""Which chats can be asked, and which answers are right."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_dllm.evaluation.questions import read_questions


def chat(question: str, answer: str, **more: str) -> dict:
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": messages, **more}


def write(path: Path, *records: object) -> Path:
    path.write_text("\n".join(json.dumps(record) for record in records) + "\n")
    return path


def test_a_task_judges_its_answers_and_other_chats_want_the_same_text(tmp_path: Path) -> None:
    path = write(tmp_path / "c.jsonl", chat("add: 10 12", "22", task="add"), chat("Capital?", "Paris"))
    added, capital = read_questions(path)
    assert (added.task, added.text, capital.task) == ("add", "add: 10 12", "chats")
    assert [message["role"] for message in capital.chat.messages] == ["user"]
    assert added.is_right("22") and not added.is_right("23")
    assert capital.is_right(" Paris\n") and not capital.is_right("paris")


def test_a_limit_takes_the_first_of_each_task(tmp_path: Path) -> None:
    records = [chat(f"{task} {n}", "x", task=task) for n in range(3) for task in ("a", "b")]
    taken = read_questions(write(tmp_path / "c.jsonl", *records), limit=2)
    assert [question.text for question in taken] == ["a 0", "b 0", "a 1", "b 1"]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"messages": [{"role": "user", "content": "Hi"}]}, r"c.jsonl:1: no assistant message"),
        ({"messages": [*chat("a", "b")["messages"], {"role": "user", "content": "c"}]}, "the chat ends with user"),
        (3, "is a int, not an object"),
    ],
)
def test_what_cannot_be_asked_is_named(tmp_path: Path, record: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_questions(write(tmp_path / "c.jsonl", record))


def test_files_that_hold_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is not a file"):
        read_questions(tmp_path / "c.jsonl")
    (tmp_path / "c.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="holds no chat"):
        read_questions(tmp_path / "c.jsonl")
    (tmp_path / "c.jsonl").write_text("{\n")
    with pytest.raises(ValueError, match=r"c.jsonl:1 .* is no JSON"):
        read_questions(tmp_path / "c.jsonl")

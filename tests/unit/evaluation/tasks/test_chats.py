"""The files of chats: the same bytes from the same settings, and records that the chat reader takes."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from megatron_dllm.data.chat import chat_of
from megatron_dllm.evaluation.tasks.catalogue import TASKS
from megatron_dllm.evaluation.tasks.chats import main, write_chats


def test_chats_of_every_task_and_the_same_again(tmp_path: Path) -> None:
    write_chats(tmp_path / "a", num_train=20, num_held_out=5)
    lines = [json.loads(line) for line in (tmp_path / "a" / "train.jsonl").read_text().splitlines()]
    assert Counter(line["task"] for line in lines) == dict.fromkeys(TASKS, 20)
    assert len({line["task"] for line in lines[:10]}) > 1, "the tasks are not mixed"
    for line in lines:
        question, answer = (message["content"] for message in chat_of(line).messages)
        assert TASKS[line["task"]].is_right(question, answer)
    write_chats(tmp_path / "b", num_train=20, num_held_out=5)
    for name in ("train.jsonl", "held_out.jsonl"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    write_chats(tmp_path / "c", num_train=20, num_held_out=5, seed=1)
    assert (tmp_path / "a" / "train.jsonl").read_bytes() != (tmp_path / "c" / "train.jsonl").read_bytes()


def test_what_is_refused(tmp_path: Path) -> None:
    for words, message in (
        ([str(tmp_path)], "exists; nothing is overwritten"),
        ([str(tmp_path / "x"), "--num_train", "0"], r"num_train \(0\)"),
    ):
        with pytest.raises(ValueError, match=message):
            main(["--output", *words])
    assert list(tmp_path.iterdir()) == []

"""The text that the studies of conversion train on: right answers, and none of the questions that measure."""

from __future__ import annotations

import pytest

from benchmarks.study_corpus import documents
from megatron_dllm.evaluation.tasks.catalogue import TASKS
from megatron_dllm.evaluation.tasks.task import is_held_out


@pytest.mark.parametrize("held_out", [False, True])
def test_documents_ask_questions_of_their_side_and_answer_them(held_out: bool) -> None:
    texts = list(documents(60, held_out))
    assert len(set(texts)) == 60 and texts == list(documents(60, held_out))
    asked = set()
    for text in texts:
        lines = text.splitlines()
        assert 4 <= len(lines) // 2 <= 12 and len(lines) % 2 == 0
        for question, answer in zip(lines[::2], lines[1::2], strict=True):
            assert is_held_out(question) == held_out
            (task,) = (task for task in TASKS.values() if question.startswith(f"{task.name}:"))
            assert task.is_right(question, answer)
            asked.add(task.name)
    assert asked == set(TASKS)

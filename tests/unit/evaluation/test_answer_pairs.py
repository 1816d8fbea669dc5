"""Pairs of a model's own answers, from answers that are made up."""

from __future__ import annotations

import pytest

from megatron_dllm.data.chat import Chat
from megatron_dllm.data.pair import pair_of
from megatron_dllm.evaluation.answer_pairs import make_pairs, show
from megatron_dllm.evaluation.answering import Answer
from megatron_dllm.evaluation.questions import Question


def answers(question: str, *texts: str, task: str = "add") -> list[Answer]:
    asked = Question(task, Chat([{"role": "user", "content": question}]), "expected")
    return [Answer(asked, text, None) for text in texts]  # type: ignore[arg-type]


def test_a_pair_is_the_first_right_and_the_first_wrong_answer(capsys: pytest.CaptureFixture[str]) -> None:
    asked = [
        answers("add: 20 30", "", "51", " 50", "50", "52"),
        answers("add: 11 12", "23", "23", "23", "23", "23"),
        answers("add: 10 10", "1", "2", "3", "4", "5"),
        answers("anything", "other", "expected", "", "", "", task="own"),
    ]
    pairs = make_pairs(asked)
    assert [(pair["chosen"], pair["rejected"], pair["task"]) for pair in pairs] == [
        (" 50", "51", "add"),
        ("expected", "other", "own"),
    ]
    read = pair_of(pairs[0])
    assert [message["content"] for message in read.chosen.messages] == ["add: 20 30", " 50"]
    assert [message["content"] for message in read.rejected.messages] == ["add: 20 30", "51"]
    show(asked, pairs)
    assert any({"add", "3", "46.7%", "1"} <= set(line.split()) for line in capsys.readouterr().out.splitlines())


def test_nothing_to_prefer_is_refused() -> None:
    with pytest.raises(ValueError, match="none of 2 questions had both a right and a wrong answer"):
        make_pairs([answers("add: 10 10", "20"), answers("add: 10 11", "7", "")])

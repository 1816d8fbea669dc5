"""Answers in a report: every model in its place, every token with its pass, nothing where nothing was measured."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_dllm.evaluation.answer_scores import (
    AnswerScores,
    ShownAnswer,
    TaskScore,
    ThresholdScores,
    write_answer_scores,
)
from megatron_dllm.reporting.answers import answers_section, read_answers
from megatron_dllm.reporting.history import read_history
from tests.unit.reporting.folders import write_chain


def scores_of(checkpoint: str, num_right: int) -> AnswerScores:
    tasks = {"add": TaskScore(4, num_right, 30, 10), "sort": TaskScore(4, 4, 10, 10)}
    answer = ShownAnswer("add", "add: <1>", "3", False, ["3", "\n", "<|end|>"], [1, 12, 2])
    return AnswerScores(
        checkpoint, "chats/held_out.jsonl", 32, [ThresholdScores(t, tasks) for t in (0.5, 0.9)], 0.9, [answer]
    )


def test_models_stand_in_the_order_of_their_runs_with_scores_and_passes(tmp_path: Path) -> None:
    chain = write_chain(tmp_path / "full")
    for checkpoint, num_right in (("decay", 3), ("warmup", 1), ("abroad", 0)):
        write_answer_scores(chain / f"answers_{checkpoint}.json", scores_of(f"full/{checkpoint}", num_right))
    scores = read_answers(read_history(chain))
    assert list(scores) == ["warmup", "decay", "abroad"]
    page = "".join(answers_section(scores))
    for name, accuracy, total in (("warmup", "0.250", "0.625"), ("decay", "0.750", "0.875")):
        expected = [name, "0.9", accuracy, "1.000", total, "2.00"]
        assert "".join(f"<td>{cell}</td>" for cell in expected) in page
    assert page.count("<img") == 1
    assert "add: &lt;1&gt;" in page and "⏎<sub>12</sub>" in page and "&lt;|end|&gt;<sub>2</sub>" in page
    assert page.count("<b>wrong</b>") == 3
    colors = {part.split(",")[0] for part in page.split("hsl(")[1:]}
    assert len(colors) == 3, "passes 1, 2 and 12 have colours of their own"


def test_nothing_was_measured(tmp_path: Path) -> None:
    assert answers_section(read_answers(read_history(write_chain(tmp_path / "full")))) == []


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    chain = write_chain(tmp_path / "full")
    (chain / "answers_x.json").write_text("{}")
    with pytest.raises(ValueError, match=r"answers_x\.json holds no scores"):
        read_answers(read_history(chain))

"""The file of scores: a round trip, sums over tasks, and what is no such file."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from megatron_dllm.evaluation.answer_scores import (
    AnswerScores,
    ShownAnswer,
    TaskScore,
    ThresholdScores,
    read_answer_scores,
    write_answer_scores,
)

TASKS = {"add": TaskScore(4, 1, 10, 5), "sort": TaskScore(6, 6, 60, 10)}
SCORES = AnswerScores(
    checkpoint="runs/a",
    chats="held_out.jsonl",
    block_size=32,
    thresholds=[ThresholdScores(0.5, TASKS), ThresholdScores(0.9, TASKS | {"add": TaskScore(4, 2, 10, 10)})],
    shown_threshold=0.9,
    shown=[ShownAnswer("add", "add: 1 2", "3", True, ["3", "<|end|>"], [2, 1])],
)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    write_answer_scores(tmp_path / "new" / "a.json", SCORES)
    assert read_answer_scores(tmp_path / "new" / "a.json") == SCORES


def test_tasks_are_added_up_by_question_and_by_pass() -> None:
    total = SCORES.at(0.5)
    assert total == TaskScore(10, 7, 70, 15)
    assert total.accuracy == 0.7 and total.tokens_per_forward == 70 / 15
    assert SCORES.at(0.6) is None


@pytest.mark.parametrize("content", ["{}", '{"format": 1}', '{"format": 1, "thresholds": 3, "shown": []}', "[]", "{"])
def test_what_is_no_such_file_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(ValueError, match=r"a\.json.*measure it again"):
        read_answer_scores(tmp_path / "a.json")


def test_a_field_that_is_missing_is_refused(tmp_path: Path) -> None:
    write_answer_scores(tmp_path / "a.json", replace(SCORES, shown=[]))
    text = (tmp_path / "a.json").read_text()
    (tmp_path / "a.json").write_text(text.replace('"num_right"', '"num_wrong"'))
    with pytest.raises(ValueError, match="is damaged"):
        read_answer_scores(tmp_path / "a.json")

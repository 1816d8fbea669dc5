"""The points of a study, what follows from them, and their file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_dllm.evaluation.answer_scores import TaskScore
from megatron_dllm.evaluation.study_results import Confidence, Point, Study, pareto_front, read_studies, write_studies


def point_of(num_right: int, num_forwards: int, rule: str = "threshold", value: float = 0.9) -> Point:
    """A point of 20 questions and 120 tokens."""
    tasks = {"add": TaskScore(10, num_right // 2, 60, num_forwards // 2)}
    tasks["sort"] = TaskScore(10, num_right - num_right // 2, 60, num_forwards - num_forwards // 2)
    return Point(32, rule, value, tasks, 20, 2.5, 4.0, 3.0 if rule == "threshold" else None)


def study_of(checkpoint: str, *points: Point) -> Study:
    """A study with one line of confidences."""
    return Study(checkpoint, "20 questions", list(points), [Confidence(32, 0.9, 4, 40, 30, 20, 18)])


def test_numbers_that_follow_from_the_counts() -> None:
    point = point_of(15, 40)
    assert (point.accuracy, point.tokens_per_forward) == (0.75, 3.0)
    assert (point.tokens_per_forward_with_commits, point.tokens_per_second) == (2.0, 30.0)


def test_the_front_holds_what_no_other_point_beats() -> None:
    slow, beaten, middle, equal, fast = (point_of(*pair) for pair in ((18, 60), (14, 50), (16, 40), (16, 40), (10, 20)))
    front = pareto_front([slow, beaten, middle, equal, fast])
    assert front == [slow, middle, fast]
    assert front[1] is middle, "the first of equal ones"
    assert pareto_front([]) == []


def test_the_file_gives_back_what_was_written(tmp_path: Path) -> None:
    studies = [study_of("runs/a", point_of(15, 40), point_of(3, 5, "factor", 1.0)), study_of("runs/b")]
    write_studies(tmp_path / "new" / "study.json", studies)
    assert read_studies(tmp_path / "new" / "study.json") == studies
    entry = json.loads((tmp_path / "new" / "study.json").read_text())["studies"][0]["points"][0]
    assert (entry["accuracy"], entry["tokens_per_forward"], entry["tokens_per_second"]) == (0.75, 3.0, 30.0)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{}", "holds no study of decoding in format 1; measure it again"),
        ('{"format": 1}', "is damaged"),
        (
            '{"format": 1, "studies": [{"checkpoint": "x", "conditions": "", "points": [{}], "confidence": []}]}',
            "damaged",
        ),
    ],
)
def test_another_file_is_refused(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "study.json").write_text(content)
    with pytest.raises(ValueError, match=rf"study\.json .*{message}|{message}"):
        read_studies(tmp_path / "study.json")

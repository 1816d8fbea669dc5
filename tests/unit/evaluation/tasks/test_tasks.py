"""Every task: right answers are told from wrong ones, by hand and for many questions."""

from __future__ import annotations

from itertools import islice, pairwise

import pytest

from megatron_dllm.evaluation.tasks.catalogue import TASKS
from megatron_dllm.evaluation.tasks.task import is_held_out, questions


@pytest.mark.parametrize(
    ("task", "question", "expected_answer", "wrong"),
    [
        ("sort", "sort: 7 2 9 4 1", "1 2 4 7 9", ["1 2 4 9 7", "1 2 4 7", "1 2 4 7 9 9", ""]),
        ("reverse", "reverse: list value file", "file value list", ["list value file", "file value"]),
        ("date", "date: 14.03.2021", "2021-03-14", ["2021-14-03", "2021-3-14", "14.03.2021", "2021-03-14-"]),
        (
            "json",
            "json: name=node size=360",
            '{"name": "node", "size": 360}',
            ['{"name": "node"}', "{name: node}", "[", "3"],
        ),
        ("add", "add: 23 45", "68", ["67", "6", "68 9", "x"]),
    ],
)
def test_by_hand(task: str, question: str, expected_answer: str, wrong: list[str]) -> None:
    assert TASKS[task].answer(question) == expected_answer
    assert TASKS[task].is_right(question, expected_answer)
    assert [answer for answer in wrong if TASKS[task].is_right(question, answer)] == []


def test_json_may_be_written_in_another_way_but_not_with_other_types() -> None:
    is_right = TASKS["json"].is_right
    assert is_right("json: name=node size=360", '{"size":360, "name":"node"}')
    assert not is_right("json: name=node size=360", '{"name": "node", "size": "360"}')


@pytest.mark.parametrize("name", TASKS)
def test_the_answer_to_another_question_is_wrong(name: str) -> None:
    task = TASKS[name]
    asked = list(islice(questions(task, 0, False), 200))
    assert all(task.is_right(question, task.answer(question)) for question in asked)
    pairs = [(q, task.answer(other)) for q, other in pairwise(asked)]
    assert sum(task.is_right(question, answer) for question, answer in pairs) <= 0.05 * len(pairs)


@pytest.mark.parametrize("name", TASKS)
def test_the_sides_have_no_question_in_common_whatever_the_seed(name: str) -> None:
    train = {question for seed in (0, 1) for question in islice(questions(TASKS[name], seed, False), 500)}
    held_out = {question for seed in (0, 1) for question in islice(questions(TASKS[name], seed, True), 60)}
    assert not train & held_out and len(held_out) > 60
    assert all(map(is_held_out, held_out)) and not any(map(is_held_out, train))


def test_questions_differ_and_end_where_there_are_no_more() -> None:
    every = [q for held_out in (False, True) for q in questions(TASKS["add"], 0, held_out)]
    assert len(every) == len(set(every)) == 40 * 40
    assert 0.15 < sum(map(is_held_out, every)) / len(every) < 0.25

"""Where needles lie, that their questions differ in the value alone, and what is counted."""

from __future__ import annotations

from collections import Counter

import pytest

from megatron_dllm.config import ScheduleConfig
from megatron_dllm.config.needle import NeedleConfig
from megatron_dllm.data.memory_source import MemorySource
from megatron_dllm.evaluation.likelihood import Likelihood
from megatron_dllm.evaluation.needle import Cell, cells_of, hide

TEXTS = MemorySource.of_texts([[1000] * 30, [1001] * 200, [1002] * 50])


def _encode(text: str) -> list[int]:
    """A token a letter."""
    return [ord(letter) for letter in text]


def _config(**changes: object) -> NeedleConfig:
    values = dict(lengths=[150, 300], depths=[0.0, 0.5, 1.0], num_needles=2, num_choices=3)
    return NeedleConfig(schedule=ScheduleConfig(context_length=300), **values | changes)


def _text(tokens: tuple[int, ...]) -> str:
    return "".join(chr(token) if token < 1000 else "_" for token in tokens)


def test_a_needle_lies_at_its_depth_and_fills_its_length() -> None:
    questions = hide(_config(), TEXTS, _encode)
    assert Counter((q.length, q.depth) for q in questions) == {(n, d): 2 for n in (150, 300) for d in (0.0, 0.5, 1.0)}
    for question in questions:
        contexts = {choice.context for choice in question.choices}
        answers = [_text(choice.tokens) for choice in question.choices]
        assert len(contexts) == 1 and len(set(answers)) == 3, "the choices differ in their value alone"
        (context,) = contexts
        assert len(context) + len(question.choices[-1].tokens) == question.length
        text = _text(context)
        before, _, rest = text.partition(" The secret number of ")
        name, _, rest = rest.partition(" is")
        assert rest.startswith(f"{answers[-1]}."), "the last choice is the right one"
        assert text.endswith(f" The secret number of {name} is")
        num_text = text.count("_")
        assert len(before) == round(question.depth * num_text) and set(before) <= {"_"}
    assert len({choice.noise_key for question in questions for choice in question.choices}) == len(questions)


def test_questions_depend_on_the_seed_alone() -> None:
    once, again = (hide(_config(), TEXTS, _encode) for _ in range(2))
    assert once == again != hide(_config(seed=1), TEXTS, _encode)
    wider = hide(_config(depths=[0.0, 0.25, 0.5, 0.75, 1.0]), TEXTS, _encode)
    assert {(q.length, q.depth, q.choices[0].context) for q in once} <= {
        (q.length, q.depth, q.choices[0].context) for q in wider
    }


def test_a_length_that_does_not_hold_the_question_is_refused() -> None:
    with pytest.raises(ValueError, match=r"lengths \(64\) must hold the needle, its question .* which take 7\d tokens"):
        hide(_config(lengths=[64]), TEXTS, _encode)


def test_right_is_what_no_wrong_value_reaches() -> None:
    questions = hide(_config(lengths=[150], depths=[0.5]), TEXTS, _encode)
    found = [[Likelihood((value,), True) for value in values] for values in ([-5.0, -4.0, -3.0], [-2.0, -6.0, -2.0])]
    assert cells_of(questions, found) == [
        Cell(length=150, depth=0.5, num_needles=2, accuracy=0.5, nats=2.5, gain=pytest.approx((1.5 + 2.0) / 2))
    ]

"""A task of which a program can tell whether an answer is right."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

_HELD_OUT_SHARE = 0.2
_MOST_IN_VAIN = 10_000


@dataclass(frozen=True)
class Task:
    """Questions of one kind, with right answers.

    Attributes:
        name: of the task.
        ask: draws a question.
        answer: the right answer to a question.
        is_right: whether an answer to a question is right; there may be others than that of `answer`.
    """

    name: str
    ask: Callable[[random.Random], str]
    answer: Callable[[str], str]
    is_right: Callable[[str, str], bool]


def is_held_out(question: str) -> bool:
    """Whether a question is for measuring alone: decided by its text, so it never changes sides."""
    digest = hashlib.sha256(f"held out:{question}".encode()).digest()
    return int.from_bytes(digest[:8], "big") < _HELD_OUT_SHARE * 2**64


def questions(task: Task, seed: int, held_out: bool) -> Iterator[str]:
    """Different questions of one side, in an order that the seed decides; ends when new ones are no longer found."""
    source = random.Random(f"{task.name}:{seed}")
    seen: set[str] = set()
    num_in_vain = 0
    while num_in_vain < _MOST_IN_VAIN:
        question = task.ask(source)
        num_in_vain += 1
        if question not in seen and is_held_out(question) == held_out:
            seen.add(question)
            num_in_vain = 0
            yield question

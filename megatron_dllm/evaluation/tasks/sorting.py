"""Sort a list of digits: "sort: 7 2 9 4 1" gives "1 2 4 7 9"."""

from __future__ import annotations

import random

from megatron_dllm.evaluation.tasks.task import Task

_LENGTH = 5


def _ask(source: random.Random) -> str:
    return f"sort: {' '.join(source.sample('0123456789', _LENGTH))}"


def _digits(question: str) -> list[str]:
    return question.removeprefix("sort: ").split()


def _is_right(question: str, answer: str) -> bool:
    return answer.split() == sorted(_digits(question))


SORTING = Task("sort", _ask, lambda question: " ".join(sorted(_digits(question))), _is_right)

"""Write a date in the order of ISO 8601: "date: 14.03.2021" gives "2021-03-14"."""

from __future__ import annotations

import random
from datetime import date, datetime

from megatron_dllm.evaluation.tasks.task import Task

_FIRST, _LAST = date(1950, 1, 1).toordinal(), date(2049, 12, 31).toordinal()


def _ask(source: random.Random) -> str:
    return date.fromordinal(source.randint(_FIRST, _LAST)).strftime("date: %d.%m.%Y")


def _answer(question: str) -> str:
    return datetime.strptime(question, "date: %d.%m.%Y").date().isoformat()


def _is_right(question: str, answer: str) -> bool:
    return answer.strip() == _answer(question)


DATES = Task("date", _ask, _answer, _is_right)

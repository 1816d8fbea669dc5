"""Add two numbers: "add: 23 45" gives "68"."""

from __future__ import annotations

import random

from megatron_dllm.evaluation.tasks.task import Task

_SMALLEST, _LARGEST = 10, 49


def _ask(source: random.Random) -> str:
    return f"add: {source.randint(_SMALLEST, _LARGEST)} {source.randint(_SMALLEST, _LARGEST)}"


def _sum(question: str) -> str:
    return str(sum(map(int, question.removeprefix("add: ").split())))


def _is_right(question: str, answer: str) -> bool:
    return answer.strip() == _sum(question)


SUMS = Task("add", _ask, _sum, _is_right)

"""Write words in the opposite order: "reverse: list value file name" gives "name file value list"."""

from __future__ import annotations

import random

from megatron_dllm.evaluation.tasks.task import Task

# Words of programs: a tokenizer that was trained on them has a token for each.
_TEXT = """
name list value file string class test text code line type time read open data key set path size node server client user
token word number index error message process event date color tree
"""
WORDS = tuple(_TEXT.split())
_NUM_WORDS, _LENGTH = 12, 4


def _ask(source: random.Random) -> str:
    return f"reverse: {' '.join(source.sample(WORDS[:_NUM_WORDS], _LENGTH))}"


def _reversed(question: str) -> list[str]:
    return question.removeprefix("reverse: ").split()[::-1]


def _is_right(question: str, answer: str) -> bool:
    return answer.split() == _reversed(question)


REVERSAL = Task("reverse", _ask, lambda question: " ".join(_reversed(question)), _is_right)

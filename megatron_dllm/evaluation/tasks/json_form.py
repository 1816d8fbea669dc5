"""Fill a JSON object: "json: name=node size=360" gives {"name": "node", "size": 360}."""

from __future__ import annotations

import json
import random

from megatron_dllm.evaluation.tasks.reversal import WORDS
from megatron_dllm.evaluation.tasks.task import Task


def _ask(source: random.Random) -> str:
    return f"json: name={source.choice(WORDS)} size={source.randint(100, 999)}"


def _fields(question: str) -> dict[str, str | int]:
    pairs = (field.split("=") for field in question.removeprefix("json: ").split())
    return {name: int(value) if value.isdigit() else value for name, value in pairs}


def _is_right(question: str, answer: str) -> bool:
    try:
        return bool(json.loads(answer) == _fields(question))
    except (ValueError, RecursionError):
        return False


JSON_FORM = Task("json", _ask, lambda question: json.dumps(_fields(question)), _is_right)

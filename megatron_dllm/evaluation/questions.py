"""Chats whose answers are to be judged: the question, and how to tell whether an answer is right."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from megatron_dllm.data.chat import Chat, chat_of, question_of
from megatron_dllm.data.reading import BadDocumentError
from megatron_dllm.evaluation.tasks.catalogue import TASKS
from megatron_dllm.inference.prompts import numbered_lines, parse_line

_UNNAMED = "chats"


@dataclass(frozen=True)
class Question:
    """A chat that waits for an answer.

    Attributes:
        task: name; of a task that is not in the catalogue, an answer is right if it is the expected one.
        chat: up to where the assistant is to speak.
        expected: the answer that the chat ended with.
    """

    task: str
    chat: Chat
    expected: str

    @property
    def text(self) -> str:
        """What was asked last."""
        return str(self.chat.messages[-1]["content"])

    def is_right(self, answer: str) -> bool:
        """Whether an answer is right. Space around it does not count."""
        if self.task in TASKS:
            return TASKS[self.task].is_right(self.text, answer)
        return answer.strip() == self.expected.strip()


def read_questions(path: Path, limit: int | None = None, name: str = "chats") -> list[Question]:
    """The questions of a .jsonl file of chats that end with an answer.

    Args:
        path: a chat a line; its `task` may name what kind of question it is.
        limit: take so many of each task, the first ones; None: all.
        name: of the option that named the file.

    Raises:
        ValueError: the file is missing or empty, or a line is no such chat; with its number.
    """
    if not path.is_file():
        raise ValueError(f'{name} ({path}) is not a file; name a .jsonl file with "messages" a line.')
    questions = [_question(line, place) for line, place in numbered_lines(path)]
    if not questions:
        raise ValueError(f"{name} ({path}) holds no chat; write one a line.")
    seen: Counter[str] = Counter()
    taken = []
    for question in questions:
        seen[question.task] += 1
        if limit is None or seen[question.task] <= limit:
            taken.append(question)
    return taken


def _question(line: str, place: str) -> Question:
    record = parse_line(line, place)
    try:
        chat = question_of(record)
        expected = chat_of(record).messages[-1]
    except BadDocumentError as error:
        raise ValueError(f"{place}: {error}; give a chat that ends with an answer.") from None
    if expected["role"] != "assistant":
        raise ValueError(f"{place}: the chat ends with {expected['role']}; give one that ends with an answer.")
    return Question(str(record.get("task", _UNNAMED)), chat, expected["content"])

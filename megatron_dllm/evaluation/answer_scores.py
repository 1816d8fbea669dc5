"""What a checkpoint's answers were worth at several thresholds: the values, and the file that holds them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_dllm.run.files import parents_made, read_json_object, write_json

_FORMAT = 1
_REMEDY = "measure it again with megatron_dllm.evaluation.answers"


@dataclass(frozen=True)
class TaskScore:
    """How the questions of one task were answered.

    Attributes:
        num_tokens: of the answers, each with the token that ends it.
        num_forwards: denoising passes; those that only store a finished block do not count.
    """

    num_questions: int
    num_right: int
    num_tokens: int
    num_forwards: int

    @property
    def accuracy(self) -> float:
        """Share of right answers."""
        return self.num_right / self.num_questions

    @property
    def tokens_per_forward(self) -> float:
        """Tokens of all answers over their passes."""
        return self.num_tokens / self.num_forwards

    @classmethod
    def total(cls, scores: Iterable[TaskScore]) -> TaskScore:
        """Several tasks as one."""
        rows = [(score.num_questions, score.num_right, score.num_tokens, score.num_forwards) for score in scores]
        return cls(*(sum(column) for column in zip(*rows, strict=True)))


@dataclass(frozen=True)
class ThresholdScores:
    """The scores of every task at one threshold."""

    threshold: float
    tasks: dict[str, TaskScore]

    @property
    def all_tasks(self) -> TaskScore:
        """All questions together."""
        return TaskScore.total(self.tasks.values())


@dataclass(frozen=True)
class ShownAnswer:
    """An answer to look at.

    Attributes:
        token_texts: text of each token, special ones included.
        accepted_in_pass: the denoising pass that accepted each token, from 1 on.
    """

    task: str
    question: str
    text: str
    is_right: bool
    token_texts: list[str]
    accepted_in_pass: list[int]


@dataclass(frozen=True)
class AnswerScores:
    """All that was measured of a checkpoint.

    Attributes:
        checkpoint: folder.
        chats: file of the questions.
        thresholds: in the order in which they were asked for.
        shown_threshold: at which the shown answers were decoded.
    """

    checkpoint: str
    chats: str
    block_size: int
    thresholds: list[ThresholdScores]
    shown_threshold: float
    shown: list[ShownAnswer]

    def at(self, threshold: float) -> TaskScore | None:
        """All questions together at a threshold; None where it was not measured."""
        return next((scores.all_tasks for scores in self.thresholds if scores.threshold == threshold), None)


def write_answer_scores(path: Path, scores: AnswerScores) -> None:
    """Write the file."""
    with parents_made(path):
        write_json(path, {"format": _FORMAT, **asdict(scores)}, indent=1, ensure_ascii=False)


def read_answer_scores(path: Path) -> AnswerScores:
    """Read the file.

    Raises:
        ValueError: it is damaged, or not such a file.
    """
    content = read_json_object(path, _REMEDY)
    if content.pop("format", None) != _FORMAT:
        raise ValueError(f"{path} holds no scores of answers in format {_FORMAT}; {_REMEDY}.")
    try:
        thresholds = [_threshold_scores(entry) for entry in content.pop("thresholds")]
        shown = [ShownAnswer(**entry) for entry in content.pop("shown")]
        return AnswerScores(thresholds=thresholds, shown=shown, **content)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is damaged ({error!r}); {_REMEDY}.") from None


def _threshold_scores(entry: dict[str, Any]) -> ThresholdScores:
    tasks = {name: TaskScore(**score) for name, score in entry["tasks"].items()}
    return ThresholdScores(float(entry["threshold"]), tasks)

"""What a study of decoding found: a point for each checkpoint, block size and setting, and the file that holds them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_dllm.evaluation.answer_scores import TaskScore
from megatron_dllm.run.files import parents_made, read_json_object, write_json

_FORMAT = 1
_REMEDY = "measure it again with megatron_dllm.study"
# What `Point.cells` gives.
COLUMNS = ("block", "rule", "value", "right", "TPF", "with commits", "median", "expected", "tokens/s")


@dataclass(frozen=True)
class Point:
    """A checkpoint's answers, decoded in one way.

    Attributes:
        rule: of acceptance.
        value: of the setting that the rule is tried with.
        tasks: score of each task.
        num_commits: passes that only stored a block, over all answers.
        median_tokens_per_forward: of single answers, which a few endless ones do not decide as they do the mean.
        seconds: of decoding them all.
        expected_tokens_per_forward: by the shares of sure predictions alone (`confidence`); None where the rule is not
            the threshold.
    """

    block_size: int
    rule: str
    value: float
    tasks: dict[str, TaskScore]
    num_commits: int
    median_tokens_per_forward: float
    seconds: float
    expected_tokens_per_forward: float | None

    @property
    def all_tasks(self) -> TaskScore:
        """All questions together."""
        return TaskScore.total(self.tasks.values())

    @property
    def accuracy(self) -> float:
        """Share of right answers."""
        return self.all_tasks.accuracy

    @property
    def tokens_per_forward(self) -> float:
        """Tokens of all answers over their denoising passes."""
        return self.all_tasks.tokens_per_forward

    @property
    def tokens_per_forward_with_commits(self) -> float:
        """Tokens of all answers over their passes of either kind."""
        return self.all_tasks.num_tokens / (self.all_tasks.num_forwards + self.num_commits)

    @property
    def tokens_per_second(self) -> float:
        """Tokens of all answers over the time of decoding them."""
        return self.all_tasks.num_tokens / self.seconds

    def cells(self) -> list[str]:
        """Its numbers as text, in `COLUMNS`."""
        expected = self.expected_tokens_per_forward
        return [
            str(self.block_size),
            self.rule,
            f"{self.value:g}",
            f"{self.accuracy:.3f}",
            f"{self.tokens_per_forward:.2f}",
            f"{self.tokens_per_forward_with_commits:.2f}",
            f"{self.median_tokens_per_forward:.2f}",
            "-" if expected is None else f"{expected:.2f}",
            f"{self.tokens_per_second:.0f}",
        ]


@dataclass(frozen=True)
class Confidence:
    """How sure a checkpoint is of the right answers, by how many tokens of a block are masked; no text is decoded.

    Attributes:
        block_size: of the grid.
        threshold: above which a prediction is sure.
        num_masked: tokens of the block that were masked, from so many to less than twice as many.
        num_tokens: masked tokens that were predicted.
        num_right: of them, those predicted as they stand in the answer.
        num_sure: of them, those above the threshold.
        num_sure_and_right: of them, those that are both.
    """

    block_size: int
    threshold: float
    num_masked: int
    num_tokens: int
    num_right: int
    num_sure: int
    num_sure_and_right: int


@dataclass(frozen=True)
class Study:
    """All that was measured of one checkpoint.

    Attributes:
        checkpoint: folder.
        conditions: what else decides the numbers, in words.
    """

    checkpoint: str
    conditions: str
    points: list[Point]
    confidence: list[Confidence]

    @property
    def name(self) -> str:
        """Last part of the folder's name."""
        return Path(self.checkpoint).name

    def front(self) -> list[Point]:
        """The points that no other one beats in accuracy and tokens per forward, the fastest last."""
        return pareto_front(self.points)


def pareto_front(points: Sequence[Point]) -> list[Point]:
    """Those with more right answers than every faster one, from slow to fast; of equal ones the first."""
    front: list[Point] = []
    for point in sorted(points, key=lambda point: (-point.tokens_per_forward, -point.accuracy)):
        if not front or point.accuracy > front[-1].accuracy:
            front.append(point)
    return front[::-1]


def write_studies(path: Path, studies: Sequence[Study]) -> None:
    """Write the file; what follows from the counts stands in it for other readers."""
    with parents_made(path):
        entries = [{**asdict(study), "points": [_point_entry(point) for point in study.points]} for study in studies]
        write_json(path, {"format": _FORMAT, "studies": entries}, indent=1, ensure_ascii=False)


_DERIVED = ("accuracy", "tokens_per_forward", "tokens_per_forward_with_commits", "tokens_per_second")


def _point_entry(point: Point) -> dict[str, Any]:
    return {**asdict(point), **{name: getattr(point, name) for name in _DERIVED}}


def read_studies(path: Path) -> list[Study]:
    """Read the file.

    Raises:
        ValueError: it is damaged, or not such a file.
    """
    content = read_json_object(path, _REMEDY)
    if content.get("format") != _FORMAT:
        raise ValueError(f"{path} holds no study of decoding in format {_FORMAT}; {_REMEDY}.")
    try:
        return [_study(entry) for entry in content["studies"]]
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is damaged ({error!r}); {_REMEDY}.") from None


def _study(entry: dict[str, Any]) -> Study:
    points = [_point(point) for point in entry["points"]]
    confidence = [Confidence(**row) for row in entry["confidence"]]
    return Study(entry["checkpoint"], entry["conditions"], points, confidence)


def _point(entry: dict[str, Any]) -> Point:
    values = {name: value for name, value in entry.items() if name not in _DERIVED}
    tasks = {name: TaskScore(**score) for name, score in values.pop("tasks").items()}
    return Point(tasks=tasks, **values)

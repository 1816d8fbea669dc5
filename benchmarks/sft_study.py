"""Collect the study of SFT and CAP: mean and spread over seeds, as JSON and Markdown.

The last job of `make sft-study`; run it again with `python -m benchmarks.sft_study --study runs/sft_study`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.record import origin
from benchmarks.seeds import spread
from megatron_dllm.evaluation.answer_scores import AnswerScores, TaskScore, read_answer_scores
from megatron_dllm.run.files import write_json, write_text

ARMS = {
    "sft": "SFT from the converted model",
    "cap": "SFT and CAP from the converted model",
    "scratch": "SFT from random weights",
}
TASK_THRESHOLD = 0.9
RESULTS = Path(__file__).parent / "results"
Study = dict[str, list[AnswerScores]]


def collect(study: Path) -> Study:
    """By arm, the scores of every seed.

    Raises:
        ValueError: a measurement is missing or damaged.
    """
    found = {arm: [read_answer_scores(path) for path in sorted(study.glob(f"answers_{arm}_*.json"))] for arm in ARMS}
    counts = {arm: len(scores) for arm, scores in found.items()}
    if min(counts.values()) < 2 or len(set(counts.values())) > 1:
        raise ValueError(f"study ({study}) has measured {counts} seeds; finish it first.")
    return found


def to_markdown(study: Study) -> str:
    """Accuracy and tokens per forward by threshold, then the accuracy of each task at one threshold."""
    thresholds = [entry.threshold for entry in study["sft"][0].thresholds]
    lines = ["| arm | measure | " + " | ".join(f"{threshold:g}" for threshold in thresholds) + " |"]
    lines.append("|---" * (2 + len(thresholds)) + "|")
    for arm, scores in study.items():
        for measure, value in (("accuracy", _accuracy), ("tokens per forward", _tokens_per_forward)):
            totals = [[entry.thresholds[place].all_tasks for entry in scores] for place in range(len(thresholds))]
            lines.append(f"| {ARMS[arm]} | {measure} | {' | '.join(_spread(total, value) for total in totals)} |")
    return "\n".join([*lines, "", *_tasks(study)]) + "\n"


def _tasks(study: Study) -> list[str]:
    place = next(i for i, entry in enumerate(study["sft"][0].thresholds) if entry.threshold == TASK_THRESHOLD)
    names = list(study["sft"][0].thresholds[place].tasks)
    lines = [f"| accuracy at {TASK_THRESHOLD:g} | " + " | ".join(names) + " |", "|---" * (1 + len(names)) + "|"]
    for arm, scores in study.items():
        cells = [_spread([entry.thresholds[place].tasks[name] for entry in scores], _accuracy) for name in names]
        lines.append(f"| {ARMS[arm]} | {' | '.join(cells)} |")
    return lines


def _accuracy(score: TaskScore) -> float:
    return score.accuracy


def _tokens_per_forward(score: TaskScore) -> float:
    return score.tokens_per_forward


def _spread(scores: Sequence[TaskScore], value: Callable[[TaskScore], float]) -> str:
    return spread([value(score) for score in scores], 2)


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line, print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--study", type=Path, default=Path("runs/sft_study"))
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder to write the tables to")
    options = parser.parse_args(arguments)
    try:
        study = collect(options.study)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    options.results.mkdir(exist_ok=True)
    table = {
        arm: [{f"{entry.threshold:g}": _values(entry.tasks) for entry in seed.thresholds} for seed in scores]
        for arm, scores in study.items()
    }
    write_json(options.results / "tiny_sft_study.json", table, sort_keys=True)
    over = f"over {len(study['sft'])} seeds"
    lead = f"Held-out questions, by threshold; mean ± standard deviation {over}\n\n{origin()}\n\n"
    write_text(options.results / "tiny_sft_study.md", lead + to_markdown(study))
    print(lead + to_markdown(study))
    return 0


def _values(tasks: dict[str, TaskScore]) -> dict[str, list[float]]:
    """Of each task and of all: accuracy, tokens per forward."""
    scores = {**tasks, "all": TaskScore.total(tasks.values())}
    return {name: [round(score.accuracy, 4), round(score.tokens_per_forward, 3)] for name, score in scores.items()}


if __name__ == "__main__":
    sys.exit(main())

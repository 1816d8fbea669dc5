"""Measure a checkpoint's answers: how many are right, and how many tokens a pass accepts, over thresholds.

    python -m megatron_dllm.evaluation.answers --checkpoint DIR --chats held_out.jsonl --output FILE.json

DIR is a run, a checkpoint or an exported folder whose tokenizer has a chat template. The file of chats has a chat a
line that ends with a right answer. If its `task` is one of megatron_dllm.evaluation.tasks, that task's own check
decides whether an answer is right; otherwise it must be the same text. Decoding is greedy. FILE.json holds the scores,
and some answers with the pass that accepted each of their tokens.
"""

from __future__ import annotations

from megatron_dllm.run.command import listen, run_command

if __name__ == "__main__":
    listen()

import argparse
import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from rich.console import Console
from rich.progress import track
from rich.table import Table

from megatron_dllm.config import GenerateConfig
from megatron_dllm.evaluation.answer_scores import AnswerScores, ShownAnswer, ThresholdScores, write_answer_scores
from megatron_dllm.evaluation.asking import asking, question_parser, tell

log = logging.getLogger(__name__)
THRESHOLDS = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)
SHOWN_THRESHOLD = 0.9


def measure(options: argparse.Namespace) -> AnswerScores:
    """Load the checkpoint and ask it all questions at every threshold.

    Raises:
        ValueError: an impossible setting, checkpoint or chat; before the weights are read wherever possible.
    """
    config = GenerateConfig(
        checkpoint=str(options.checkpoint), chats_file=str(options.chats), max_new_tokens=options.max_new_tokens
    )
    for threshold in options.thresholds:
        replace(config, threshold=threshold).validate()
    thresholds, shown = [], []
    with asking(options, config) as asked:
        for threshold in track(options.thresholds, "answering", console=Console(stderr=True), transient=True):
            decoded = asked.decoded(replace(config, threshold=threshold))
            thresholds.append(ThresholdScores(threshold, decoded.tasks))
            if threshold == _nearest(options.thresholds, SHOWN_THRESHOLD):
                shown = _first_of_each_task(
                    [answer.shown(asked.tokenizer) for answer in decoded.answers], options.num_shown
                )
    return AnswerScores(
        str(options.checkpoint),
        str(options.chats),
        asked.decoder.contract.block_size,
        thresholds,
        _nearest(options.thresholds, SHOWN_THRESHOLD),
        shown,
    )


def _nearest(thresholds: Sequence[float], wanted: float) -> float:
    return min(thresholds, key=lambda threshold: abs(threshold - wanted))


def _first_of_each_task(answers: Sequence[ShownAnswer], number: int) -> list[ShownAnswer]:
    seen: Counter[str] = Counter()
    chosen = []
    for answer in answers:
        seen[answer.task] += 1
        if seen[answer.task] <= number:
            chosen.append(answer)
    return sorted(chosen, key=lambda answer: answer.task)


def show(scores: AnswerScores) -> None:
    """Print a table: accuracy of each task and of all, and tokens per forward, by threshold."""
    names = list(scores.thresholds[0].tasks)
    table = Table("threshold", *names, "all", "tokens per forward")
    for entry in scores.thresholds:
        cells = [f"{entry.tasks[name].accuracy:.3f}" for name in names]
        total = entry.all_tasks
        table.add_row(f"{entry.threshold:g}", *cells, f"{total.accuracy:.3f}", f"{total.tokens_per_forward:.2f}")
    Console().print(table)


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = question_parser("megatron_dllm.evaluation.answers", __doc__, "JSON file to write")
    parser.add_argument("--thresholds", type=float, nargs="+", default=list(THRESHOLDS), help="of decoding")
    parser.add_argument("--num_shown", type=int, default=2, help="answers of each task that are kept to look at")
    options = parser.parse_args(arguments)
    tell()
    scores = measure(options)
    show(scores)  # first: a disk may be full by now
    write_answer_scores(options.output, scores)
    log.info("wrote %s", options.output)
    return 0


if __name__ == "__main__":
    run_command(main)

"""Make preference pairs of a model's own answers: one that a task's check calls right, and one that it calls wrong.

    python -m megatron_dllm.evaluation.answer_pairs --checkpoint DIR --chats train.jsonl --output pairs.jsonl

DIR is a run, a checkpoint or an exported folder whose tokenizer has a chat template. Each question of the chats is
asked --num_samples times, with sampling. One with a right and a wrong answer gives a pair, the first of each; another
gives none, as there is nothing to prefer. What is right is decided as by megatron_dllm.evaluation.answers. A line of
pairs.jsonl has `prompt`, `chosen` and `rejected`, which `data.tokenize --kind pairs` reads, and the `task`.
"""

from __future__ import annotations

from megatron_dllm.run.command import listen, run_command

if __name__ == "__main__":
    listen()

import argparse
import json
import logging
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import track
from rich.table import Table

from megatron_dllm.config import GenerateConfig
from megatron_dllm.config.rules import check_positive
from megatron_dllm.evaluation.asking import asking, question_parser, tell
from megatron_dllm.evaluation.questions import Question
from megatron_dllm.run.files import write_text

if TYPE_CHECKING:
    from megatron_dllm.evaluation.answering import Answer

log = logging.getLogger(__name__)


def sample_answers(options: argparse.Namespace) -> list[list[Answer]]:
    """Load the checkpoint and ask it all questions so many times: the answers of each question.

    Raises:
        ValueError: an impossible setting, checkpoint or chat; before the weights are read wherever possible.
    """
    config = GenerateConfig(
        checkpoint=str(options.checkpoint),
        chats_file=str(options.chats),
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        threshold=options.threshold,
        seed=options.seed,
    )
    config.validate()
    check_positive("num_samples", options.num_samples)
    check_positive("temperature", options.temperature)  # greedy answers are all the same
    rounds = []
    with asking(options, config) as asked:
        for number in track(range(options.num_samples), "answering", console=Console(stderr=True), transient=True):
            # A question has seed + its index: rounds must not share any.
            seed = config.seed + number * len(asked.questions)
            rounds.append(asked.decoded(replace(config, seed=seed)).answers)
    return [list(answers) for answers in zip(*rounds, strict=True)]


def pair_record(question: Question, right: Iterable[str], wrong: Iterable[str]) -> dict[str, object] | None:
    """The pair of a question, or None where it has no answer of one kind.

    Args:
        question: that was asked.
        right: its right answers, in the order in which they came; an empty one is none.
        wrong: its wrong answers likewise.
    """
    chosen, rejected = (next((text for text in texts if text.strip()), None) for texts in (right, wrong))
    if chosen is None or rejected is None:
        return None
    prompt = list(question.chat.messages)
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, "task": question.task}


def make_pairs(answers: Sequence[Sequence[Answer]]) -> list[dict[str, object]]:
    """The pairs of all questions that give one, in their order.

    Raises:
        ValueError: none does.
    """
    found = []
    for of_question in answers:
        right, wrong = ([a.text for a in of_question if a.is_right == kind] for kind in (True, False))
        found.append(pair_record(of_question[0].question, right, wrong))
    pairs = [record for record in found if record is not None]
    if not pairs:
        raise ValueError(
            f"chats: none of {len(answers)} questions had both a right and a wrong answer; give more questions, more "
            "num_samples or another temperature."
        )
    return pairs


def show(answers: Sequence[Sequence[Answer]], pairs: Sequence[dict[str, object]]) -> None:
    """Print by task how many questions were asked, how many answers were right, and how many pairs came of it."""
    asked, right, total = Counter[str](), Counter[str](), Counter[str]()
    for of_question in answers:
        task = of_question[0].question.task
        asked[task] += 1
        right[task] += sum(answer.is_right for answer in of_question)
        total[task] += len(of_question)
    made = Counter(str(pair["task"]) for pair in pairs)
    table = Table("task", "questions", "right answers", "pairs")
    for task in sorted(asked):
        table.add_row(task, str(asked[task]), f"{right[task] / total[task]:.1%}", str(made[task]))
    Console().print(table)


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = question_parser("megatron_dllm.evaluation.answer_pairs", __doc__, ".jsonl file to write")
    parser.add_argument("--num_samples", type=int, default=8, help="answers to each question")
    parser.add_argument("--temperature", type=float, default=1.0, help="of sampling")
    parser.add_argument("--threshold", type=float, default=0.9, help="of decoding")
    parser.add_argument("--seed", type=int, default=1234, help="of sampling")
    options = parser.parse_args(arguments)
    tell()
    answers = sample_answers(options)
    pairs = make_pairs(answers)
    show(answers, pairs)  # first: a disk may be full by now
    write_text(options.output, "".join(json.dumps(pair) + "\n" for pair in pairs))
    log.info("wrote %d pairs to %s", len(pairs), options.output)
    return 0


if __name__ == "__main__":
    run_command(main)

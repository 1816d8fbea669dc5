"""Write chats in which every answer can be checked, some of them held out.

    python -m megatron_dllm.evaluation.tasks.chats --output DIR [--num_train 5000] [--num_held_out 60]

writes DIR/train.jsonl and DIR/held_out.jsonl: a chat a line, a question and its right answer, with the name of its
task. The numbers are those of each task; a task that has fewer questions gives all it has. No question is in both
files, as its text decides in which it may be. The same settings write the same bytes.
"""

from __future__ import annotations

from megatron_dllm.run.command import listen, run_command

if __name__ == "__main__":
    listen()

import argparse
import json
import logging
import random
from itertools import islice
from pathlib import Path

from megatron_dllm.checkpoint.output_folder import output_folder
from megatron_dllm.evaluation.tasks.catalogue import TASKS
from megatron_dllm.evaluation.tasks.task import Task, questions
from megatron_dllm.run.files import write_text

log = logging.getLogger(__name__)
TRAIN, HELD_OUT = "train.jsonl", "held_out.jsonl"


def write_chats(output: Path, num_train: int, num_held_out: int, seed: int = 0) -> None:
    """Write both files.

    Args:
        output: folder to create.
        num_train: chats of each task to train on.
        num_held_out: chats of each task to measure with.
        seed: other seeds give other questions, of the same two sides.

    Raises:
        ValueError: a number that is not positive, or a folder that exists.
    """
    for name, number in (("num_train", num_train), ("num_held_out", num_held_out)):
        if number <= 0:
            raise ValueError(f"{name} ({number}) must be positive; give a number of chats of each task.")
    with output_folder(output, 0) as temporary:
        for name, number, held_out in ((TRAIN, num_train, False), (HELD_OUT, num_held_out, True)):
            lines = [line for task in TASKS.values() for line in _lines(task, number, seed, held_out)]
            random.Random(seed).shuffle(lines)
            write_text(temporary / name, "".join(lines))
            log.info("%s: %d chats", output / name, len(lines))


def _lines(task: Task, number: int, seed: int, held_out: bool) -> list[str]:
    return [_line(task, question) for question in islice(questions(task, seed, held_out), number)]


def _line(task: Task, question: str) -> str:
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": task.answer(question)}]
    return json.dumps({"messages": messages, "task": task.name}) + "\n"


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m megatron_dllm.evaluation.tasks.chats",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--output", type=Path, required=True, help="folder to create")
    parser.add_argument("--num_train", type=int, default=5000, help="chats of each task to train on")
    parser.add_argument("--num_held_out", type=int, default=60, help="chats of each task to measure with")
    parser.add_argument("--seed", type=int, default=0, help="of the questions")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s: %(message)s")
    write_chats(options.output, options.num_train, options.num_held_out, options.seed)
    return 0


if __name__ == "__main__":
    run_command(main)

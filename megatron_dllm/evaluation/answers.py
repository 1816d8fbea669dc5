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
from pathlib import Path

from rich.console import Console
from rich.progress import track
from rich.table import Table

from megatron_dllm.config import GenerateConfig
from megatron_dllm.data.tokenizer import load_tokenizer
from megatron_dllm.evaluation.answer_scores import AnswerScores, ShownAnswer, ThresholdScores, write_answer_scores
from megatron_dllm.evaluation.questions import read_questions
from megatron_dllm.hf.tokenizer_folder import TokenizerFiles
from megatron_dllm.inference.prompts import encode_requests
from megatron_dllm.inference.source import read_source
from megatron_dllm.run.stream import check_writable

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
    for name in ("limit", "batch_size"):
        if getattr(options, name) is not None and getattr(options, name) <= 0:
            raise ValueError(f"{name} ({getattr(options, name)}) must be positive; give a number of questions.")
    if options.output.exists():
        raise ValueError(f"output ({options.output}) exists; nothing is overwritten: name a new file.")
    questions = read_questions(options.chats, options.limit)
    source = read_source(config)
    tokenizer = load_tokenizer(TokenizerFiles(source.tokenizer))
    prompts, contract = encode_requests([question.chat for question in questions], tokenizer, source)
    # megatron-core takes seconds to import, which a wrong setting should not cost.
    from megatron_dllm.host import prepare_host

    prepare_host()
    from megatron_dllm.evaluation.answering import answer_all, score
    from megatron_dllm.inference.decoder import Decoder
    from megatron_dllm.inference.load import load_model
    from megatron_dllm.parallel.groups import single_rank

    thresholds, shown = [], []
    with single_rank(config.seed) as groups:
        model = load_model(source, groups, config.precision, config.attention_backend)
        decoder = Decoder(model, groups, contract, options.batch_size)
        for threshold in track(options.thresholds, "answering", console=Console(stderr=True), transient=True):
            answers = answer_all(
                decoder, questions, [prompt.ids for prompt in prompts], tokenizer, replace(config, threshold=threshold)
            )
            thresholds.append(ThresholdScores(threshold, score(answers)))
            if threshold == _nearest(options.thresholds, SHOWN_THRESHOLD):
                shown = _first_of_each_task([answer.shown(tokenizer) for answer in answers], options.num_shown)
    return AnswerScores(
        str(options.checkpoint),
        str(options.chats),
        contract.block_size,
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
    parser = argparse.ArgumentParser(
        prog="python -m megatron_dllm.evaluation.answers",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--checkpoint", type=Path, required=True, help="run, checkpoint or exported folder")
    parser.add_argument("--chats", type=Path, required=True, help=".jsonl file of chats that end with an answer")
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--thresholds", type=float, nargs="+", default=list(THRESHOLDS), help="of decoding")
    parser.add_argument("--limit", type=int, default=None, help="questions of each task; all without it")
    parser.add_argument("--max_new_tokens", type=int, default=64, help="longest answer")
    parser.add_argument("--batch_size", type=int, default=64, help="questions in the same passes")
    parser.add_argument("--num_shown", type=int, default=2, help="answers of each task that are kept to look at")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    logging.getLogger("megatron_dllm").setLevel(logging.INFO)
    check_writable(options.output)
    scores = measure(options)
    show(scores)  # first: a disk may be full by now
    write_answer_scores(options.output, scores)
    log.info("wrote %s", options.output)
    return 0


if __name__ == "__main__":
    run_command(main)

"""How far estimated likelihoods lie from the exact ones, and what that does to multiple choice, against forward passes.

    python -m benchmarks.likelihood --checkpoint DIR --chats held_out.jsonl [--num_questions 16] [--output FILE]

A question is a held-out chat; its choices are its answer and those of other questions of the same kind. Blocks are so
small that every mask can be enumerated. A forward pass is one noisy view of one choice. Of estimators whose views are
independent, the longest runs are cut into runs of each length; `stratified` runs anew for each length and seed.
"""

from __future__ import annotations

from megatron_dllm.run.command import listen, run_command

if __name__ == "__main__":
    listen()

import argparse
import random
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.record import RESULTS, machine, write_results
from megatron_dllm.config import RunConfig
from megatron_dllm.config.evaluate import EvaluateConfig
from megatron_dllm.config.likelihood import COUNTS, EXACT, STRATIFIED, T_UNIFORM, LikelihoodConfig
from megatron_dllm.evaluation.questions import Question, read_questions

FloatArray = NDArray[np.float64]
NUM_SEEDS = 8
VIEWS = {T_UNIFORM: (1, 8, 32, 128), COUNTS: (1, 8, 32), STRATIFIED: (1, 2, 4, 8, 12, 16, 32)}


def draw_choices(questions: Sequence[Question], num_questions: int, num_choices: int, seed: int = 0) -> list[list[str]]:
    """The answers to choose from, the right one first: others are those of questions of the same task."""
    by_task: dict[str, list[str]] = defaultdict(list)
    for question in questions:
        by_task[question.task].append(question.expected)
    draw = random.Random(seed)
    chosen = []
    for question in questions[:num_questions]:
        others = sorted({text for text in by_task[question.task] if text != question.expected})
        chosen.append([question.expected, *draw.sample(others, num_choices - 1)])
    return chosen


def errors(estimates: FloatArray, exact: FloatArray) -> dict[str, float]:
    """What estimates are worth.

    Args:
        estimates: [r, q, c] of r runs, q questions, c choices, nats.
        exact: [q, c].

    Returns:
        The root mean square error of a choice, and of the gap between the right choice and the best other one that the
        exact values name; accuracy over runs; the share of questions that are decided otherwise than exactly.
    """
    other = 1 + exact[:, 1:].argmax(axis=1)
    rows = np.arange(len(exact))
    gap = (estimates[..., 0] - estimates[:, rows, other]) - (exact[:, 0] - exact[rows, other])
    best = estimates.argmax(axis=2)
    accuracy = (best == 0).mean(axis=1)
    return {
        "error of a choice": float(np.sqrt(((estimates - exact) ** 2).mean())),
        "error of the gap": float(np.sqrt((gap**2).mean())),
        "accuracy": float(accuracy.mean()),
        "spread of accuracy": float(accuracy.std(ddof=1)) if len(accuracy) > 1 else 0.0,
        "decided otherwise": float((best != exact.argmax(axis=1)).mean()),
    }


def runs_of(by_view: FloatArray, num_views: int) -> FloatArray:
    """[r, q, c] means of runs of independent views.

    Args:
        by_view: [s, q, c, k] views of some seeds.
        num_views: of a run, a divisor of k; no view is in two runs.
    """
    seeds, questions, choices, _ = by_view.shape
    cut = by_view.reshape(seeds, questions, choices, -1, num_views).mean(axis=4)
    return np.moveaxis(cut, 3, 1).reshape(-1, questions, choices)


def passes_for(rows: Sequence[dict[str, Any]], estimator: str, error: float) -> int | None:
    """The fewest measured views at which an estimator's gap has at most this error; None: more than were measured."""
    enough = [row["views"] for row in rows if row["estimator"] == estimator and row["error of the gap"] <= error]
    return min(enough, default=None)


def measure(options: argparse.Namespace) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The rows of the table, and what it was measured on."""
    from megatron_dllm.host import prepare_host

    prepare_host()
    from megatron_dllm.data.chat_template import ChatTemplate
    from megatron_dllm.evaluate import compose_words
    from megatron_dllm.evaluation.continuations import Continuation
    from megatron_dllm.evaluation.likelihood import score_continuations
    from megatron_dllm.evaluation.request import open_weights, settle
    from megatron_dllm.parallel.meeting import meet
    from megatron_dllm.training.measuring import measured_model

    composed = compose_words([f"checkpoint={options.checkpoint}", f"schedule.context_length={options.context_length}"])
    composed.evaluation.num_tokens = 0
    composed.evaluation.block_sizes = [options.block_size]
    request = settle(composed, open_weights(composed), 1)
    assert isinstance(request.config, EvaluateConfig) and request.config.data.tokenizer is not None
    template = ChatTemplate.load(request.config.data.tokenizer)
    questions = read_questions(options.chats)
    texts = draw_choices(questions, options.num_questions, options.num_choices)

    def ids(text: str) -> tuple[int, ...]:
        return tuple(template.tokenizer.encode(text, add_special_tokens=False).ids)

    contexts = [ids(template.prompt(question.chat)) for question in questions[: options.num_questions]]
    answers = [[ids(text) for text in choices] for choices in texts]

    with measured_model(request, meet(RunConfig(name="likelihood"))) as model:

        def score(name: str, num_views: int, seeds: Sequence[int], **settings: Any) -> FloatArray:
            """[s, q, c, k] the estimate of each view, or one number where it is exact."""
            asked = [
                Continuation(context, answer, noise_key=seed * len(contexts) + question)
                for seed in seeds
                for question, context in enumerate(contexts)
                for answer in answers[question]
            ]
            found = score_continuations(
                model, asked, LikelihoodConfig(name, num_views, row_length=4096, **settings), options.block_size
            )
            shape = (len(seeds), len(contexts), options.num_choices, -1)
            return np.array([item.by_view for item in found]).reshape(shape)

        exact = score(EXACT, 1, [0])[0, :, :, 0]
        rows = [_row(EXACT, 2**options.block_size - 1, exact[None], exact)]
        seeds = range(options.num_seeds)
        for name in (T_UNIFORM, COUNTS):
            by_view = score(name, VIEWS[name][-1], seeds)
            rows += [_row(name, views, runs_of(by_view, views), exact) for views in VIEWS[name]]
        for views in VIEWS[STRATIFIED]:
            rows.append(_row(STRATIFIED, views, score(STRATIFIED, views, seeds).mean(axis=3), exact))
    sizes = [len(answer) for choices in answers for answer in choices]
    about = {
        "questions": f"{len(contexts)} held-out chats with {options.num_choices} choices, "
        f"{min(sizes)} to {max(sizes)} tokens each",
        "block_size": options.block_size,
    }
    return rows, about


def _row(estimator: str, views: int, estimates: FloatArray, exact: FloatArray) -> dict[str, Any]:
    return {"estimator": estimator, "views": views, **errors(estimates, exact)}


def goal(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """How many passes the error of the public estimator takes: t uniform, 128 samples."""
    (public,) = (row for row in rows if row["estimator"] == T_UNIFORM and row["views"] == VIEWS[T_UNIFORM][-1])
    needed = passes_for(rows, STRATIFIED, public["error of the gap"])
    return {"fewest passes of stratified with the gap error of t_uniform with 128": needed or "more than were measured"}


def main(arguments: list[str] | None = None) -> int:
    """Measure and write the table; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True, help="run, checkpoint or exported folder")
    parser.add_argument("--chats", type=Path, required=True, help=".jsonl file of chats that end with an answer")
    parser.add_argument("--num_questions", type=int, default=16, help="questions asked")
    parser.add_argument("--num_choices", type=int, default=3, help="choices of each, the right one included")
    parser.add_argument("--block_size", type=int, default=4, help="so small that all masks can be counted")
    parser.add_argument("--context_length", type=int, default=128, help="longest question with a choice")
    parser.add_argument("--num_seeds", type=int, default=NUM_SEEDS, help="runs of the most views")
    parser.add_argument("--output", type=Path, default=RESULTS / "likelihood", help="without suffix")
    options = parser.parse_args(arguments)
    rows, about = measure(options)
    note = (
        "Errors are root mean squares over runs, in nats, against every mask enumerated; the gap is that between the\n"
        "right choice and the best other one. A view is one forward pass of a choice's blocks.\n"
    )
    write_results(
        options.output,
        "Estimated likelihoods against exact ones",
        {**machine(), **about, **goal(rows)},
        {"": rows},
        note,
    )
    print(options.output.with_suffix(".md").read_text(encoding="utf-8"))
    return 0


if __name__ == "__main__":
    run_command(main)

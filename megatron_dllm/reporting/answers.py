"""The section on answers: how many are right and how many tokens a pass accepts, and answers in the order they came.

What was measured lies beside the runs of a chain, in files called answers_*.json (`megatron_dllm.evaluation.answers`).
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path

from megatron_dllm.evaluation.answer_scores import AnswerScores, ShownAnswer, TaskScore, read_answer_scores
from megatron_dllm.reporting import pictures
from megatron_dllm.reporting.history import History
from megatron_dllm.reporting.markup import figure, table

PATTERN = "answers_*.json"
_HUES = (170, 0)  # of the first pass and, at the most, of the last
_HUE_STEP = 25


def read_answers(history: History) -> dict[str, AnswerScores]:
    """Scores by name of the model, in the order of the runs; models that are no run of the chain come last.

    Raises:
        ValueError: a file is damaged.
    """
    order = {run.name: place for place, run in enumerate(history.runs)}
    scores = [read_answer_scores(path) for path in sorted(history.folder.glob(PATTERN))]
    named = {Path(score.checkpoint).name: score for score in scores}
    return dict(sorted(named.items(), key=lambda item: (order.get(item[0], len(order)), item[0])))


def answers_section(scores: dict[str, AnswerScores]) -> list[str]:
    """The parts of the section; none where nothing was measured."""
    if not scores:
        return []
    first = next(iter(scores.values()))
    names = list(first.thresholds[0].tasks)
    header = ["model", "threshold", *names, "all", "tokens per forward"]
    rows = [
        [name, f"{entry.threshold:g}", *_accuracies(entry.tasks, names), *_total(entry.all_tasks)]
        for name, score in scores.items()
        for entry in score.thresholds
    ]
    caption = (
        f"Held-out questions ({Path(first.chats).name}): share of right answers, and tokens of all answers "
        "over all denoising passes."
    )
    return [
        "<h2>Answers</h2>",
        figure(pictures.answers_picture(scores), caption),
        table(header, rows),
        *(part for name, score in scores.items() for part in _shown(name, score)),
    ]


def _accuracies(tasks: dict[str, TaskScore], names: Sequence[str]) -> list[str]:
    return [f"{tasks[name].accuracy:.3f}" if name in tasks else "-" for name in names]


def _total(score: TaskScore) -> list[str]:
    return [f"{score.accuracy:.3f}", f"{score.tokens_per_forward:.2f}"]


def _shown(name: str, score: AnswerScores) -> list[str]:
    """Answers with a colour and a small number for the pass that accepted each token."""
    if not score.shown:
        return []
    lead = f"Answers of {name} at threshold {score.shown_threshold:g}; a token's number is the pass that accepted it."
    return [f'<p class="small">{html.escape(lead)}</p>', *map(_answer, score.shown)]


def _answer(answer: ShownAnswer) -> str:
    tokens = "".join(map(_token, answer.token_texts, answer.accepted_in_pass))
    verdict = "right" if answer.is_right else "wrong"
    return f'<div class="answer"><b>{html.escape(answer.question)}</b> → {tokens} <b>{verdict}</b></div>'


def _token(text: str, number: int) -> str:
    hue = max(_HUES[0] - _HUE_STEP * (number - 1), _HUES[1])
    shown = html.escape(text.replace("\n", "⏎"))
    return f'<span class="token" style="background:hsl({hue},55%,84%)">{shown}<sub>{number}</sub></span>'

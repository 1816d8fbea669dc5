"""Needles in haystacks: a made-up fact inside a text, and whether the model finds it again.

A question asks which of several values is the likeliest behind the text. So it measures retrieval also where a model is
too small to answer in words, and chance is known: 1 / number of choices.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_dllm.config.needle import NeedleConfig
from megatron_dllm.data.source import Source
from megatron_dllm.evaluation.continuations import Continuation
from megatron_dllm.evaluation.likelihood import Likelihood

_SYLLABLES = ("ba", "do", "fi", "ga", "ku", "le", "mo", "ni", "pa", "ro", "su", "ta", "vi", "zo")


@dataclass(frozen=True)
class Question:
    """A needle that has been hidden.

    Attributes:
        length: tokens of text, question and answer, at most.
        depth: of the needle.
        choices: the right value last, so that it does not win where all are equally likely.
    """

    length: int
    depth: float
    choices: tuple[Continuation, ...]


@dataclass(frozen=True)
class Cell:
    """What came of all needles of one length and depth.

    Attributes:
        accuracy: share of questions whose right value was the likeliest.
        nats: of the right value, mean; minus its log-likelihood.
        gain: nats by which the right value is likelier than the mean of the wrong ones.
    """

    length: int
    depth: float
    num_needles: int
    accuracy: float
    nats: float
    gain: float


def hide(config: NeedleConfig, source: Source, encode: Callable[[str], list[int]]) -> list[Question]:
    """Every question, in the order of lengths and depths.

    Args:
        config: validated.
        source: texts to hide needles in, one behind the other where one is too short.
        encode: tokens of a text.

    Raises:
        ValueError: needle and question do not fit a length.
    """
    questions: list[Question] = []
    for number in range(config.num_needles):
        for length in config.asked_lengths:
            for depth in config.depths:
                drawn = random.Random(f"{config.seed} {number} {length} {depth}")
                questions.append(_hide_one(config, source, encode, length, depth, drawn, len(questions)))
    return sorted(questions, key=lambda question: (question.length, question.depth))


def _hide_one(
    config: NeedleConfig,
    source: Source,
    encode: Callable[[str], list[int]],
    length: int,
    depth: float,
    drawn: random.Random,
    key: int,
) -> Question:
    name = "".join(drawn.sample(_SYLLABLES, 3)).capitalize()
    *wrong, right = drawn.sample(range(10_000, 100_000), config.num_choices)
    needle = encode(config.needle.format(name=name, value=right))
    question = encode(config.question.format(name=name))
    answers = [encode(config.answer.format(value=value)) for value in (*wrong, right)]
    num_text = length - len(needle) - len(question) - max(map(len, answers))
    if num_text < 0:
        raise ValueError(
            f"lengths ({length}) must hold the needle, its question and the answer, which take {length - num_text} "
            "tokens; give a longer one."
        )
    text, place = _text(source, num_text, drawn), round(depth * num_text)
    context = (*text[:place], *needle, *text[place:], *question)
    called = f"needle {name} at depth {depth:g} of {length}"
    return Question(length, depth, tuple(Continuation(context, tuple(ids), key, called) for ids in answers))


def _text(source: Source, num_tokens: int, drawn: random.Random) -> list[int]:
    """So many tokens of documents from a drawn one on."""
    lengths = source.document_lengths
    document, text = drawn.randrange(len(lengths)), list[int]()
    while len(text) < num_tokens:
        wanted = min(num_tokens - len(text), int(lengths[document]))
        text += source.read(document, 0, wanted).tolist()
        document = (document + 1) % len(lengths)
    return text


def cells_of(questions: Sequence[Question], found: Sequence[Sequence[Likelihood]]) -> list[Cell]:
    """The table of lengths and depths.

    Args:
        questions: in any order.
        found: the likelihoods of each one's choices.
    """
    groups: dict[tuple[int, float], list[list[float]]] = {}
    for question, likelihoods in zip(questions, found, strict=True):
        values = [likelihood.value for likelihood in likelihoods]
        groups.setdefault((question.length, question.depth), []).append(values)
    return [_cell(length, depth, rows) for (length, depth), rows in sorted(groups.items())]


def _cell(length: int, depth: float, rows: Sequence[Sequence[float]]) -> Cell:
    """Of the log-likelihoods of every question's choices, the right one last."""
    return Cell(
        length=length,
        depth=depth,
        num_needles=len(rows),
        accuracy=statistics.fmean(values[-1] > max(values[:-1]) for values in rows),
        nats=-statistics.fmean(values[-1] for values in rows),
        gain=statistics.fmean(values[-1] - float(np.mean(values[:-1])) for values in rows),
    )

"""Ask a model questions, many in the same passes, and count what its answers are worth."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from tokenizers import Tokenizer

from megatron_dllm.config import DecodingConfig
from megatron_dllm.config.study import SWEPT
from megatron_dllm.diffusion.decode import requests_of
from megatron_dllm.diffusion.generation import Generation
from megatron_dllm.evaluation.answer_scores import ShownAnswer, TaskScore
from megatron_dllm.evaluation.questions import Question
from megatron_dllm.evaluation.study_results import Point
from megatron_dllm.inference.decoder import Decoder


@dataclass(frozen=True)
class Answer:
    """What a model said to a question.

    Attributes:
        text: without special tokens.
        generation: its tokens, and the passes it took.
    """

    question: Question
    text: str
    generation: Generation

    @property
    def is_right(self) -> bool:
        """Whether it is right."""
        return self.question.is_right(self.text)

    def shown(self, tokenizer: Tokenizer) -> ShownAnswer:
        """The answer with the text of each token."""
        generation = self.generation
        texts = [tokenizer.decode([token], skip_special_tokens=False) for token in generation.generated_ids]
        return ShownAnswer(
            self.question.task, self.question.text, self.text, self.is_right, texts, generation.accepted_in_pass
        )


@dataclass(frozen=True)
class Decoded:
    """What one way of decoding made of all questions.

    Attributes:
        tasks: score of each task.
        generations: of all answers.
        seconds: of decoding them.
        answers: to questions of this program, in their order.
    """

    tasks: dict[str, TaskScore]
    generations: list[Generation]
    seconds: float
    answers: Sequence[Answer] = ()

    def joined(self, other: Decoded) -> Decoded:
        """Together with the questions of other tasks."""
        return Decoded(
            {**self.tasks, **other.tasks},
            [*self.generations, *other.generations],
            self.seconds + other.seconds,
            [*self.answers, *other.answers],
        )

    def point(self, block_size: int, config: DecodingConfig, expected_tokens_per_forward: float | None) -> Point:
        """The point of a study that decoded so."""
        return Point(
            block_size=block_size,
            rule=config.rule,
            value=getattr(config, SWEPT[config.rule][0]),
            tasks=self.tasks,
            num_commits=sum(generation.num_commit_forwards for generation in self.generations),
            median_tokens_per_forward=median(generation.tokens_per_forward for generation in self.generations),
            seconds=self.seconds,
            expected_tokens_per_forward=expected_tokens_per_forward,
        )


def decode_questions(
    decoder: Decoder,
    questions: Sequence[Question],
    prompts: Sequence[Sequence[int]],
    tokenizer: Tokenizer,
    config: DecodingConfig,
) -> Decoded:
    """Answers and their scores, on every rank (a collective).

    Args:
        decoder: of the model.
        questions: what is asked.
        prompts: token ids of each question.
        tokenizer: turns tokens into text.
        config: rule and length.
    """
    begun = time.perf_counter()
    generations = decoder.decode(requests_of(prompts, config), config)
    texts = [tokenizer.decode(found.generated_ids, skip_special_tokens=True) for found in generations]
    answers = [Answer(*parts) for parts in zip(questions, texts, generations, strict=True)]
    return Decoded(_scores(answers), generations, time.perf_counter() - begun, answers)


def _scores(answers: Sequence[Answer]) -> dict[str, TaskScore]:
    """The score of each task, by name."""
    groups: dict[str, list[Answer]] = defaultdict(list)
    for answer in answers:
        groups[answer.question.task].append(answer)
    return {name: _score(group) for name, group in sorted(groups.items())}


def _score(answers: Sequence[Answer]) -> TaskScore:
    return TaskScore(
        num_questions=len(answers),
        num_right=sum(answer.is_right for answer in answers),
        num_tokens=sum(len(answer.generation.generated_ids) for answer in answers),
        num_forwards=sum(answer.generation.num_denoising_forwards for answer in answers),
    )

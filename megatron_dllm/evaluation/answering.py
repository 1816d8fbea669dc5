"""Ask a model questions, many in the same passes, and count what its answers are worth."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer

from megatron_dllm.config import DecodingConfig
from megatron_dllm.diffusion.decode import DecodingContract, Forward, decode_together
from megatron_dllm.diffusion.generation import Generation
from megatron_dllm.evaluation.answer_scores import ShownAnswer, TaskScore
from megatron_dllm.evaluation.questions import Question


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


def answer_all(
    new_forward: Callable[[], Forward],
    questions: Sequence[Question],
    prompts: Sequence[Sequence[int]],
    tokenizer: Tokenizer,
    config: DecodingConfig,
    contract: DecodingContract,
    device: torch.device | str,
    batch_size: int,
) -> list[Answer]:
    """Answers in the order of the questions.

    Args:
        new_forward: gives the model with an empty cache.
        questions: what is asked.
        prompts: token ids of each question.
        tokenizer: turns tokens into text.
        config: threshold and length.
        contract: block grid, and the tokens that end an answer.
        device: of the model.
        batch_size: most questions in the same passes.
    """
    answers: dict[int, Answer] = {}
    for places in _batches(prompts, contract.block_size, batch_size):
        chosen = [prompts[place] for place in places]
        generations = decode_together(new_forward(), chosen, config, contract, device)
        for place, generation in zip(places, generations, strict=True):
            text = tokenizer.decode(generation.generated_ids, skip_special_tokens=True)
            answers[place] = Answer(questions[place], text, generation)
    return [answers[place] for place in range(len(questions))]


def _batches(prompts: Sequence[Sequence[int]], block_size: int, batch_size: int) -> Iterator[list[int]]:
    """Places of prompts that can be decoded together: with the same number of whole blocks."""
    groups: dict[int, list[int]] = defaultdict(list)
    for place, prompt in enumerate(prompts):
        groups[len(prompt) // block_size].append(place)
    for group in groups.values():
        for start in range(0, len(group), batch_size):
            yield group[start : start + batch_size]


def score(answers: Sequence[Answer]) -> dict[str, TaskScore]:
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

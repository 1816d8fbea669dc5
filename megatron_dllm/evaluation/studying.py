"""One checkpoint of a study: asked the same questions at every block size, rule and value of the rule's setting."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from tokenizers import Tokenizer

from megatron_dllm.config import DecodingConfig, ParallelConfig
from megatron_dllm.config.study import StudyConfig
from megatron_dllm.data.tokenizer import load_tokenizer
from megatron_dllm.diffusion.decode import DecodingContract
from megatron_dllm.evaluation.answering import Decoded, decode_questions
from megatron_dllm.evaluation.confidence import expected_tokens_per_forward, mean_block, predict_answers, table
from megatron_dllm.evaluation.questions import Question
from megatron_dllm.evaluation.study_results import Confidence, Point, Study
from megatron_dllm.hf.tokenizer_folder import TokenizerFiles
from megatron_dllm.inference.decoder import Decoder
from megatron_dllm.inference.load import load_model
from megatron_dllm.inference.prompts import chat_contract
from megatron_dllm.inference.source import CheckpointSource
from megatron_dllm.parallel.groups import Groups

if TYPE_CHECKING:
    from megatron_dllm.evaluation.harness.decoded_tasks import WrittenTasks

log = logging.getLogger("megatron_dllm.study")


@dataclass(frozen=True)
class Asked:
    """What one checkpoint is asked.

    Attributes:
        source: of its weights.
        prompts: tokens of each question.
        answers: tokens of the right answers, with the token that ends them.
        contract: how it is decoded, at the block size that it was trained with.
    """

    source: CheckpointSource
    prompts: list[list[int]]
    answers: list[list[int]]
    contract: DecodingContract

    @property
    def pairs(self) -> list[tuple[list[int], list[int]]]:
        """Each prompt with its answer."""
        return list(zip(self.prompts, self.answers, strict=True))


def study_checkpoint(
    config: StudyConfig,
    name: str,
    questions: Sequence[Question],
    asked: Asked,
    layout: ParallelConfig,
    groups: Groups,
    tasks: WrittenTasks | None,
) -> Study:
    """Load a checkpoint and decode with every block size and setting (a collective).

    Args:
        config: of the study.
        name: of the checkpoint.
        questions: with an answer that is known.
        asked: their tokens.
        layout: of the ranks.
        groups: of this rank.
        tasks: of lm-evaluation-harness; None: none.

    Raises:
        ValueError: weights are missing, or a task asks for what decoding cannot do.
    """
    model = load_model(asked.source, groups, config.precision, config.attention_backend, layout)
    tokenizer = load_tokenizer(TokenizerFiles(asked.source.tokenizer))
    points: list[Point] = []
    confidence: list[Confidence] = []
    for size in config.block_sizes or [asked.contract.block_size]:
        decoder = Decoder(model, groups, replace(asked.contract, block_size=size), config.batch_size)
        rows = _confidence(config, asked, decoder)
        confidence += rows
        for setting in config.settings():
            decoded = _decode(decoder, tokenizer, questions, asked, setting, tasks)
            points.append(decoded.point(size, setting, _expected(asked, decoder, setting, rows)))
            log.info("%s, block %d, %s", name, size, _label(points[-1]))
    conditions = ", ".join([*_asked(config, asked, tasks), *_machine(config, decoder, layout)])
    return Study(name, conditions, points, confidence)


def _decode(
    decoder: Decoder,
    tokenizer: Tokenizer,
    questions: Sequence[Question],
    asked: Asked,
    setting: DecodingConfig,
    tasks: WrittenTasks | None,
) -> Decoded:
    """All questions and tasks in one way."""
    found = decode_questions(decoder, questions, asked.prompts, tokenizer, setting)
    if tasks is None:
        return found
    # Imported where the package is known to be there.
    from megatron_dllm.evaluation.harness.requests import Encoder

    model = asked.source.model
    encoder = Encoder.load(asked.source.tokenizer, model.mask_token_id, model.eos_token_id)
    contract = replace(asked.source.contract, block_size=decoder.contract.block_size)
    if tasks.config.apply_chat_template:
        encoder.check_chats()
        assert encoder.template is not None, "as has been checked"
        contract = chat_contract(contract, encoder.template)
    return found.joined(tasks.decode(replace(decoder, contract=contract), encoder, setting))


def _confidence(config: StudyConfig, asked: Asked, decoder: Decoder) -> list[Confidence]:
    found = predict_answers(*decoder.passes(), asked.pairs, decoder.contract, decoder.device)
    return [row for threshold in config.thresholds for row in table(found, decoder.contract.block_size, threshold)]


def _expected(asked: Asked, decoder: Decoder, setting: DecodingConfig, rows: Sequence[Confidence]) -> float | None:
    """Tokens per forward by the shares of sure predictions; None where no answer is known, or of another rule."""
    if setting.rule != "threshold" or not asked.answers:
        return None
    length = mean_block(asked.pairs, decoder.contract)
    return expected_tokens_per_forward([row for row in rows if row.threshold == setting.threshold], length)


def _asked(config: StudyConfig, asked: Asked, tasks: WrittenTasks | None) -> list[str]:
    """What was asked, in words."""
    told = [asked.source.folder.name]
    if asked.prompts:
        told.append(
            f"{len(asked.prompts)} questions" + ("" if config.chats_file is None else f" of {config.chats_file}")
        )
    if tasks is not None:
        examples = "as many examples as they say" if config.num_fewshot is None else f"{config.num_fewshot} examples"
        form = "chats" if config.apply_chat_template else "texts"
        told.append(f"{tasks.limit} each of {' and '.join(tasks.names)} as {form} behind {examples}")
        if by := sorted({*tasks.filters.values()} - {"none"}):
            told.append(f"answers by {' and '.join(by)}")
    return told


def _machine(config: StudyConfig, decoder: Decoder, layout: ParallelConfig) -> list[str]:
    """How it was decoded, in words."""
    length, batch = f"at most {config.max_new_tokens} tokens", f"batch {config.batch_size}"
    return [length, batch, decoder.device.type, layout.precision, f"{decoder.groups.world.size()} ranks"]


def _label(point: Point) -> str:
    return (
        f"{point.rule} {point.value:g}: {point.accuracy:.3f} right, {point.tokens_per_forward:.2f} tokens per forward"
    )

"""The same short fine-tuning behind every conversion of a study, and what its answers are worth.

Whatever mask a model was converted with, it learns chats under the mask that a server computes, as `schedule=sft` does:
two complementary views, in blocks of the study's size. It is then asked held-out questions of the same tasks.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.guided_runs import LEARNING_RATE, TARGET
from benchmarks.study_corpus import CHATS, CONTEXT_LENGTH, QUESTIONS
from benchmarks.study_jobs import command, run
from megatron_dllm.config import SftConfig, StageConfig, TrainConfig
from megatron_dllm.evaluation.answer_scores import read_answer_scores

THRESHOLD = 0.9
SHARE = 0.4  # of the document tokens of the study
_VIEWS, _ROWS = 2, 2


@dataclass(frozen=True)
class Answers:
    """What held-out questions came to.

    Attributes:
        accuracy: share of right answers.
        tokens_per_forward: accepted in a pass, at THRESHOLD.
    """

    accuracy: float
    tokens_per_forward: float


def fine_tuning(converted: TrainConfig, num_tokens: int) -> TrainConfig:
    """The run that teaches chats to a converted model.

    Args:
        converted: the run of its conversion.
        num_tokens: document tokens of the study, of which the chats get SHARE.
    """
    stage = StageConfig(
        block_size=TARGET,
        num_tokens=round(SHARE * num_tokens),
        global_batch_size=_ROWS,
        micro_batch_size=_ROWS,
        learning_rate=LEARNING_RATE,
        lr_warmup_share=0.05,
        lr_shape="cosine",
        final_learning_rate=LEARNING_RATE / 10,
        loss_weight="uniform",
        num_views=_VIEWS,
        view_relation="complementary",
        sft=SftConfig(),
    )
    folder = Path(converted.run.root)
    return replace(
        converted,
        run=replace(converted.run, name=f"{converted.run.name}_sft"),
        data=replace(converted.data, train=str(folder.parent / CHATS), validation=None),
        schedule=replace(converted.schedule, row_length=(_VIEWS + 1) * CONTEXT_LENGTH, stages={"sft": stage}),
        training=replace(converted.training, mask_embedding_noise=0.0),
        checkpoint=replace(converted.checkpoint, load=str(folder / converted.run.name)),
        evaluation=replace(converted.evaluation, num_tokens=0, with_ar=False),
    )


def answers_of(converted: TrainConfig, num_tokens: int) -> Answers:
    """Teach chats to a converted model, and ask it; what is there is not repeated."""
    taught = fine_tuning(converted, num_tokens)
    output = Path(taught.run.root) / taught.run.name / "answers.json"
    if not output.is_file():
        run(taught)
        questions = Path(taught.run.root).parent / QUESTIONS
        words = ["--checkpoint", str(output.parent), "--chats", str(questions), "--output", str(output)]
        command("megatron_dllm.evaluation.answers", *words, "--thresholds", str(THRESHOLD))
    score = read_answer_scores(output).at(THRESHOLD)
    assert score is not None, f"{output} was made with {THRESHOLD}"
    return Answers(score.accuracy, score.tokens_per_forward)

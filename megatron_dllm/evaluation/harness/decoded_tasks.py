"""Tasks of lm-evaluation-harness whose answers are written, decoded in one way: how many are right, and how fast."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from megatron_dllm.config import DecodingConfig
from megatron_dllm.config.asking import AskingConfig
from megatron_dllm.diffusion.generation import Generation
from megatron_dllm.evaluation.answer_scores import TaskScore
from megatron_dllm.evaluation.answering import Decoded
from megatron_dllm.evaluation.harness.asking import ask
from megatron_dllm.evaluation.harness.requests import Encoder
from megatron_dllm.evaluation.harness.tasks import check_tasks, chosen_filter, leaves, load_tasks, writing_tasks
from megatron_dllm.evaluation.harness.text_model import TextModel
from megatron_dllm.evaluation.harness.writing import Writer
from megatron_dllm.inference.decoder import Decoder

_RIGHT, _WRONG = 1.0, 0.0


@dataclass(frozen=True)
class WrittenTasks:
    """Tasks that have a model write texts.

    Attributes:
        names: as they were given.
        tasks: loaded.
        config: how they are asked.
        limit: questions of each.
        filters: by task, the name of the filter whose answers count.
    """

    names: Sequence[str]
    tasks: Sequence[Any]
    config: AskingConfig
    limit: int
    filters: Mapping[str, str]

    @classmethod
    def load(cls, names: Sequence[str], config: AskingConfig, limit: int, wanted: str | None = None) -> WrittenTasks:
        """Look up tasks and their data.

        Args:
            names: of tasks, or files.
            config: how they are asked.
            limit: questions of each.
            wanted: name of the filter whose answers count; None: the first of each task.

        Raises:
            ValueError: a task is unknown or its data are not here; it scores given choices, runs programs, or has no
                such filter.
        """
        tasks = load_tasks(names, config.include_path)
        check_tasks(tasks, why_not_write=None, has_confirmed=config.confirm_unsafe_code)
        written = writing_tasks(tasks)
        for task in leaves(tasks):
            if task.task_name not in written:
                raise ValueError(
                    f"tasks ({task.task_name}) scores given texts, which no way of decoding changes; ask it with "
                    "megatron_dllm.harness."
                )
        filters = {str(task.task_name): chosen_filter(task, wanted) for task in leaves(tasks)}
        return cls(names, tasks, config, limit, filters)

    def decode(self, decoder: Decoder, encoder: Encoder, setting: DecodingConfig) -> Decoded:
        """Ask all of them, decoded in one way (a collective); every rank hears the scores.

        Raises:
            ValueError: a task has no metric that says right or wrong, or asks for what decoding cannot do.
        """
        model = TextModel(encoder, Writer(decoder, setting, encoder, may_cut=False))
        found = ask(model, self.tasks, self.config, limit=self.limit)
        shared: list[Any] = [None if found is None else found["samples"]]
        dist.broadcast_object_list(shared, src=0, group=decoder.groups.world)
        by_task: dict[str, list[Generation]] = defaultdict(list)
        for task, generation in model.written:
            by_task[task].append(generation)
        scores = task_scores(shared[0], by_task, self.filters)
        return Decoded(scores, [generation for _, generation in model.written], model.seconds)


def task_scores(
    samples: Mapping[str, Sequence[Mapping[str, Any]]],
    written: Mapping[str, Sequence[Generation]],
    filters: Mapping[str, str],
) -> dict[str, TaskScore]:
    """How the questions of each task were answered.

    Args:
        samples: what the harness says of every question: by task, with `filter`, `metrics` and a value for each.
        written: texts of each task.
        filters: by task, whose answers count.

    Raises:
        ValueError: none of a task's metrics says right or wrong.
    """
    return {task: _score(task, samples[task], texts, filters[task]) for task, texts in written.items()}


def _score(task: str, samples: Sequence[Mapping[str, Any]], texts: Sequence[Generation], wanted: str) -> TaskScore:
    taken = [sample for sample in samples if sample["filter"] == wanted]
    metric = _right_or_wrong(task, taken)
    return TaskScore(
        num_questions=len(taken),
        num_right=sum(float(sample[metric]) == _RIGHT for sample in taken),
        num_tokens=sum(len(text.generated_ids) for text in texts),
        num_forwards=sum(text.num_denoising_forwards for text in texts),
    )


def _right_or_wrong(task: str, samples: Sequence[Mapping[str, Any]]) -> str:
    """The first metric that is 0 or 1 for every question."""
    names: list[str] = list(samples[0]["metrics"])
    for name in names:
        if all(isinstance(sample[name], int | float) and sample[name] in (_RIGHT, _WRONG) for sample in samples):
            return name
    raise ValueError(
        f"tasks ({task}) has no metric that says right or wrong ({', '.join(names)}), which a study counts; ask it "
        "with megatron_dllm.harness."
    )

"""The pass before a step that learns from a second model: what it says of the step's targets and tokens.

1 show   every token of the rows once, true and unmasked, as the AR model reads it (`data.true_rows`)
2 run    the teacher on them, without gradients
3 keep   its last states before the targets, which the student's head turns into probabilities chunk by chunk, and
         those behind the layers that are aligned
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from megatron_dllm.data.batch import Batch
from megatron_dllm.data.true_rows import true_rows
from megatron_dllm.evaluation.scores import evaluating
from megatron_dllm.model.alignment import Alignment, TaughtStates
from megatron_dllm.model.asked import Asked, Taught
from megatron_dllm.model.distillation import Teacher
from megatron_dllm.model.objective import Objective
from megatron_dllm.model.pipeline import run_batches
from megatron_dllm.training.frozen import FrozenModel


def teach(model: FrozenModel | None, micro_batches: Sequence[Batch], objective: Objective) -> Iterable[Taught] | None:
    """What a second model says of a global batch (a collective).

    Args:
        model: the teacher.
        micro_batches: this data-parallel rank's, of whole rows.
        objective: of the step.

    Returns:
        Of each micro-batch what it says on this rank; None where no second model teaches. Without pipeline stages each
        is said when it is asked for, just before the step needs it, and its states are let go of when the next one
        is; a pipeline has several micro-batches under way, so there everything is said before the step.
    """
    if not objective.has_second_teacher:
        return None
    assert model is not None, "the start has loaded the teacher"
    if model.groups.pipeline.size() > 1:
        return _said_of(model, micro_batches, objective)
    return _one_by_one(model, micro_batches, objective)


def _one_by_one(model: FrozenModel, micro_batches: Sequence[Batch], objective: Objective) -> Iterator[Taught]:
    before = Taught()
    for batch in micro_batches:
        # What else holds them, as the graph of the micro-batch before does, may live on.
        if before.states is not None:
            before.states.by_layer.clear()
        (before,) = _said_of(model, [batch], objective)
        yield before


@torch.no_grad()
def _said_of(model: FrozenModel, micro_batches: Sequence[Batch], objective: Objective) -> list[Taught]:
    """What it says of these micro-batches (a collective)."""
    asked = [_asked_of(model, objective) for _ in micro_batches]
    shown = [true_rows(batch, objective.shift) for batch in micro_batches]
    with evaluating(model.chunks):
        found = run_batches(
            model.chunks,
            shown,
            model.device,
            model.groups,
            _keep,
            forward_only=True,
            asked=asked,
            students=micro_batches,
        )
    teachers = found or [None] * len(micro_batches)
    states = [None if item.alignment is None else item.alignment.taught for item in asked]
    return [Taught(*said) for said in zip(teachers, states, strict=True)]


def _asked_of(model: FrozenModel, objective: Objective) -> Asked:
    """What the teacher is asked of a micro-batch: what its rules do not ask of the model's own clean tokens."""
    rule, distill = objective.alignment, objective.distill
    config: Any = model.chunks[0].config
    alignment = None
    if rule is not None and not rule.is_own:
        alignment = Alignment.empty(rule, config.num_layers, model.device, TaughtStates())
    return Asked(alignment, None if distill is None or distill.is_own else distill)


def _keep(_: Batch, output: Any) -> tuple[Tensor, Tensor, Teacher | None]:
    """The teacher of the targets, if it was asked, as megatron-core wants a loss function."""
    teacher = output if isinstance(output, Teacher) else None
    nothing = (output if teacher is None else teacher.states).new_zeros(())
    return nothing, nothing.int(), teacher

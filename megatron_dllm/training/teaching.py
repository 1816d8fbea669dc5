"""The pass before a step that is distilled from a second model: what it says of the step's targets.

1 show   every token of the rows once, true and unmasked, as the AR model reads it (`data.true_rows`)
2 run    the teacher on them, without gradients
3 keep   its last states before the targets; the student's head turns them into probabilities, chunk by chunk
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from megatron_dllm.data.batch import Batch
from megatron_dllm.data.true_rows import true_rows
from megatron_dllm.diffusion.losses.distillation import DistillRule
from megatron_dllm.evaluation.scores import evaluating
from megatron_dllm.model.asked import Asked
from megatron_dllm.model.distillation import Teacher
from megatron_dllm.model.pipeline import run_batches
from megatron_dllm.training.frozen import FrozenModel


@torch.no_grad()
def teach(
    model: FrozenModel | None, micro_batches: Sequence[Batch], rule: DistillRule | None
) -> Sequence[Teacher | None] | None:
    """What a second model says of the targets of a global batch (a collective).

    Args:
        model: the teacher.
        micro_batches: this data-parallel rank's, of whole rows.
        rule: of the distillation.

    Returns:
        One of each micro-batch, None of each except on the last pipeline stage; None where no second model teaches.
    """
    if rule is None or rule.is_own:
        return None
    assert model is not None, "the start has loaded the teacher"
    asked = [Asked(distill=rule, students=batch) for batch in micro_batches]
    shown = [true_rows(batch, rule.shift) for batch in micro_batches]
    with evaluating(model.chunks):
        found = run_batches(model.chunks, shown, model.device, model.groups, _keep, forward_only=True, asked=asked)
    return found or [None] * len(micro_batches)


def _keep(_: Batch, teacher: Any) -> tuple[torch.Tensor, torch.Tensor, Teacher]:
    """The teacher, as megatron-core wants a loss function."""
    nothing = teacher.states.new_zeros(())
    return nothing, nothing.int(), teacher

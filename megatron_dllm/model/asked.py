"""What a micro-batch is asked for beside the NLL of its targets."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_dllm.data.batch import Batch
from megatron_dllm.diffusion.losses.distillation import DistillRule
from megatron_dllm.model.alignment import Alignment, TaughtStates
from megatron_dllm.model.distillation import Teacher


@dataclass(frozen=True)
class Asked:
    """Of one micro-batch, or of this context rank's part of it.

    Attributes:
        alignment: of the states behind each layer.
        distill: the targets are compared with a teacher.
        teacher: what a second model says of them; None: the model's own clean tokens teach.
        students: the model teaches these rows, whose slots are those of the micro-batch: what is wanted are the final
            states before their targets (`distill`), and those behind the layers (`alignment`).
    """

    alignment: Alignment | None = None
    distill: DistillRule | None = None
    teacher: Teacher | None = None
    students: Batch | None = None

    @property
    def needs_all_outputs(self) -> bool:
        """Whether outputs of tokens without a loss are read too."""
        is_own_teacher = self.distill is not None and self.teacher is None
        return self.alignment is not None or is_own_teacher or self.students is not None


@dataclass(frozen=True)
class Taught:
    """What a second model says of a micro-batch, on this rank.

    Attributes:
        teacher: of its targets; None before the last pipeline stage, and where it is not asked.
        states: of its tokens behind the layers here; None where they are not asked.
    """

    teacher: Teacher | None = None
    states: TaughtStates | None = None


NOTHING = Asked()

"""Distillation of a stage from an autoregressive teacher, and the second model that may be one."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron_dllm.config.rules import check, check_choice

if TYPE_CHECKING:
    from megatron_dllm.config.schedule import StageConfig

CLEAN, TEACHER = SOURCES = ("clean", "teacher")


@dataclass
class TeacherConfig:
    """A second model that stays as it is, beside the one that is trained, on the same layout and in its precision."""

    # Folder of an autoregressive checkpoint of the same model sizes; null: none. It costs its weights in memory and a
    # forward pass of it in every step of a stage that is distilled from it.
    checkpoint: str | None = None


@dataclass
class DistillConfig:
    """Distillation (after OPDLM, arXiv 2606.06712): a masked token is predicted as an AR model would predict it.

    The loss of a target is KL(teacher || model), where the teacher has read the true tokens before the target alone.
    """

    # What the KL of a target is multiplied by, next to its NLL and with the same loss weight; 0 turns the method off.
    weight: float = 0.0
    # Who teaches. clean: the model's own clean copy, without gradient, in clean blocks of 1; teacher: the model of
    # teacher.checkpoint.
    source: str = CLEAN
    # Tell apart the teacher's so many likeliest tokens alone and count all others as one; null: the whole vocabulary.
    top_k: int | None = None

    def validate(self, prefix: str, stage: StageConfig) -> None:
        """Raise ValueError for an impossible value.

        Args:
            prefix: name of the stage in messages.
            stage: whose settings these are.
        """
        key = f"{prefix}.distill"
        check_choice(f"{key}.source", self.source, SOURCES)
        check(
            math.isfinite(self.weight) and self.weight >= 0.0,
            f"{key}.weight ({self.weight}) must not be negative; 0 turns the distillation off.",
        )
        check(
            self.top_k is None or self.top_k > 0,
            f"{key}.top_k ({self.top_k}) must be positive; null is the whole vocabulary.",
        )
        if self.weight == 0.0:
            return
        given = f"{key}.weight ({self.weight:g})"
        check(
            stage.objective == "block_diffusion",
            f"{given} needs the block_diffusion objective, and the stage's is {stage.objective}; set it to 0.",
        )
        check(
            self.source == TEACHER or stage.clean_grid == 1,
            f"{given} with source clean needs {prefix}.clean_block_size 1, as in larger clean blocks a token is seen "
            f"before it is predicted ({stage.clean_grid}); set it to 1, or take source teacher.",
        )
        check(
            stage.cap.coefficient == 0.0,
            f"{given} needs {prefix}.cap.coefficient 0 ({stage.cap.coefficient:g}): one draws the model to a teacher, "
            "the other to certainty; train the one after the other.",
        )
        check(
            stage.preference is None,
            f"{given} needs a loss of tokens, and {prefix}.preference compares answers; set it to 0.",
        )

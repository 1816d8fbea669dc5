"""Where a run is: all that a checkpoint restores besides weights and optimizer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from megatron_dllm.data.loader import GlobalStep
from megatron_dllm.training.step import StepResult


@dataclass(frozen=True)
class RunState:
    """The position of a run after some steps; state.json holds these fields.

    Attributes:
        step: steps made, skipped ones too.
        optimizer_step: steps applied.
        consumed_tokens: document tokens of the corpus.
        stream: position of the row sequence, see `BlendStream.state_dict`.
        grad_norms: of the last steps applied in this stage: the next stage's noise gives other norms.
        num_skipped: steps skipped in a row, up to now.
        blends: by stage, the share of each corpus in the document tokens, by the corpus's fingerprint.
        stage_step: steps made in the stage, skipped ones too; checkpoints of earlier versions do not say.
        reference: fingerprint of the checkpoint that preferences are compared with, of the last start that had any;
            "" where none had.
        teacher: that of the second model that stages learn from, in the same way.
    """

    step: int = 0
    optimizer_step: int = 0
    consumed_tokens: int = 0
    stream: dict[str, Any] = field(default_factory=dict)
    grad_norms: list[float] = field(default_factory=list)
    num_skipped: int = 0
    blends: dict[str, dict[str, float]] = field(default_factory=dict)
    reference: str = ""
    teacher: str = ""
    stage_step: int = 0

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> RunState:
        """What state.json says; fields that an earlier version did not write take their defaults."""
        return cls(**{item.name: content[item.name] for item in fields(cls) if item.name in content})

    def beside(self, reference: str, teacher: str) -> RunState:
        """The state of a run that goes on with these second models; "" for one that this start does without.

        What the run has learned from is remembered where no stage needs it any more: one that comes later might.
        """
        return replace(self, reference=reference or self.reference, teacher=teacher or self.teacher)

    def after(self, step: GlobalStep, result: StepResult, window: int, is_stage_end: bool) -> RunState:
        """The state behind one more step.

        Args:
            step: the rows it read.
            result: what came of it.
            window: gradient norms to keep.
            is_stage_end: whether it has finished its stage.
        """
        norms = [*self.grad_norms, result.grad_norm][-window:] if result.is_applied else self.grad_norms
        return replace(
            self,
            step=self.step + 1,
            optimizer_step=self.optimizer_step + int(result.is_applied),
            consumed_tokens=self.consumed_tokens + step.num_document_tokens,
            stream=step.stream_state,
            grad_norms=[] if is_stage_end else norms,
            num_skipped=0 if result.is_applied else self.num_skipped + 1,
            stage_step=0 if is_stage_end else self.stage_step + 1,
        )

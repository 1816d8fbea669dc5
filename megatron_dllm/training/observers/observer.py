"""What an observer is: it is shown values and changes nothing that training reads."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from megatron_dllm.data.batch import Batch
from megatron_dllm.diffusion.block_schedule import Stage
from megatron_dllm.training.reports import StepReport, ValidationReport

Watch = Callable[[Batch], None]


class Observer:
    """Does nothing; an observer overrides what it wants to see.

    The loop calls every method on every rank, and the observers in the same order, so a method may be a collective.
    """

    def around_step(self, is_logged: bool) -> AbstractContextManager[Watch | None]:
        """Entered before a step and left after it.

        It may give a function that is told each micro-batch before its forward pass.
        """
        return nullcontext()

    def measure(self, report: StepReport) -> dict[str, Any]:
        """What to add to the record of a step that is logged."""
        return {}

    def after_step(self, report: StepReport, measured: Mapping[str, Any]) -> None:
        """Told of every step, also a skipped one.

        Args:
            report: the step.
            measured: what all observers have measured; empty unless it is logged.
        """

    def after_withheld_step(self, report: StepReport) -> None:
        """Told of a step whose update was withheld, before the run goes on or stops."""

    def before_save(self, step: int) -> None:
        """Told that a checkpoint is about to be written after so many steps."""

    def after_save(self, folder: Path) -> None:
        """Told that a checkpoint was written, or is being written in the background, to this folder."""

    def before_validation(self, stage: Stage) -> None:
        """Told that a validation begins."""

    def after_validation(self, report: ValidationReport) -> None:
        """Told what a validation came to, before that is written beside the checkpoint."""

    def close(self) -> None:
        """Told that the run has ended, also by an error."""

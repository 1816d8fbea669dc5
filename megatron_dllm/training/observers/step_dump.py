"""Keeps the batch of a step that was not applied, for `python -m megatron_dllm.replay`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from megatron_dllm.config import TrainConfig
from megatron_dllm.parallel.groups import Groups
from megatron_dllm.training.observers.observer import Observer
from megatron_dllm.training.replay import dump_step
from megatron_dllm.training.reports import StepReport


@dataclass(frozen=True)
class StepDump(Observer):
    """Writes RUN/replay/step_N.

    Attributes:
        run_folder: folder of the run.
        config: as the run was started.
        groups: of this rank.
        write: of tensors by name, and a path.
    """

    run_folder: Path
    config: TrainConfig
    groups: Groups
    write: Callable[[dict[str, Any], str], None] = save_file

    def after_withheld_step(self, report: StepReport) -> None:
        """Write the rows of all ranks (a collective)."""
        record = {
            "stage": report.stage.name,
            "stage_step": report.stage_step,
            "reason": report.result.reason,
            "loss": report.result.loss,
            "grad_norm": report.result.grad_norm,
            "embedding_noise": asdict(report.embedding_noise),
            "config": asdict(self.config),
        }
        dump_step(self.run_folder, report.index, report.result.micro_batches, record, self.groups, self.write)

"""Validation inside a run: of the live weights, interruptible, told to the observers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from megatron_dllm.checkpoint.validation import Validation
from megatron_dllm.config import TrainConfig
from megatron_dllm.data.source import Source
from megatron_dllm.diffusion.block_schedule import Stage
from megatron_dllm.evaluation.elbo import EvaluationStopped, evaluate, validation_names
from megatron_dllm.parallel.agreement import failing_together
from megatron_dllm.training.engine import Engine
from megatron_dllm.training.observers.observer import Observer
from megatron_dllm.training.reports import ValidationReport
from megatron_dllm.training.run_state import RunState
from megatron_dllm.training.stop import StopRequest


@dataclass(frozen=True)
class Validator:
    """Measures the model on held-out documents.

    Attributes:
        config: of the run.
        engine: whose weights are measured.
        corpus: held-out documents.
        device: where to compute.
        stop: asked between batches.
        observers: told before and after.
    """

    config: TrainConfig
    engine: Engine
    corpus: Source
    device: torch.device
    stop: StopRequest
    observers: Sequence[Observer]

    def validate(self, stage: Stage, state: RunState, is_stage_end: bool) -> Validation | None:
        """Measure at the target block size, at a stage's end at all of them; AR models by their exact NLL.

        Returns:
            What came of it; None where the run was asked to stop, before or meanwhile: a job that is asked to stop
            has a grace period, which a validation may exceed.
        """
        names = validation_names(self.config, stage.config)[: None if is_stage_end else 1]
        for observer in self.observers:
            observer.before_validation(stage)
        try:
            result = evaluate(
                self.engine.chunks,
                self.config,
                self.engine.groups,
                self.corpus,
                names,
                self.device,
                lambda: self.stop.agreed(self.device),
                stage.config.sft,
                stage.config.is_shifted,
            )
        except EvaluationStopped:
            return None
        report = ValidationReport(stage, state.step, state.consumed_tokens, is_stage_end, result)
        with failing_together():
            for observer in self.observers:
                observer.after_validation(report)
        return result

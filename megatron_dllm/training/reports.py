"""What a run says of itself: the values that observers are shown."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_dllm.checkpoint.validation import Validation
from megatron_dllm.data.batch import Batch
from megatron_dllm.diffusion.block_schedule import Stage
from megatron_dllm.model.pipeline import EmbeddingNoise
from megatron_dllm.training.step import StepResult


@dataclass(frozen=True)
class StepReport:
    """One step, applied or not.

    Attributes:
        stage: that it belongs to.
        index: steps of the run before it.
        consumed_tokens: document tokens of the run, with this step's.
        learning_rate: of the step.
        result: loss, gradient norm and sums over the global batch.
        embedding_noise: on the embeddings of masked tokens.
        micro_batches: of this data-parallel rank, whole rows.
        num_document_tokens: of the global batch.
        num_forward_tokens: of the global batch: tokens the model saw, padding apart.
        stream_state: position of the row sequence behind the step, see `BlendStream.state_dict`.
        seconds: from asking for its rows to the update.
        is_logged: whether a record is written of it.
        stage_step: steps of the stage before it.
    """

    stage: Stage
    index: int
    consumed_tokens: int
    learning_rate: float
    result: StepResult
    embedding_noise: EmbeddingNoise
    micro_batches: list[Batch]
    num_document_tokens: int
    num_forward_tokens: int
    stream_state: Mapping[str, Any]
    seconds: float
    is_logged: bool
    stage_step: int = 0

    @property
    def step(self) -> int:
        """Steps of the run, with this one."""
        return self.index + 1


@dataclass(frozen=True)
class ValidationReport:
    """One validation: where the run stood, and what came of it."""

    stage: Stage
    step: int
    consumed_tokens: int
    is_stage_end: bool
    validation: Validation

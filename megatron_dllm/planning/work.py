"""What is to be trained, as the planner sees it: the stages of a run with their tokens and what their rows hold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from megatron_dllm.config import StageConfig, TrainConfig
from megatron_dllm.config.assumptions import AssumptionsConfig
from megatron_dllm.data.geometry import RowGeometry
from megatron_dllm.planning.rows import RowContent, assumed_row


@dataclass(frozen=True)
class StageWork:
    """A stage of the schedule.

    Attributes:
        name: in the schedule.
        config: of the stage.
        row: what its rows hold.
        num_tokens: document tokens; None where they are counted in epochs of a corpus that was not given.
    """

    name: str
    config: StageConfig
    row: RowContent
    num_tokens: int | None

    @property
    def tokens_per_step(self) -> float:
        """Document tokens of a global batch."""
        return self.config.global_batch_size * self.row.document_tokens


def assumed_work(config: TrainConfig, assumptions: AssumptionsConfig) -> tuple[StageWork, ...]:
    """The stages where no corpus is given: every document as long as is assumed."""
    length = assumptions.document_length or config.schedule.context_length
    return tuple(
        StageWork(
            name,
            stage,
            assumed_row(RowGeometry.of_stage(stage, config.schedule, config.data), stage, length),
            stage.num_tokens,
        )
        for name, stage in config.schedule.stages.items()
    )


def with_micro_batch(work: Sequence[StageWork], rows: int) -> tuple[StageWork, ...]:
    """The same stages with so many rows in a micro-batch."""
    return tuple(replace(stage, config=replace(stage.config, micro_batch_size=rows)) for stage in work)

"""A run on one layout: whether it fits, on which rank it is tightest, and how long each stage takes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from megatron_dllm.config import ModelConfig, OptimizerConfig, ParallelConfig, TrainingConfig
from megatron_dllm.planning.answer import RankMemory
from megatron_dllm.planning.memory import rank_memory
from megatron_dllm.planning.micro_batch import MicroBatch, micro_batch_of
from megatron_dllm.planning.parameters import PipelineRank, Weights, pipeline_ranks, rank_weights
from megatron_dllm.planning.timing import Machine, StepTime, distinct_ranks, micro_batch_time, step_time
from megatron_dllm.planning.work import StageWork

_GIGA = 10**9
_SECONDS_PER_HOUR = 3600.0


@dataclass(frozen=True)
class Setting:
    """What a plan is made for, whatever the layout.

    Attributes:
        model: sizes.
        training: how it is trained.
        optimizer: what travels while the model computes, and what lies on the host.
        machine: what executes it.
        num_models: that lie in memory; 2 with a frozen one beside the one that is trained.
    """

    model: ModelConfig
    training: TrainingConfig
    optimizer: OptimizerConfig
    machine: Machine
    num_models: int = 1

    @property
    def capacity(self) -> int:
        """Bytes of a GPU."""
        return round(self.machine.hardware.memory_gb * _GIGA)

    @property
    def limit(self) -> int:
        """Bytes that a plan may need."""
        return round(self.capacity * self.machine.assumptions.memory_limit)

    @property
    def reserve(self) -> int:
        """Bytes of a GPU that tensors cannot have."""
        return round(self.machine.assumptions.reserve_gb * _GIGA)


@dataclass(frozen=True)
class Candidate:
    """A way to run the stages.

    Attributes:
        layout: parallel sizes and recomputation.
        num_gpus: of the run.
        rows: of a micro-batch; None: what each stage says.
    """

    layout: ParallelConfig
    num_gpus: int
    rows: int | None = None


@dataclass(frozen=True)
class StagePlan:
    """A stage of the schedule on its layout.

    Attributes:
        work: the stage.
        candidate: how it runs.
        memory: of every pipeline rank.
        num_parameters: elements of the weights of every pipeline rank.
        time: of a step.
    """

    work: StageWork
    candidate: Candidate
    memory: tuple[RankMemory, ...]
    num_parameters: tuple[int, ...]
    time: StepTime

    @property
    def worst(self) -> RankMemory:
        """Of the rank that needs the most."""
        return max(self.memory, key=lambda memory: memory.total)

    @property
    def tokens_per_second(self) -> float:
        """Document tokens of all GPUs together."""
        return self.work.tokens_per_step / self.time.total

    @property
    def hours(self) -> float | None:
        """Time of the stage; None where its tokens are not known."""
        tokens = self.work.num_tokens
        return None if tokens is None else tokens / self.tokens_per_second / _SECONDS_PER_HOUR

    @property
    def gpu_hours(self) -> float | None:
        """Time of all GPUs together."""
        return None if self.hours is None else self.hours * self.candidate.num_gpus


def plan_stage(setting: Setting, work: StageWork, candidate: Candidate) -> StagePlan:
    """A stage on a layout that `TrainConfig.validate` accepts."""
    ranks = pipeline_ranks(setting.model, candidate.layout)
    weights = {rank: rank_weights(setting.model, candidate.layout, rank) for rank in ranks}
    batch = batch_of(setting, work, candidate)
    return StagePlan(
        work=work,
        candidate=candidate,
        memory=memory_of(setting, candidate, batch, weights),
        num_parameters=tuple(held.total for held in weights.values()),
        time=time_of(setting, candidate, batch, weights),
    )


def batch_of(setting: Setting, work: StageWork, candidate: Candidate) -> MicroBatch:
    """A micro-batch of a stage on a layout."""
    return micro_batch_of(
        setting.model,
        candidate.layout,
        work.config,
        work.row,
        candidate.num_gpus,
        setting.machine.assumptions.expert_imbalance,
        setting.training,
        candidate.rows,
        setting.num_models,
    )


def memory_of(
    setting: Setting, candidate: Candidate, batch: MicroBatch, weights: Mapping[PipelineRank, Weights]
) -> tuple[RankMemory, ...]:
    """Memory of the pipeline ranks whose weights are given."""
    model, layout, reserve = setting.model, candidate.layout, setting.reserve
    return tuple(
        rank_memory(
            model, layout, rank, batch, candidate.num_gpus, reserve, held, setting.optimizer, setting.num_models
        )
        for rank, held in weights.items()
    )


def time_of(
    setting: Setting, candidate: Candidate, batch: MicroBatch, weights: dict[PipelineRank, Weights]
) -> StepTime:
    """Seconds of a step, with the weights of all pipeline ranks."""
    ranks = distinct_ranks(tuple(weights))
    return step_time(
        setting.model, candidate.layout, ranks, batch, setting.machine, candidate.num_gpus, setting.optimizer, weights
    )


def micro_batches_of(setting: Setting, work: StageWork, candidate: Candidate) -> tuple[float, ...]:
    """Seconds of a micro-batch on every pipeline rank, forward and backward."""
    model, layout = setting.model, candidate.layout
    batch = batch_of(setting, work, candidate)
    return tuple(
        sum(micro_batch_time(model, layout, rank, batch, setting.machine, rank_weights(model, layout, rank)).values())
        for rank in pipeline_ranks(model, layout)
    )

"""Measuring the ELBO of held-out text on a layout: what a rank holds, and how long it takes."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from megatron_dllm.config import ParallelConfig
from megatron_dllm.config.plan import PlanConfig
from megatron_dllm.config.run import HELD_OUT_TOKENS
from megatron_dllm.data.geometry import RowGeometry
from megatron_dllm.planning.forward import ForwardTime, forward_bytes, rank_times
from megatron_dllm.planning.layers import Tokens
from megatron_dllm.planning.layout_plan import Setting
from megatron_dllm.planning.memory import head_chunk_bytes
from megatron_dllm.planning.parameters import pipeline_ranks, rank_weights
from megatron_dllm.planning.rows import RowContent, assumed_row


@dataclass(frozen=True)
class EvaluationMemory:
    """Bytes of one rank.

    Attributes:
        weights: in the precision of the measurement.
        activations: of a layer.
        head: a chunk of logits, on the last pipeline rank.
        reserve: what the device and its libraries take.
    """

    weights: int
    activations: int
    head: int
    reserve: int

    @property
    def total(self) -> int:
        """All parts together."""
        return self.weights + self.activations + self.head + self.reserve


@dataclass(frozen=True)
class EvaluationTime:
    """The ELBO at one block size.

    Attributes:
        block_size: of it.
        number: micro-batches of each rank.
        micro_batch: of the slowest pipeline rank.
        seconds: of all of them.
        row: what a row holds.
    """

    block_size: int
    number: int
    micro_batch: ForwardTime
    seconds: float
    row: RowContent


@dataclass(frozen=True)
class EvaluationPlan:
    """Measuring on a layout: memory and parameters of every pipeline rank, and the time at each block size."""

    layout: ParallelConfig
    num_gpus: int
    num_tokens: int
    memory: tuple[EvaluationMemory, ...]
    num_parameters: tuple[int, ...]
    times: tuple[EvaluationTime, ...]

    @property
    def worst(self) -> EvaluationMemory:
        """Of the rank that needs the most."""
        return max(self.memory, key=lambda memory: memory.total)

    @property
    def seconds(self) -> float:
        """At all block sizes together."""
        return sum(time.seconds for time in self.times)


def plan_evaluation(config: PlanConfig, setting: Setting) -> EvaluationPlan:
    """What `evaluate` needs for evaluation.num_tokens at every one of evaluation.block_sizes.

    Args:
        config: of the run, whose layout is valid.
        setting: model, machine and assumptions.
    """
    rows = {size: _row(config, size) for size in config.evaluation.block_sizes}
    largest = max((_tokens(config, row) for row in rows.values()), key=lambda tokens: tokens.computed)
    num_tokens = config.evaluation.num_tokens or HELD_OUT_TOKENS
    memory, weights = [], []
    for rank in pipeline_ranks(config.model, config.parallel):
        held = rank_weights(config.model, config.parallel, rank).total
        imbalance = config.assumptions.expert_imbalance
        head = head_chunk_bytes(config.model, config.parallel, largest.computed) if rank.is_last else 0.0
        weights.append(held)
        memory.append(
            EvaluationMemory(
                weights=held * (4 if config.parallel.precision == "fp32" else 2),
                activations=round(forward_bytes(config.model, config.parallel, rank, largest, imbalance)),
                head=round(head),
                reserve=setting.reserve,
            )
        )
    times = tuple(_time(config, setting, size, row, num_tokens) for size, row in rows.items())
    return EvaluationPlan(config.parallel, config.num_gpus, num_tokens, tuple(memory), tuple(weights), times)


def _row(config: PlanConfig, block_size: int) -> RowContent:
    """Documents of one length; every block has masks, half of its tokens on average."""
    stage = next(iter(config.schedule.stages.values()))
    measured = replace(
        stage,
        objective="block_diffusion",
        block_size=block_size,
        num_views=1,
        clean_block_size=None,
        ar_row_share=0.0,
        ar_weight=0.0,
        t_min=0.0,
        t_max=1.0,
    )
    length = config.assumptions.document_length or config.schedule.context_length
    return assumed_row(RowGeometry.of_stage(measured, config.schedule, config.data), measured, length)


def _tokens(config: PlanConfig, row: RowContent) -> Tokens:
    """Of a micro-batch, on one context rank."""
    share = config.evaluation.micro_batch_size / config.parallel.context_parallel_size
    return Tokens(row.length * share, row.length * share, row.pairs * share)


def _time(config: PlanConfig, setting: Setting, block_size: int, row: RowContent, num_tokens: int) -> EvaluationTime:
    layout, size = config.parallel, config.evaluation.micro_batch_size
    replicas = layout.data_parallel_size(config.num_gpus)
    number = math.ceil(num_tokens / row.document_tokens / size / replicas)
    targets = row.targets * size / layout.context_parallel_size
    times = rank_times(setting, layout, config.num_gpus, _tokens(config, row), targets)
    slowest = max(times, key=lambda time: time.total)
    return EvaluationTime(block_size, number, slowest, slowest.total * (number + len(times) - 1), row)

"""Measuring the ELBO of held-out text on a layout: what a rank holds, and how long it takes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from megatron_dllm.config import ParallelConfig, StageConfig
from megatron_dllm.config.plan import PlanConfig
from megatron_dllm.config.run import HELD_OUT_TOKENS
from megatron_dllm.data.geometry import RowGeometry
from megatron_dllm.diffusion.mask_share import mask_share
from megatron_dllm.diffusion.noise_spec import NoiseSpec
from megatron_dllm.planning.forward import ForwardTime, forward_bytes, number_width, rank_times
from megatron_dllm.planning.layers import Tokens
from megatron_dllm.planning.layout_plan import Setting
from megatron_dllm.planning.memory import head_chunk_bytes
from megatron_dllm.planning.parameters import PipelineRank, pipeline_ranks, rank_weights
from megatron_dllm.planning.parts import Parts
from megatron_dllm.planning.rows import RowContent, assumed_row

# Bytes of a logit whose NLL is read, in fp32; one in bf16 stands beside it.
_LOGIT_BYTES = 4


@dataclass(frozen=True)
class EvaluationMemory(Parts):
    """Bytes of one rank at the moment at which it holds the most.

    Attributes:
        weights: in the precision of the measurement.
        activations: of a layer; 0 where the logits are the moment.
        head: a chunk of logits, on the last pipeline rank, where they are the moment; else 0.
        reserve: what the device and its libraries take.
    """

    weights: int
    activations: int
    head: int
    reserve: int


@dataclass(frozen=True)
class EvaluationTime:
    """One measurement.

    Attributes:
        name: the block size of the ELBO, or "ar" for the exact NLL of the next token.
        number: micro-batches of each rank.
        micro_batch: of the slowest pipeline rank.
        seconds: of all of them.
        row: what a row holds.
    """

    name: str
    number: int
    micro_batch: ForwardTime
    seconds: float
    row: RowContent


@dataclass(frozen=True)
class EvaluationPlan:
    """Measuring on a layout: memory and parameters of every pipeline rank, and the time of each measurement."""

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
        """Of all measurements together."""
        return sum(time.seconds for time in self.times)


def plan_evaluation(config: PlanConfig, setting: Setting) -> EvaluationPlan:
    """What `evaluate` needs for evaluation.num_tokens at every one of evaluation.block_sizes.

    Args:
        config: of the run, whose layout is valid.
        setting: model, machine and assumptions.
    """
    rows, num_tokens = _rows(config), config.evaluation.num_tokens or HELD_OUT_TOKENS
    ranks = pipeline_ranks(config.model, config.parallel)
    return EvaluationPlan(
        layout=config.parallel,
        num_gpus=config.num_gpus,
        num_tokens=num_tokens,
        memory=tuple(evaluation_memory(config, setting, rank, tuple(rows.values())) for rank in ranks),
        num_parameters=tuple(rank_weights(config.model, config.parallel, rank).total for rank in ranks),
        times=tuple(_time(config, setting, name, row, num_tokens) for name, row in rows.items()),
    )


def evaluation_memory(
    config: PlanConfig, setting: Setting, rank: PipelineRank, rows: Sequence[RowContent]
) -> EvaluationMemory:
    """Bytes of a pipeline rank that measures such rows.

    Args:
        config: of the measurement.
        setting: model, machine and assumptions.
        rank: which layers it holds.
        rows: of each measurement.
    """
    model, layout = config.model, config.parallel
    width, imbalance = number_width(layout), setting.machine.assumptions.expert_imbalance
    activations = max(forward_bytes(model, layout, rank, _tokens(config, row), imbalance) for row in rows)
    # A layer's tensors are gone where logits are formed: in fp32, beside bf16 ones where these come first.
    targets = max(_targets(config, row) for row in rows)
    each = _LOGIT_BYTES if layout.precision == "fp32" else _LOGIT_BYTES + width
    head = head_chunk_bytes(model, layout, targets, each) * rank.is_last
    is_head = head > activations
    return EvaluationMemory(
        weights=rank_weights(model, layout, rank).total * width,
        activations=0 if is_head else round(activations),
        head=round(head) if is_head else 0,
        reserve=setting.reserve,
    )


def _rows(config: PlanConfig) -> dict[str, RowContent]:
    """What a row holds, by the name of the measurement: documents of one length."""
    stage = next(iter(config.schedule.stages.values()))
    plain = replace(stage, num_views=1, ar_row_share=0.0, ar_weight=0.0, sft=None, preference=None)
    measured = replace(plain, objective="block_diffusion", clean_block_size=config.evaluation.clean_block_size)
    found = {}
    for size in config.evaluation.block_sizes:
        row = _row(config, replace(measured, block_size=size))
        targets = row.document_tokens * mask_share(NoiseSpec.for_validation(), size)
        found[str(size)] = replace(row, targets=targets)
    if config.evaluation.with_ar:
        found["ar"] = _row(config, replace(plain, objective="ar", block_size=1, clean_block_size=None, shift=None))
    return found


def _row(config: PlanConfig, stage: StageConfig) -> RowContent:
    length = config.assumptions.document_length or config.schedule.context_length
    return assumed_row(RowGeometry.of_stage(stage, config.schedule, config.data), stage, length)


def _tokens(config: PlanConfig, row: RowContent) -> Tokens:
    """Of a micro-batch, on one context rank."""
    share = config.evaluation.micro_batch_size / config.parallel.context_parallel_size
    return Tokens(row.length * share, row.length * share, row.pairs * share)


def _targets(config: PlanConfig, row: RowContent) -> float:
    """Of a micro-batch, on one context rank."""
    return row.targets * config.evaluation.micro_batch_size / config.parallel.context_parallel_size


def _time(config: PlanConfig, setting: Setting, name: str, row: RowContent, num_tokens: int) -> EvaluationTime:
    layout, size = config.parallel, config.evaluation.micro_batch_size
    replicas = layout.data_parallel_size(config.num_gpus)
    number = math.ceil(num_tokens / row.document_tokens / size / replicas)
    times = rank_times(setting, layout, config.num_gpus, _tokens(config, row), _targets(config, row))
    slowest = max(times, key=lambda time: time.total)
    return EvaluationTime(name, number, slowest, slowest.total * (number + len(times) - 1), row)

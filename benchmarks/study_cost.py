"""What the runs of a study cost in floating-point operations, by the planner's formulas, and the shortest study."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace

from megatron_dllm.config import TrainConfig
from megatron_dllm.config.assumptions import AssumptionsConfig
from megatron_dllm.config.cluster import ClusterConfig
from megatron_dllm.config.hardware import HardwareConfig
from megatron_dllm.diffusion.block_schedule import max_batch_tokens
from megatron_dllm.planning.layout_plan import Candidate, Setting, plan_stage
from megatron_dllm.planning.links import Links
from megatron_dllm.planning.timing import Machine
from megatron_dllm.planning.work import assumed_work

# So many document tokens that no share of them is rounded to a stage's length with an error that matters.
MANY = 10**9
_LONG = 1024  # contexts in a row


def operations(config: TrainConfig) -> dict[str, float]:
    """Operations of a document token of each stage, forward and backward, of documents as long as the context.

    They are the planner's: the last layer computes only what is read, a frozen model and a second row of logits count.
    Padding does not: rows are taken to be long.
    """
    config = _with_long_rows(config)
    # On a machine that does an operation in a known time, and nothing else.
    assumptions = AssumptionsConfig(
        product_efficiency=1.0, attention_efficiency=1.0, host_ms_per_layer=0.0, expert_imbalance=1.0
    )
    hardware = HardwareConfig(**dict.fromkeys(("memory_gb", "bf16_tflops", "memory_gb_per_s", "node_gb_per_s"), 1.0))
    machine = Machine(hardware, Links.of(ClusterConfig(hardware=hardware), assumptions), assumptions)
    setting = Setting(config.model, config.training, config.optimizer, machine, 1 + config.has_second_model)
    found = {}
    for work in assumed_work(config, assumptions):
        time = plan_stage(setting, work, Candidate(config.parallel, 1)).time
        found[work.name] = (time.products + time.attention) * machine.product_rate / work.tokens_per_step
    return found


def _with_long_rows(config: TrainConfig) -> TrainConfig:
    return replace(config, schedule=replace(config.schedule, row_length=_LONG * config.schedule.context_length))


def mean_operations(config: TrainConfig) -> float:
    """Operations of a document token, as a mean over the stages of a run whose lengths are in tokens."""
    return _mean(config, operations(config))


def model_tokens(config: TrainConfig) -> float:
    """Tokens that the model computes for a document token, as a mean over the stages; padding does not count."""
    works = assumed_work(_with_long_rows(config), AssumptionsConfig())
    return _mean(config, {work.name: work.row.length / work.row.document_tokens for work in works})


def _mean(config: TrainConfig, per_token: Mapping[str, float]) -> float:
    """The mean over the stages of what a document token of each takes, as many as it has."""
    return weighted_mean(per_token, {name: stage.num_tokens or 0 for name, stage in config.schedule.stages.items()})


def weighted_mean(values: Mapping[str, float], weights: Mapping[str, float]) -> float:
    """The mean of what is named, each by its weight."""
    return sum(weights[name] * value for name, value in values.items()) / sum(weights.values())


def least_tokens(run: TrainConfig) -> int:
    """Document tokens of a study with which every stage of a run holds a global batch, and that of the stage before.

    Args:
        run: as it is where the study has MANY document tokens.
    """
    least, previous = 0.0, 0
    for stage in run.schedule.stages.values():
        own = max_batch_tokens(stage, run.schedule.tokens_per_row, stage.sft is not None)
        assert stage.num_tokens, "a study counts in tokens"
        least = max(least, max(own, previous) * MANY / stage.num_tokens)
        previous = own
    return math.ceil(least)


def check_tokens(option: str, given: int, runs: Iterable[TrainConfig]) -> None:
    """Refuse a study whose shortest stage a single step would jump over.

    Args:
        option: name of the number of tokens.
        given: document tokens.
        runs: each as it is where the study has MANY document tokens.

    Raises:
        ValueError: saying how many there must be.
    """
    least = max(least_tokens(run) for run in runs)
    if given < least:
        raise ValueError(
            f"{option} ({given}) must be at least {least}, so that the shortest stage of every run holds a global "
            "batch; give more, or fewer rows."
        )

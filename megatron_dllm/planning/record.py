"""A plan as JSON: everything on the screen, and every rank, for programs to read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from megatron_dllm.planning.answer import FORMULA
from megatron_dllm.planning.layout_plan import StagePlan
from megatron_dllm.planning.options import Option
from megatron_dllm.planning.run_plan import RunPlan


def record(plan: RunPlan, name: str, cluster: str, nodes: int, options: Sequence[Option]) -> dict[str, Any]:
    """The plan as plain values; bytes, seconds, hours and USD.

    Args:
        plan: of the run.
        name: of the run.
        cluster: name of the cluster's recipe.
        nodes: that it was planned for.
        options: what would be better.
    """
    return {
        "run": name,
        "cluster": cluster,
        "nodes": nodes,
        "num_gpus": plan.num_gpus,
        "fits": plan.fits,
        "peak_bytes": plan.peak,
        "limit_bytes": plan.setting.limit,
        "hours": plan.hours,
        "gpu_hours": plan.gpu_hours,
        "cost_usd": plan.cost_of(plan.gpu_hours),
        "stages": [_stage(stage) for stage in plan.stages],
        "options": [_option(option) for option in options],
        "hardware": asdict(plan.setting.machine.hardware),
        "assumptions": asdict(plan.setting.machine.assumptions),
        "source": FORMULA,
    }


def _stage(stage: StagePlan) -> dict[str, Any]:
    return {
        "stage": stage.work.name,
        "objective": stage.work.config.objective,
        "block_size": stage.work.config.block_size,
        "num_tokens": stage.work.num_tokens,
        "row": asdict(stage.work.row),
        "parallel": asdict(stage.candidate.layout),
        "num_gpus": stage.candidate.num_gpus,
        "num_parameters": list(stage.num_parameters),
        "memory_bytes": [{**asdict(memory), "total": memory.total} for memory in stage.memory],
        "step_seconds": stage.time.total,
        "step_seconds_of": stage.time.parts,
        "document_tokens_per_second": stage.tokens_per_second,
        "hours": stage.hours,
        "gpu_hours": stage.gpu_hours,
    }


def _option(option: Option) -> dict[str, Any]:
    trial = option.trial
    return {
        "gain": option.gain,
        "words": option.words,
        "num_gpus": trial.candidate.num_gpus,
        "peak_bytes": trial.peak,
        "hours": trial.hours,
        "gpu_hours": trial.gpu_hours,
    }

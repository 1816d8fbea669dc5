"""Ask the engine itself for the ranks that decide whether a plan fits: it builds them and runs a step without a GPU."""

from __future__ import annotations

from dataclasses import dataclass, replace

from megatron_dllm.config import TrainConfig
from megatron_dllm.planning.answer import RankMemory
from megatron_dllm.planning.engine import measure
from megatron_dllm.planning.layout_plan import StagePlan


@dataclass(frozen=True)
class Confirmed:
    """A rank by formula, and by the engine with the same reserve.

    Attributes:
        stage: in which it needs the most.
        index: of the pipeline rank.
        formula: its memory by closed form.
        engine: as the engine holds it, its experts chosen evenly.
        same_parameters: both count the same weights.
    """

    stage: str
    index: int
    formula: RankMemory
    engine: RankMemory
    same_parameters: bool


def confirm(config: TrainConfig, plan: StagePlan) -> tuple[Confirmed, ...]:
    """The first, the tightest and the last pipeline rank of a stage, each some seconds to minutes of this CPU.

    Args:
        config: of the run.
        plan: of its tightest stage.
    """
    name, candidate = plan.work.name, plan.candidate
    rows = candidate.rows or plan.work.config.micro_batch_size
    stage = replace(plan.work.config, micro_batch_size=rows)
    config = replace(config, schedule=replace(config.schedule, stages={name: stage}))
    last = len(plan.memory) - 1
    found = []
    for index in dict.fromkeys((0, plan.memory.index(plan.worst), last)):
        formula = plan.memory[index]
        answer = measure(config, candidate.layout, candidate.num_gpus, formula.rank, name).worst
        engine = replace(answer.memory, reserve=formula.reserve)
        found.append(Confirmed(name, index, formula, engine, answer.num_parameters == plan.num_parameters[index]))
    return tuple(found)


def confirmation_lines(found: tuple[Confirmed, ...], limit: int) -> list[str]:
    """A line for each rank."""
    lines = []
    for rank in found:
        engine, formula = rank.engine.total, rank.formula.total
        verdict = "fits" if engine <= limit else "does not fit"
        weights = "the same parameters" if rank.same_parameters else "OTHER PARAMETERS"
        lines.append(
            f"engine: pipeline rank {rank.index + 1}, stage {rank.stage}: {engine / 1e9:.1f} GB, {verdict} (formula "
            f"{formula / 1e9:.1f} GB, {weights})"
        )
    return lines

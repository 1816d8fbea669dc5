"""A whole run on its layouts: every stage planned, whether all of them fit, and what the run takes together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_dllm.config import TrainConfig
from megatron_dllm.config.plan import PlanConfig
from megatron_dllm.planning.layout_plan import Candidate, Setting, StagePlan, plan_stage
from megatron_dllm.planning.links import Links
from megatron_dllm.planning.search import Trial
from megatron_dllm.planning.timing import Machine
from megatron_dllm.planning.work import StageWork


@dataclass(frozen=True)
class RunPlan:
    """What a run comes to.

    Attributes:
        setting: what it was planned for.
        stages: of the schedule, in order.
    """

    setting: Setting
    stages: tuple[StagePlan, ...]

    @property
    def tightest(self) -> StagePlan:
        """The stage in which a rank needs the most memory."""
        return max(self.stages, key=lambda stage: stage.worst.total)

    @property
    def peak(self) -> int:
        """Bytes of that rank."""
        return self.tightest.worst.total

    @property
    def fits(self) -> bool:
        """Whether every rank of every stage has enough memory."""
        return self.peak <= self.setting.limit

    @property
    def num_gpus(self) -> int:
        """Of the stage that has the most."""
        return max(stage.candidate.num_gpus for stage in self.stages)

    @property
    def hours(self) -> float | None:
        """Time of all stages; None where the tokens of one are not known."""
        return _sum([stage.hours for stage in self.stages])

    @property
    def gpu_hours(self) -> float | None:
        """Of all stages; None likewise."""
        return _sum([stage.gpu_hours for stage in self.stages])

    def cost_of(self, gpu_hours: float | None) -> float | None:
        """USD of so many GPU-hours; None where the price or the hours are not known."""
        price = self.setting.machine.hardware.price_per_hour
        return gpu_hours * price if gpu_hours is not None and price else None


def _sum(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) if len(known) == len(values) else None


def setting_of(config: PlanConfig) -> Setting:
    """Model, machine and assumptions of a plan."""
    cluster, assumptions = config.cluster, config.assumptions
    machine = Machine(cluster.hardware, Links.of(cluster, assumptions), assumptions)
    return Setting(config.model, config.training, config.optimizer, machine, 1 + config.has_second_model)


def plan_run(config: TrainConfig, setting: Setting, work: Sequence[StageWork], num_gpus: int) -> RunPlan:
    """The run as its recipe lays it out.

    Args:
        config: whose `validate` has passed for so many ranks.
        setting: model, machine and assumptions.
        work: its stages.
        num_gpus: of a stage that does not name its own number.
    """
    stages = []
    for stage in work:
        candidate = Candidate(config.layout_of(stage.config), stage.config.world_size or num_gpus)
        stages.append(plan_stage(setting, stage, candidate))
    return RunPlan(setting, tuple(stages))


def plan_trial(setting: Setting, work: Sequence[StageWork], trial: Trial) -> RunPlan:
    """The run on a layout that a search found."""
    return RunPlan(setting, tuple(plan_stage(setting, stage, trial.candidate) for stage in work))


def layout_words(config: TrainConfig, candidate: Candidate, nodes: int, gpus_per_node: int) -> str:
    """The override words that make the recipe run as a candidate does; empty if it does already.

    Args:
        config: of the run as it was planned.
        candidate: another way to run it.
        nodes: that the plan was made for.
        gpus_per_node: of the cluster.
    """
    from megatron_dllm.config.nearest_layout import as_overrides

    words = [as_overrides(config.parallel, candidate.layout, "parallel")]
    sizes = {stage.micro_batch_size for stage in config.schedule.stages.values()}
    if candidate.rows is not None and sizes != {candidate.rows}:
        words.append(f"schedule.micro_batch_size={candidate.rows}")
    if candidate.num_gpus != nodes * gpus_per_node:
        words.append(f"nodes={candidate.num_gpus // gpus_per_node}")
    return " ".join(word for word in words if word)

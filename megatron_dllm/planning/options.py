"""What would be faster, cheaper or smaller than the layout of a recipe, as override words; and what fits at all.

A verdict has seconds: it looks at the layouts with the recipe's own micro-batch and the recipe's pieces of a pipeline
rank, and at half and a quarter of the nodes. A search (`search=true`) looks at all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_dllm.config.plan import PlanConfig
from megatron_dllm.planning.layout_plan import Candidate, Setting
from megatron_dllm.planning.run_plan import RunPlan, layout_words
from megatron_dllm.planning.search import Found, Trial, best_of, search, trials
from megatron_dllm.planning.work import StageWork

# An option is worth a line from this gain on.
_WORTH = 1.03
# How often the nodes are doubled to find some on which a model fits.
_DOUBLINGS = 6
_GIGA = 1e9


@dataclass(frozen=True)
class Option:
    """A change of the recipe.

    Attributes:
        gain: faster, cheaper or smaller.
        words: overrides that make it.
        trial: what it comes to.
    """

    gain: str
    words: str
    trial: Trial


def near_options(config: PlanConfig, setting: Setting, work: Sequence[StageWork], plan: RunPlan) -> list[Option]:
    """Options beside a plan whose stages have one layout; the best of each kind."""
    if any(stage.config.parallel is not None or stage.config.world_size is not None for stage in work):
        return []
    here = _near(setting, config, work, [plan.num_gpus], "time")
    on_fewer = list(trials(setting, config, work, _fewer_gpus(config), is_near=True))
    fewer = best_of(on_fewer, "cost")
    found: list[Option] = []
    hours, gpu_hours = _spent(plan)
    if here.best is not None and (not plan.fits or _hours(here.best) * _WORTH < hours):
        found.append(_option(config, "faster" if plan.fits else "fits", here.best))
    if fewer.best is not None and plan.fits and _gpu_hours(fewer.best) * _WORTH < gpu_hours:
        found.append(_option(config, "cheaper", fewer.best))
    smallest = best_of(on_fewer, "gpus").best if plan.fits else None
    if smallest is not None and smallest != fewer.best:
        found.append(_option(config, "smaller", smallest))
    return [option for option in found if option.words]


def _spent(plan: RunPlan) -> tuple[float, float]:
    """Hours and GPU-hours of a plan; a stage without tokens counts as one step, as in a search."""
    hours = gpu_hours = 0.0
    for stage in plan.stages:
        own = stage.time.total / 3600.0 if stage.hours is None else stage.hours
        hours += own
        gpu_hours += own * stage.candidate.num_gpus
    return hours, gpu_hours


def _hours(trial: Trial) -> float:
    assert trial.hours is not None, "the best of a search fits"
    return trial.hours


def _gpu_hours(trial: Trial) -> float:
    return _hours(trial) * trial.candidate.num_gpus


def _option(config: PlanConfig, gain: str, trial: Trial) -> Option:
    return Option(gain, words_of(config, trial.candidate), trial)


def words_of(config: PlanConfig, candidate: Candidate) -> str:
    """The override words of a candidate beside a plan's own."""
    return layout_words(config, candidate, config.nodes, config.cluster.num_ranks_per_node)


def _fewer_gpus(config: PlanConfig) -> list[int]:
    per_node = config.cluster.num_ranks_per_node
    return [nodes * per_node for nodes in (config.nodes // 2, config.nodes // 4) if nodes]


def _near(
    setting: Setting, config: PlanConfig, work: Sequence[StageWork], gpu_counts: list[int], objective: str
) -> Found:
    """A search among the layouts near to the recipe's."""
    return search(setting, config, work, gpu_counts, objective, is_near=True)


def remedy(config: PlanConfig, setting: Setting, work: Sequence[StageWork], options: Sequence[Option]) -> str:
    """What to change where a plan does not fit: the nearest layout, or number of nodes, that does."""
    if options:
        return f"on these GPUs this fits: {options[0].words} ({options[0].trial.peak / _GIGA:.1f} GB)."
    least: Trial | None = None
    nodes = config.nodes
    for _ in range(_DOUBLINGS):
        nodes *= 2
        found = _near(setting, config, work, [nodes * config.cluster.num_ranks_per_node], "gpus")
        if found.best is not None:
            words = words_of(config, found.best.candidate)
            return f"on {nodes} nodes this fits: {words} ({found.best.peak / _GIGA:.1f} GB)."
        if found.least is not None and (least is None or found.least.peak < least.peak):
            least = found.least
    if least is None:
        return "no layout divides these GPUs and this batch; give another number of nodes or global_batch_size."
    return (
        f"nothing fits on up to {nodes} nodes: the least that a rank needs is {least.peak / _GIGA:.1f} GB, on "
        f"{least.candidate.num_gpus} GPUs with {words_of(config, least.candidate)}; take GPUs with more memory."
    )

"""Look for the best layout among all that the program can run: every size, recomputation and micro-batch.

A layout that fits without recomputation is never faster with it, so of each the first of none, selective and full that
fits is timed and the others are left out. Nothing else is: the result is that of trying everything. Stages with nearly
as many targets are timed as one (`loads_of`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product

from megatron_dllm.config import ModelConfig, ParallelConfig, TrainConfig
from megatron_dllm.planning.layout_plan import Candidate, Setting, batch_of, memory_of, time_of
from megatron_dllm.planning.methods import method_cost
from megatron_dllm.planning.micro_batch import MicroBatch
from megatron_dllm.planning.parameters import PipelineRank, Weights, pipeline_ranks, rank_weights
from megatron_dllm.planning.timing import distinct_ranks
from megatron_dllm.planning.work import StageWork, with_micro_batch

RECOMPUTE = ("none", "selective", "full")
MICRO_BATCHES = (1, 2, 4, 8)


@dataclass(frozen=True)
class Trial:
    """A layout that was tried.

    Attributes:
        candidate: how it runs; where nothing fits, with the recomputation that needs least.
        peak: bytes of the rank that needs the most, in the stage that does.
        hours: of all stages together; None where it does not fit. A stage in epochs of a corpus that was not given
            counts as one step.
    """

    candidate: Candidate
    peak: int
    hours: float | None

    @property
    def gpu_hours(self) -> float | None:
        """Of all GPUs together."""
        return None if self.hours is None else self.hours * self.candidate.num_gpus


@dataclass(frozen=True)
class Found:
    """What a search came to.

    Attributes:
        best: the layout that fits and is best; None where nothing fits.
        least: the layout that needs the least memory.
        num_tried: layouts, each with up to three ways to recompute.
        num_fitting: of them, those that fit.
    """

    best: Trial | None
    least: Trial | None
    num_tried: int
    num_fitting: int


def search(
    setting: Setting,
    config: TrainConfig,
    work: Sequence[StageWork],
    gpu_counts: Iterable[int],
    objective: str,
    is_near: bool = False,
) -> Found:
    """The best layout for these numbers of GPUs.

    Args:
        setting: model, machine and assumptions.
        config: of the run; its `parallel` says what is no matter of size.
        work: its stages.
        gpu_counts: numbers of GPUs to try.
        objective: time, cost or gpus.
        is_near: only layouts with the run's own micro-batch and pieces of a pipeline rank.
    """
    return best_of(trials(setting, config, work, gpu_counts, is_near), objective)


def trials(
    setting: Setting, config: TrainConfig, work: Sequence[StageWork], gpu_counts: Iterable[int], is_near: bool = False
) -> Iterator[Trial]:
    """Every layout and micro-batch, tried; see `search`."""
    loads = loads_of(work, setting.num_models)
    for count in gpu_counts:
        for candidate in candidates(config, setting, work, count, is_near):
            yield try_candidate(setting, loads, candidate)


def best_of(tried: Iterable[Trial], objective: str) -> Found:
    """The best of some trials: by time, cost or gpus."""
    best: Trial | None = None
    least: Trial | None = None
    num_tried = num_fitting = 0
    for trial in tried:
        num_tried += 1
        num_fitting += trial.hours is not None
        if trial.hours is not None and (best is None or _rank(trial, objective) < _rank(best, objective)):
            best = trial
        if least is None or (trial.peak, trial.candidate.num_gpus) < (least.peak, least.candidate.num_gpus):
            least = trial
    return Found(best, least, num_tried, num_fitting)


def _rank(trial: Trial, objective: str) -> tuple[float, ...]:
    assert trial.hours is not None and trial.gpu_hours is not None, "only what fits is ranked"
    if objective == "gpus":
        return (trial.candidate.num_gpus, trial.hours)
    return (trial.hours if objective == "time" else trial.gpu_hours, trial.candidate.num_gpus)


@dataclass(frozen=True)
class Load:
    """Stages whose steps cost the same, or all but the same, and how many steps they have together."""

    work: StageWork
    steps: float


def loads_of(work: Sequence[StageWork], num_models: int = 1) -> tuple[Load, ...]:
    """The stages of a run, those with equal rows, batches and methods together: the block stages of a schedule, say.

    Rows may differ by one target in a hundred document tokens, as those of blocks of 32 and 64 do: they count as the
    row with the most, which keeps a search from timing each of ten stages.

    Args:
        work: the stages.
        num_models: that lie in memory.
    """
    steps: dict[tuple[object, ...], float] = {}
    chosen: dict[tuple[object, ...], StageWork] = {}
    for stage in work:
        config = stage.config
        method = (config.reads_all_outputs, method_cost(config, num_models))
        row = replace(stage.row, targets=round(stage.row.targets / stage.row.document_tokens, 2))
        key = (row, config.global_batch_size, config.micro_batch_size, *method)
        number = 1.0 if stage.num_tokens is None else stage.num_tokens / stage.tokens_per_step
        steps[key] = steps.get(key, 0.0) + number
        chosen[key] = max(chosen.get(key, stage), stage, key=lambda one: one.row.targets)
    return tuple(Load(stage, steps[key]) for key, stage in chosen.items())


def try_candidate(
    setting: Setting, loads: Sequence[Load], candidate: Candidate, recompute: Sequence[str] = RECOMPUTE
) -> Trial:
    """Memory of a candidate with the first recomputation that fits, and its time.

    Args:
        setting: model, machine and assumptions.
        loads: the stages.
        candidate: sizes and micro-batch; its own recomputation does not count.
        recompute: ways to recompute, cheapest first.
    """
    ranks = pipeline_ranks(setting.model, candidate.layout)
    weights = {rank: rank_weights(setting.model, candidate.layout, rank) for rank in ranks}
    batches = [batch_of(setting, load.work, candidate) for load in loads]
    tried: list[Trial] = []
    for way in recompute:
        chosen = replace(candidate, layout=replace(candidate.layout, recompute=way))
        peak = _peak(setting, chosen, weights, batches)
        if peak <= setting.limit:
            return Trial(chosen, peak, _hours(setting, loads, chosen, weights, batches))
        tried.append(Trial(chosen, peak, None))
    return min(tried, key=lambda trial: trial.peak)


def _peak(
    setting: Setting, candidate: Candidate, weights: dict[PipelineRank, Weights], batches: Sequence[MicroBatch]
) -> int:
    # Of ranks that hold the same layers, the first has the most micro-batches in flight.
    held = {rank: weights[rank] for rank in distinct_ranks(tuple(weights))}
    return max(memory.total for batch in batches for memory in memory_of(setting, candidate, batch, held))


def _hours(
    setting: Setting,
    loads: Sequence[Load],
    candidate: Candidate,
    weights: dict[PipelineRank, Weights],
    batches: Sequence[MicroBatch],
) -> float:
    seconds = sum(
        load.steps * time_of(setting, candidate, batch, weights).total
        for load, batch in zip(loads, batches, strict=True)
    )
    return seconds / 3600.0


def candidates(
    config: TrainConfig, setting: Setting, work: Sequence[StageWork], num_gpus: int, is_near: bool = False
) -> Iterator[Candidate]:
    """Every layout and micro-batch that a run on so many GPUs can have; tensor and context ranks stay within a node."""
    per_node = setting.machine.links.gpus_per_node
    for rows in (None,) if is_near else MICRO_BATCHES:
        named = work if rows is None else with_micro_batch(work, rows)
        stages = {stage.name: stage.config for stage in named}
        changed = replace(config, schedule=replace(config.schedule, stages=stages))
        distinct = {(stage.global_batch_size, stage.micro_batch_size): name for name, stage in stages.items()}
        for layout in layouts(config.model, config.parallel, num_gpus, per_node):
            pieces = layout.virtual_pipeline_model_parallel_size
            if is_near and pieces not in (None, config.parallel.virtual_pipeline_model_parallel_size):
                continue
            try:
                changed.check_layout(layout, num_gpus, distinct.values())
            except ValueError:
                continue
            yield Candidate(layout, num_gpus, rows)


def layouts(model: ModelConfig, wish: ParallelConfig, num_gpus: int, per_node: int) -> Iterator[ParallelConfig]:
    """Sizes that divide the GPUs and the model; `TrainConfig.check_layout` knows the other rules."""
    sizes = _divisors(num_gpus)
    inside = [size for size in sizes if size <= per_node and model.num_attention_heads % size == 0]
    pipelines = [size for size in sizes if size <= model.num_layers]
    experts = [size for size in sizes if model.num_moe_experts % size == 0] if model.is_moe else [1]
    for tp, pp in product(inside, pipelines):
        contexts = [size for size in sizes if size <= per_node and num_gpus % (tp * pp * size) == 0]
        for cp, (pieces, last), (ep, etp) in product(
            contexts, _pipelines(model.num_layers, pp), _experts(experts, tp, num_gpus // pp)
        ):
            yield replace(
                wish,
                tensor_model_parallel_size=tp,
                sequence_parallel=tp > 1,
                pipeline_model_parallel_size=pp,
                virtual_pipeline_model_parallel_size=pieces,
                num_layers_in_first_pipeline_stage=None,
                num_layers_in_last_pipeline_stage=last,
                context_parallel_size=cp,
                expert_model_parallel_size=ep,
                expert_tensor_parallel_size=etp,
            )


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]


def _pipelines(num_layers: int, size: int) -> list[tuple[int | None, int | None]]:
    """Pieces of a rank, and layers of the last rank: even ones in one piece or more, or fewer layers on the last."""
    if size == 1:
        return [(None, None)]
    if num_layers % size:
        share = -(-num_layers // size)
        last = num_layers - (size - 1) * share
        return [(None, last)] if last > 0 else []
    share = num_layers // size
    return [(None, None), *((pieces, None) for pieces in _divisors(share) if pieces > 1)]


def _experts(sizes: list[int], tp: int, num_ranks: int) -> list[tuple[int, int | None]]:
    """Expert ranks, and ranks that share an expert: as many as share the other matrices, or one."""
    pairs = [(ep, etp) for ep in sizes for etp in dict.fromkeys((tp, 1)) if num_ranks % (ep * etp) == 0]
    # megatron-core trains wrongly without expert ranks where the two differ.
    return [(ep, None if etp == tp else etp) for ep, etp in pairs if ep > 1 or etp == tp]

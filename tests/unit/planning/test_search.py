"""The search finds what trying everything finds, and offers only what the program runs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import product

import pytest

from megatron_dllm.config import DistillConfig, ParallelConfig, ScheduleConfig, TrainConfig
from megatron_dllm.planning.layout_plan import Candidate, Setting, plan_stage
from megatron_dllm.planning.search import MICRO_BATCHES, RECOMPUTE, candidates, loads_of, search
from megatron_dllm.planning.work import StageWork, assumed_work
from tests.unit.config.configs import model_config, stage_config, train_config
from tests.unit.planning.setting import setting_for

MODEL = model_config(num_layers=4, hidden_size=1024, ffn_hidden_size=4096, moe_ffn_hidden_size=512, vocab_size=32768)
STAGES = {
    "blocks": stage_config(block_size=32, num_tokens=10**9, global_batch_size=16),
    "mdlm": stage_config(block_size=4096, num_tokens=10**8, global_batch_size=32),
}


def _config() -> TrainConfig:
    schedule = ScheduleConfig(context_length=4096, stages=STAGES)
    parallel = ParallelConfig(precision="bf16")
    return train_config(model=MODEL, schedule=schedule, parallel=parallel)


def _everything(config: TrainConfig, num_gpus: int) -> Iterator[Candidate]:
    """Every combination of sizes, most of them impossible; those that training accepts."""
    sizes = [1, 2, 4, 8]
    for tp, pp, cp, ep, rows, way in product(sizes, [1, 2, 4], sizes, sizes, MICRO_BATCHES, RECOMPUTE):
        for pieces, etp in product((None, 2, 4), {None, 1}):
            layout = replace(
                config.parallel,
                tensor_model_parallel_size=tp,
                sequence_parallel=tp > 1,
                pipeline_model_parallel_size=pp,
                virtual_pipeline_model_parallel_size=pieces,
                context_parallel_size=cp,
                expert_model_parallel_size=ep,
                expert_tensor_parallel_size=None if etp == tp else etp,
                recompute=way,
            )
            stages = {name: replace(stage, micro_batch_size=rows) for name, stage in STAGES.items()}
            changed = replace(config, schedule=replace(config.schedule, stages=stages))
            try:
                changed.check_layout(layout, num_gpus, STAGES)
            except ValueError:
                continue
            yield Candidate(layout, num_gpus, rows)


def _tried(setting: Setting, work: tuple[StageWork, ...], candidate: Candidate) -> tuple[int, float]:
    plans = [plan_stage(setting, stage, candidate) for stage in work]
    hours = sum(plan.hours for plan in plans if plan.hours is not None)
    return max(plan.worst.total for plan in plans), hours


@pytest.fixture(scope="module")
def everything() -> list[Candidate]:
    return list(_everything(_config(), 8))


@pytest.mark.ranks  # tries a thousand layouts the long way
def test_the_search_tries_every_layout_that_runs(everything: list[Candidate]) -> None:
    config = _config()
    setting = setting_for(config)
    work = assumed_work(config, setting.machine.assumptions)

    def sizes(candidate: Candidate) -> tuple[str, int | None]:
        return repr(replace(candidate.layout, recompute="none")), candidate.rows

    expected = {sizes(candidate) for candidate in everything}
    assert {sizes(candidate) for candidate in candidates(config, setting, work, 8)} == expected


@pytest.mark.ranks
@pytest.mark.parametrize("memory_gb", [80.0, 9.0, 7.2])
def test_the_search_equals_trying_everything(everything: list[Candidate], memory_gb: float) -> None:
    config = _config()
    setting = setting_for(config, memory_gb)
    work = assumed_work(config, setting.machine.assumptions)
    tried = [_tried(setting, work, candidate) for candidate in everything]
    expected = min(hours for peak, hours in tried if peak <= setting.limit)
    assert memory_gb == 80.0 or any(peak > setting.limit for peak, _ in tried), "some do not fit"
    found = search(setting, config, work, [8], "time")
    assert found.best is not None and found.best.hours == pytest.approx(expected)
    assert _tried(setting, work, found.best.candidate) == (found.best.peak, pytest.approx(expected))


def test_stages_of_other_methods_are_no_equal_load() -> None:
    config = _config()
    (work, _) = assumed_work(config, setting_for(config).machine.assumptions)
    taught = replace(work, config=replace(work.config, distill=DistillConfig(1.0, "teacher")))
    assert [load.work for load in loads_of([work, taught, work], 2)] == [work, taught]


def test_stages_with_nearly_as_many_targets_are_timed_as_the_one_with_the_most() -> None:
    config = _config()
    stages = {f"blocks_{size}": replace(STAGES["blocks"], block_size=size) for size in (1, 32, 64)}
    changed = replace(config, schedule=replace(config.schedule, stages=stages))
    one, few, many = assumed_work(changed, setting_for(config).machine.assumptions)
    assert few.row.targets > many.row.targets
    loads = loads_of([one, many, few])
    assert [load.work for load in loads] == [one, few]
    steps = [(stage.num_tokens or 0) / stage.tokens_per_step for stage in (one, many, few)]
    assert [load.steps for load in loads] == pytest.approx([steps[0], steps[1] + steps[2]])


def test_objectives_make_small_what_they_name() -> None:
    config = _config()
    setting = setting_for(config)
    work = assumed_work(config, setting.machine.assumptions)
    best = {name: search(setting, config, work, [2, 8, 16], name).best for name in ("time", "cost", "gpus")}
    assert all(best.values())
    hours, gpu_hours = best["time"].hours, best["cost"].gpu_hours
    assert best["gpus"].candidate.num_gpus == 2 <= best["cost"].candidate.num_gpus
    assert hours <= min(best["cost"].hours, best["gpus"].hours)
    assert gpu_hours <= min(best["time"].gpu_hours, best["gpus"].gpu_hours)


def test_where_nothing_fits_the_least_is_named() -> None:
    config = _config()
    setting = setting_for(config, 0.5, reserve_gb=0.0)
    work = assumed_work(config, setting.machine.assumptions)
    found = search(setting, config, work, [2], "time")
    assert found.best is None and found.num_fitting == 0 and found.least is not None
    assert found.least.peak > setting.limit

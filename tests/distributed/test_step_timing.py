"""The parts of a real step on two pipeline ranks."""

from __future__ import annotations

import time
from dataclasses import replace

import torch

from benchmarks.ranks import run_ranks
from megatron_dllm.config import RunConfig
from tests.planning_case import LAYOUTS, config

NUMBER = 4


def _step() -> tuple[dict[str, float], float]:
    """What is measured of the second step, and how long it took."""
    from megatron_dllm.host import prepare_host

    prepare_host()
    from megatron_dllm.model.objective import objective_of
    from megatron_dllm.parallel.groups import initialize
    from megatron_dllm.planning.engine_rows import micro_batches
    from megatron_dllm.training.engine import build_engine
    from megatron_dllm.training.loop import embedding_noise
    from megatron_dllm.training.observers.step_timing import StepTiming
    from megatron_dllm.training.step import train_step
    from tests.unit.training.observers.test_metrics import report_of

    run = replace(config(), parallel=LAYOUTS["pipeline"])
    stage = run.schedule.stages["mdlm"]
    batches, groups = micro_batches(run, stage, NUMBER), initialize(run.parallel, RunConfig(name="timed"))
    engine = build_engine(run, groups)
    timing = StepTiming(engine, torch.device("cpu"))
    for is_logged in (False, True):
        start = time.perf_counter()
        with timing.around_step(is_logged):
            train_step(engine, batches, torch.device("cpu"), objective_of(stage, run.noise), embedding_noise(run, 0))
        seconds = time.perf_counter() - start
    assert engine.transformer_config.timers is None, "the next step is not watched"
    return timing.measure(report_of(is_logged=True, micro_batches=batches)), seconds


def test_the_parts_of_both_ranks_add_up_to_the_step() -> None:
    (first, first_seconds), (second, second_seconds) = run_ranks(_step, 2)
    assert first == second, "every rank knows them all"
    for rank, seconds in enumerate((first_seconds, second_seconds)):
        micro_batches = NUMBER * first[f"micro_batch_seconds/{rank}"]
        others = [first[f"{name}_seconds/{rank}"] for name in ("waiting", "gradient", "update")]
        assert micro_batches > 0.0 and min(others) >= 0.0
        assert 0.7 * seconds < micro_batches + sum(others) < seconds
        assert first[f"peak_memory_gib/{rank}"] > 0.05
    # A rank waits at least for the first micro-batch of the other: its forward pass, or its backward pass.
    assert min(first["waiting_seconds/0"], first["waiting_seconds/1"]) > 0.1 * first["micro_batch_seconds/0"]

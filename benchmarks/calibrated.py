"""Constants fitted to steps of the tiny model, and what they say of layouts and batches that none of them had.

    python -m benchmarks.calibrated --output benchmarks/results/calibrated      # on two cores that nobody else uses
    python -m benchmarks.calibrated --clock cpu                                 # where other programs share them

Every case builds the engine and trains some steps, watched as those of a run are. By the wall's clock a step of a
pipeline counts as it is, with the time in which its ranks wait for each other; in CPU time of the thread that computes,
which other programs lengthen less, that is missing, so of a pipeline only the micro-batches of each rank are compared.
Cases take turns, and the least time of each counts: what else runs adds to it, and takes nothing away.

Every case has two ranks, as all GPUs of a node work in a run: two cores may share one unit that computes, or a memory.
The constants are fitted to data-parallel ranks, and pipelines are predicted.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.ranks import run_ranks
from benchmarks.record import Rows, machine, table, write_results
from megatron_dllm.compose import compose_train_config
from megatron_dllm.config import ParallelConfig, RunConfig, ScheduleConfig, StageConfig, TrainConfig
from megatron_dllm.config.assumptions import AssumptionsConfig
from megatron_dllm.config.cluster import ClusterConfig
from megatron_dllm.config.hardware import HardwareConfig
from megatron_dllm.config.rules import check_positive
from megatron_dllm.planning.calibration import CONSTANTS, Observation, fit, machine_of
from megatron_dllm.planning.layout_plan import Candidate, Setting, micro_batches_of
from megatron_dllm.planning.work import assumed_work
from megatron_dllm.run.command import run_command

CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.thread_time}
CONTEXT_LENGTH, ROW_LENGTH = 512, 1024
STAGE = StageConfig(block_size=32, num_tokens=10**6, global_batch_size=8, learning_rate=1e-3)
NUM_RANKS = 2
DP2, PP2 = ParallelConfig(), ParallelConfig(pipeline_model_parallel_size=2)
# A core's rates in the order of magnitude. No GPU runs ahead of the host.
CPU = ClusterConfig(
    ranks_per_node=2,
    hardware=HardwareConfig(
        memory_gb=16, bf16_tflops=0.1, memory_gb_per_s=10, node_gb_per_s=5, network_gb_per_s=5, is_asynchronous=False
    ),
)
# An unseen time is to be predicted within so many percent.
_ALLOWED = 15.0
# Every rank computes all experts, however busy each of them is.
ASSUMED = AssumptionsConfig(expert_imbalance=1.0)


# Seconds of a step of this rank, and of a micro-batch on each pipeline rank.
Times = tuple[float, list[float]]


@dataclass(frozen=True)
class Case:
    """A way to train: a stage on a layout, and whether the constants are fitted to it."""

    stage: StageConfig
    layout: ParallelConfig
    is_fitted: bool

    @property
    def num_micro_batches(self) -> int:
        """Of a rank in a step."""
        replicas = NUM_RANKS // self.layout.model_parallel_size
        return self.stage.global_batch_size // (self.stage.micro_batch_size * replicas)


HALF = replace(STAGE, global_batch_size=4)
CASES = {
    "DP2, 1 row": Case(STAGE, DP2, True),
    "DP2, 4 rows": Case(replace(STAGE, micro_batch_size=4), DP2, True),
    "DP2, 2 rows": Case(replace(STAGE, micro_batch_size=2), DP2, False),
    "DP2, 16 rows a step": Case(replace(STAGE, global_batch_size=16, micro_batch_size=2), DP2, False),
    "DP2, 2 views": Case(replace(STAGE, num_views=2), DP2, False),
    "DP2, MDLM": Case(replace(STAGE, block_size=CONTEXT_LENGTH), DP2, False),
    "DP2, recomputed": Case(STAGE, replace(DP2, recompute="full"), False),
    "PP2, 1 row": Case(HALF, PP2, False),
    "PP2, 4 rows": Case(replace(HALF, micro_batch_size=4), PP2, False),
    "PP2, 2 views": Case(replace(HALF, num_views=2), PP2, False),
}


def config_of(case: Case) -> TrainConfig:
    """The demo's model, and rows of documents that are as long as the context."""
    row_length = ROW_LENGTH + (case.stage.num_views - 1) * CONTEXT_LENGTH
    config = compose_train_config(["model=tiny_moe", "run.name=x", "data.train=x"])
    schedule = ScheduleConfig(context_length=CONTEXT_LENGTH, row_length=row_length, stages={"steps": case.stage})
    return replace(config, schedule=schedule, parallel=case.layout)


def timed(names: list[str], repetitions: int, num_steps: int, clock: str) -> dict[str, list[Times]]:
    """Cases of one number of ranks in turns, on every one of them."""
    from megatron_dllm.host import prepare_host

    prepare_host()
    from megatron_dllm.parallel.groups import initialize

    groups = initialize(CASES[names[0]].layout, RunConfig(name="timed"))
    found: dict[str, list[Times]] = {name: [] for name in names}
    for _ in range(repetitions):
        for name in names:
            found[name].append(_times(CASES[name], groups, num_steps, CLOCKS[clock]))
            print(name, found[name][-1], flush=True)
    return found


def _times(case: Case, groups: Any, num_steps: int, now: Callable[[], float]) -> Times:
    """Seconds of a step and of a micro-batch on each pipeline rank: the least of the steps behind the first."""
    import torch

    from megatron_dllm.model.objective import objective_of
    from megatron_dllm.planning.engine_rows import micro_batches
    from megatron_dllm.training.engine import build_engine
    from megatron_dllm.training.loop import embedding_noise
    from megatron_dllm.training.observers.step_timing import StepTiming, StepWatch, rank_parts
    from megatron_dllm.training.step import train_step

    config, device = config_of(case), torch.device("cpu")
    number = case.num_micro_batches
    batches = micro_batches(config, case.stage, number)
    engine, objective = build_engine(config, groups), objective_of(case.stage, config.noise)
    found = []
    for _ in range(1 + num_steps):
        watch = StepWatch(now, lambda start, end: float(end - start))
        start = now()
        with StepTiming(engine, device).watching(watch):
            train_step(engine, batches, device, objective, embedding_noise(config, 0))
        found.append((now() - start, rank_parts(watch, number)[0]))
    steps, each = zip(*found[1:], strict=True)
    own = torch.zeros(groups.pipeline.size(), dtype=torch.float64)
    own[groups.pipeline.rank()] = min(each)
    torch.distributed.all_reduce(own, op=torch.distributed.ReduceOp.MAX)
    return min(steps), own.tolist()


def observe(repetitions: int, num_steps: int, clock: str) -> dict[str, list[Times]]:
    """Every case as often as is asked for."""
    found: dict[str, list[Times]] = {}
    for layout in (DP2, PP2):
        size = layout.model_parallel_size
        names = [name for name, case in CASES.items() if case.layout.model_parallel_size == size]
        found |= run_ranks(timed, NUM_RANKS, names, repetitions, num_steps, clock, timeout_s=7200.0)[0]
    return found


def observation(name: str, found: list[Times]) -> Observation:
    """The least times of a case's repetitions, as a calibration takes its."""
    case = CASES[name]
    config = config_of(case)
    setting = Setting(config.model, config.training, config.optimizer, machine_of(CPU, ASSUMED))
    (work,) = assumed_work(config, ASSUMED)
    micro_batches = tuple(min(times) for times in zip(*(each for _, each in found), strict=True))
    seconds = min(step for step, _ in found)
    return Observation(name, setting, work, Candidate(case.layout, NUM_RANKS), seconds, micro_batches)


def compared(one: Observation, constants: AssumptionsConfig, clock: str) -> list[tuple[str, float, float]]:
    """What, measured and predicted seconds: the step where waiting counts, and a pipeline's micro-batches."""
    found = []
    is_pipeline = len(one.micro_batches) > 1
    if clock == "wall" or not is_pipeline:
        found.append(("step", one.seconds, one.predicted(constants)))
    if is_pipeline:
        setting = replace(one.setting, machine=machine_of(CPU, constants))
        pairs = zip(one.micro_batches, micro_batches_of(setting, one.work, one.candidate), strict=True)
        found += [(f"micro-batch, rank {rank + 1}", *pair) for rank, pair in enumerate(pairs)]
    return found


def rows_of(found: dict[str, list[Times]], clock: str) -> tuple[list[dict[str, Any]], AssumptionsConfig]:
    """Measured and predicted seconds of every case, and the fitted constants."""
    seen = {name: observation(name, repeated) for name, repeated in found.items()}
    fitted = fit([one for name, one in seen.items() if CASES[name].is_fitted], ASSUMED)
    rows = []
    for name, one in seen.items():
        both = zip(compared(one, fitted, clock), compared(one, ASSUMED, clock), strict=True)
        for (what, measured, predicted), (_, _, before) in both:
            rows.append(
                {
                    "case": name,
                    "fitted": "yes" if CASES[name].is_fitted else "",
                    "what": what,
                    f"{clock} s": round(measured, 3),
                    "as assumed": _percent(before / measured),
                    "predicted s": round(predicted, 3),
                    "error": _percent(predicted / measured),
                }
            )
    return rows, fitted


def _percent(ratio: float) -> str:
    return f"{100 * (ratio - 1):+.0f}%"


def summary(rows: Rows, fitted: AssumptionsConfig) -> str:
    """The constants, and how many times of unseen cases they predict within 15 %; steps and all times."""
    shown = ", ".join(f"{name} {getattr(fitted, name):.3g}" for name in CONSTANTS)
    unseen = [(row["what"], abs(float(row["error"].rstrip("%")))) for row in rows if not row["fitted"]]
    said = []
    for kind, errors in (
        ("steps", [error for what, error in unseen if what == "step"]),
        ("micro-batches", [error for what, error in unseen if what != "step"]),
    ):
        if errors:
            inside = sum(error <= _ALLOWED for error in errors)
            said.append(
                f"{inside} of {len(errors)} unseen {kind} within {_ALLOWED:g}%, the worst off by {max(errors):.0f}%"
            )
    return f"Fitted: {shown}. {'; '.join(said)}."


def main(arguments: list[str] | None = None) -> int:
    """Measure and print; with --output write the results too."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--steps", type=int, default=3, help="behind the first, of every repetition")
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall")
    parser.add_argument("--output", type=Path, help="write OUTPUT.json and OUTPUT.md")
    args = parser.parse_args(arguments)
    for name in ("repetitions", "steps"):
        check_positive(name, getattr(args, name))
    rows, fitted = rows_of(observe(args.repetitions, args.steps, args.clock), args.clock)
    note = f"{summary(rows, fitted)} The least of {args.repetitions} x {args.steps} steps; the cases took turns."
    print(f"{table(rows)}\n{note}")
    if args.output is not None:
        write_results(args.output, "The planner, calibrated", machine(), {"cases": rows}, note)
    return 0


if __name__ == "__main__":
    run_command(main)

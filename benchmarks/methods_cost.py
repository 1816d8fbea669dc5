"""What each method of conversion costs beside LLaDA2.0's schedule: model tokens and time for a document token.

    python -m benchmarks.methods_cost [--methods growth nbdiff ...] [--steps 8]

The runs are those of `benchmarks.methods_study`, with a few steps in each stage and nothing else: no validation, and an
AR model that has hardly been trained. All train on the same text, one run after the other, on one rank. A stage's time
is the median of its steps without the first; a method's is the mean over its stages, by their shares of the document
tokens. Where a mask opens, it does so over the steps that are measured. Model tokens are counted in the rows, padding
apart. Give it a machine with nothing else to do.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.guided_runs import base_stages, run_config
from benchmarks.methods_study import METHODS, MODEL, REFERENCE, method_run
from benchmarks.record import RESULTS, machine, write_results
from benchmarks.study_corpus import write_corpora
from benchmarks.study_cost import MANY, mean_operations, weighted_mean
from benchmarks.study_jobs import run, run_name
from megatron_dllm.config import LoggingConfig, StageConfig, TrainConfig
from megatron_dllm.config.rules import check, check_positive
from megatron_dllm.diffusion.block_schedule import max_batch_tokens
from megatron_dllm.run.command import run_command
from megatron_dllm.run.names import METRICS

_ROWS = 8  # of a step; more than the studies have, as longer steps vary less
NOTE = (
    "For a document token: tokens that the model computed, milliseconds of its steps on this machine, and "
    f"floating-point operations by the planner's formulas; beside {REFERENCE}, how many times as much. Times are of a "
    "tiny model, in which attention, experts and head have other shares than in a large one: `plan` computes those. "
    "jump and sdar compute the same: their times differ by as much as others may by chance."
)


@dataclass(frozen=True)
class Cost:
    """Of a document token, as means over the stages of a method.

    Attributes:
        model_tokens: that the model computed.
        seconds: of its steps.
        operations: floating-point operations, forward and backward.
    """

    model_tokens: float
    seconds: float
    operations: float


def cost_run(folder: Path, name: str, num_steps: int, rows: int = _ROWS) -> TrainConfig:
    """The run of a method with at least so many steps in each stage, logged one by one.

    Args:
        folder: of the runs; the AR model lies in it, the corpora beside it.
        name: of METHODS.
        num_steps: of a stage.
        rows: of a step.
    """
    config = method_run(folder, run_name(name), METHODS[name], 1, MANY, rows)
    row_length = config.schedule.tokens_per_row
    stages = {key: _short(stage, num_steps, row_length) for key, stage in config.schedule.stages.items()}
    return replace(
        config,
        schedule=replace(config.schedule, stages=stages),
        logging=LoggingConfig(interval_steps=1, tensorboard=False),
    )


def _short(stage: StageConfig, num_steps: int, row_length: int) -> StageConfig:
    """A stage of at least so many steps, over which its mask opens if it does."""
    anneal = stage.attention_anneal
    return replace(
        stage,
        num_tokens=num_steps * max_batch_tokens(stage, row_length, has_prompts=False),
        attention_anneal=None if anneal is None else replace(anneal, steps=num_steps),
    )


def cost_of(records: Iterable[Mapping[str, Any]], shares: Mapping[str, float], operations: float) -> Cost:
    """What a run's records say.

    Args:
        records: of its metrics.
        shares: of the document tokens, by stage.
        operations: of a document token.
    """
    steps: dict[str, list[Mapping[str, Any]]] = {name: [] for name in shares}
    for record in records:
        if "step_seconds" in record:
            steps[record["stage"]].append(record)
    seconds = {
        name: statistics.median(1.0 / step["tokens_per_second"] for step in found[1:]) for name, found in steps.items()
    }
    computed = {
        name: sum(step["forward_tokens_per_second"] * step["step_seconds"] for step in found)
        / sum(step["tokens_per_second"] * step["step_seconds"] for step in found)
        for name, found in steps.items()
    }
    return Cost(weighted_mean(computed, shares), weighted_mean(seconds, shares), operations)


def measure(folder: Path, name: str, num_steps: int, rows: int) -> Cost:
    """Train a method for a few steps of each stage; arguments are those of `cost_run`."""
    config = cost_run(folder, name, num_steps, rows)
    whole = method_run(folder, run_name(name), METHODS[name], 1, MANY, rows)
    run(config)
    lines = (Path(config.run.root) / config.run.name / METRICS).read_text(encoding="utf-8").splitlines()
    shares = {key: float(stage.num_tokens or 0) for key, stage in whole.schedule.stages.items()}
    return cost_of(map(json.loads, lines), shares, mean_operations(whole))


def rows_of(costs: Mapping[str, Cost]) -> list[dict[str, Any]]:
    """A row a method, in their order; what they cost beside the reference is given in its multiples."""
    base = costs[REFERENCE]
    return [
        {
            "method": name,
            "model tokens": f"{cost.model_tokens:.2f}",
            f"beside {REFERENCE}": f"{cost.model_tokens / base.model_tokens:.2f}",
            "ms a token": f"{1e3 * cost.seconds:.3f}",
            f"time beside {REFERENCE}": f"{cost.seconds / base.seconds:.2f}",
            f"operations beside {REFERENCE}": f"{cost.operations / base.operations:.2f}",
        }
        for name, cost in costs.items()
    ]


def validate(num_steps: int, rows: int) -> None:
    """Raise ValueError for numbers that no run could have."""
    check(
        num_steps >= 2,
        f"steps ({num_steps}) must be at least 2: the first one of a stage does not count; 8 tell methods apart.",
    )
    check_positive("rows", rows)


def main(arguments: list[str] | None = None) -> int:
    """Measure the methods, and write the table after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--steps", type=int, default=8, help="of each stage")
    parser.add_argument("--rows", type=int, default=_ROWS, help="of a step")
    parser.add_argument("--output", type=Path, default=RESULTS / "methods_cost", help="results, without suffix")
    options = parser.parse_args(arguments)
    validate(options.steps, options.rows)
    about = machine() | {"steps": options.steps, "rows": options.rows}
    names = list(dict.fromkeys([REFERENCE, *options.methods]))
    costs: dict[str, Cost] = {}
    with tempfile.TemporaryDirectory() as study:
        write_corpora(Path(study), num_documents=2000, num_chats=40, num_questions=2)
        folder = Path(study) / "runs"
        base_tokens = 4 * options.rows * MODEL.max_position_embeddings
        run(run_config(folder, "base", MODEL, 0, base_stages(base_tokens, options.rows)))
        for number, name in enumerate(names, 1):
            print(f"[{number}/{len(names)}] {name}", flush=True)
            costs[name] = measure(folder, name, options.steps, options.rows)
            write_results(options.output, "What methods cost", about, {"methods": rows_of(costs)}, NOTE)
    print(f"wrote {options.output}.json and {options.output}.md")
    return 0


if __name__ == "__main__":
    run_command(main)

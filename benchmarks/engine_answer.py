"""What the engine itself says of a recipe on so many GPUs: memory, work and traffic of one rank of each kind.

    python -m benchmarks.engine_answer --world_size 512 experiment=llada2_flash data.train=x checkpoint.load=x

The words behind the options are those of `train`; corpora and checkpoints are not read. No GPU is needed: each rank is
built and runs some micro-batches with tensors that have shapes alone.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

from benchmarks.record import RESULTS, machine, write_results
from megatron_dllm.compose import compose_train_config
from megatron_dllm.config import TrainConfig
from megatron_dllm.run.command import run_command

NOTE = (
    "GB of 10^9 bytes at the moment of a step at which the rank holds the most, without what the device and its "
    "libraries take. TFLOP of one step and rank, recomputation included. Rows are full and experts are chosen evenly; "
    "a GPU without TransformerEngine. seconds: of this CPU, to find out."
)


def rows_of(config: TrainConfig, world_size: int, stages: list[str], ranks: list[int]) -> tuple[list[Any], list[Any]]:
    """Memory of every rank and stage, and their traffic."""
    from megatron_dllm.planning.engine import distinct_ranks, measure, stage_of

    memory, traffic = [], []
    for stage in stages or list(config.schedule.stages):
        layout = config.layout_of(stage_of(config, stage))
        for rank in ranks or distinct_ranks(layout, world_size):
            started = time.perf_counter()
            answer = measure(config, layout, world_size, rank, stage).worst
            seconds = time.perf_counter() - started
            parts = ("weights", "gradients", "optimizer", "activations", "head", "total")
            sizes = {name: round(getattr(answer.memory, name) / 1e9, 2) for name in parts}
            memory.append(
                dict(stage=stage, rank=rank, parameters_e9=round(answer.num_parameters / 1e9, 3))
                | sizes
                | dict(tflop=round(answer.flops / 1e12, 1), seconds=round(seconds, 1))
            )
            print(memory[-1], flush=True)
            for entry in answer.traffic:
                size = round(entry.num_bytes / 1e9, 3)
                traffic.append(
                    dict(stage=stage, rank=rank, kind=entry.kind, group=entry.group, ranks=len(entry.ranks))
                    | dict(calls=entry.calls, gb=size)
                )
    return memory, traffic


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line, print and write the tables; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="+", help="of train: experiment=NAME key=value ...")
    parser.add_argument("--world_size", type=int, required=True)
    parser.add_argument("--stages", nargs="+", default=[], help="of the schedule; all of them unless given")
    parser.add_argument("--ranks", type=int, nargs="+", default=[], help="one of each kind unless given")
    parser.add_argument("--output", type=Path, default=RESULTS / "engine_answer", help="without suffix")
    args = parser.parse_args(arguments)
    memory, traffic = rows_of(compose_train_config(args.words), args.world_size, args.stages, args.ranks)
    tables = {"memory": memory, "traffic": traffic}
    write_results(args.output, "What the engine says of a recipe", machine(), tables, NOTE)
    return 0


if __name__ == "__main__":
    run_command(main)

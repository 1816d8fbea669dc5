"""Elements that a rank holds: the closed form against the engine, on random layouts of the real models.

    python -m benchmarks.layout_parameters --number 70        # of each model; half a minute of CPU for ten

The engine builds the rank's part of the model with weights that have shapes alone, so no GPU is needed.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks.record import RESULTS, machine, write_results
from megatron_dllm.compose import compose_train_config
from megatron_dllm.config import ModelConfig, ParallelConfig
from megatron_dllm.planning.parameters import pipeline_ranks, rank_weights
from megatron_dllm.planning.search import layouts
from megatron_dllm.run.command import run_command

MODELS = ("ling_mini", "ling_flash", "qwen3_30b_a3b")
NUM_GPUS = (8, 16, 64, 512)
NOTE = (
    "Layouts are drawn evenly from those that the search tries on 8, 16, 64 or 512 GPUs in nodes of 8, and of each any "
    "rank. The closed form has to give the engine's number of elements exactly."
)


def any_layout(draw: random.Random, model: ModelConfig, num_ranks: int) -> ParallelConfig:
    """One of the layouts of the search that are valid on so many ranks."""
    found = list(layouts(model, ParallelConfig(precision="bf16"), num_ranks, 8))
    while True:
        layout = draw.choice(found)
        try:
            layout.validate(num_ranks, model)
        except ValueError:
            continue
        return layout


def compare(name: str, number: int, seed: int) -> list[dict[str, Any]]:
    """Closed form and engine on random layouts.

    Args:
        name: of the model's recipe.
        number: of layouts.
        seed: of the draw.

    Returns:
        A row for each: sizes of the layout, rank, and the elements by both.
    """
    from megatron_dllm.planning.engine import num_parameters

    draw = random.Random(f"{name} {seed}")
    config = compose_train_config([f"model={name}", "data.train=x", "run.name=x"])
    rows = []
    for _ in tqdm(range(number), desc=name, disable=None):
        num_ranks = draw.choice(NUM_GPUS)
        layout = any_layout(draw, config.model, num_ranks)
        rank, ranks = draw.randrange(num_ranks), pipeline_ranks(config.model, layout)
        rows.append(
            dict(
                model=name,
                gpus=num_ranks,
                tp=layout.tensor_model_parallel_size,
                pp=layout.pipeline_model_parallel_size,
                pieces=layout.virtual_pipeline_model_parallel_size or 1,
                ep=layout.expert_model_parallel_size,
                rank=rank,
                closed_form=rank_weights(config.model, layout, ranks[rank * len(ranks) // num_ranks]).total,
                engine=num_parameters(config, layout, num_ranks, rank),
            )
        )
    return rows


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line, print and write the table; returns the exit code: 1 where the two differ."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--number", type=int, default=70, help="of layouts of each model")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=RESULTS / "layout_parameters", help="without suffix")
    args = parser.parse_args(arguments)
    rows = [row for name in MODELS for row in compare(name, args.number, args.seed)]
    different = [row for row in rows if row["closed_form"] != row["engine"]]
    summary = [dict(layouts=len(rows), different=len(different))]
    write_results(args.output, "Elements of a rank", machine(), {"summary": summary, "layouts": rows}, NOTE)
    return int(bool(different))


if __name__ == "__main__":
    run_command(main)

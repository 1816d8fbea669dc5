"""Is a clean half that stays autoregressive worth it? Arms at equal floating-point operations, over seeds.

    python -m benchmarks.ar_guided [--sizes tiny triple] [--seeds 5 3] [--weights 0.2 0.5 1 3.3]

The claim: with clean blocks of one and an AR loss, the warmup reaches the ELBO of the report's warmup in at most half
the tokens, and a short last stage with the report's blocks keeps that. All arms convert the same AR model
(`benchmarks.guided_runs`). The ELBO is measured under the mask that a server computes; beside it stand the ELBO under
the mask of the last stage, where that is another one, and the exact NLL of the next token by the same weights.

A run that is there is not repeated, and one that was interrupted goes on: the command may be stopped and given again.
Runs with other numbers of tokens have a folder of their own, so that a short trial leaves nothing in the table.
The table and the picture hold what has been measured so far.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.guided_runs import (
    HELD_OUT_TOKENS,
    SIZES,
    TARGET,
    Arm,
    arm_tokens,
    arms,
    base_stages,
    operations,
    run_config,
    write_corpora,
)
from benchmarks.guided_table import write_study
from benchmarks.ranks import run_ranks
from benchmarks.record import RESULTS, machine
from benchmarks.tiny_run import read_metrics, train_here
from megatron_dllm.checkpoint.validation import read_validation_file
from megatron_dllm.config import TrainConfig
from megatron_dllm.run.command import run_command
from megatron_dllm.run.files import write_json

RESULT = "result.json"
NUM_SEEDS = {"tiny": 5, "triple": 3}
_LIMIT_S = 24 * 3600.0


def run_name(name: str, *others: object) -> str:
    """Of the run of an arm or method, which has words in its name, with what else tells it apart."""
    return "_".join([name.replace(", ", "_").replace(" ", "_"), *map(str, others)])


def num_seeds_of(sizes: Sequence[str], given: Sequence[int] | None) -> dict[str, int]:
    """Number of seeds of each size.

    Args:
        sizes: of the model.
        given: a number for each of them; None: NUM_SEEDS.

    Raises:
        ValueError: there are more or fewer numbers than sizes, or one below 1.
    """
    numbers = [NUM_SEEDS[size] for size in sizes] if given is None else given
    if len(numbers) != len(sizes) or min(numbers) < 1:
        raise ValueError(
            f"seeds ({' '.join(map(str, numbers))}) must be one number of at least 1 for each of the sizes "
            f"({' '.join(sizes)}); give {len(sizes)}."
        )
    return dict(zip(sizes, numbers, strict=True))


def run(config: TrainConfig) -> float:
    """Train, or go on; returns the seconds."""
    begun = time.perf_counter()
    (code,) = run_ranks(train_here, 1, config, timeout_s=_LIMIT_S)
    assert code == 0, f"{config.run.name} ended with code {code}"
    return time.perf_counter() - begun


def measure(folder: Path, size: str, name: str, arm: Arm, seed: int, num_tokens: int) -> None:
    """Convert by one arm with one seed, and write down what came of it."""
    model, target = SIZES[size], folder / run_name(name, seed)
    if (target / RESULT).is_file():
        return
    tokens = arm_tokens(model, arm, num_tokens)
    stages = arm.stages(tokens)
    config = run_config(folder, target.name, model, seed, stages)
    seconds = run(config)
    ends = [record for record in read_metrics(config) if record.get("validation")]
    cost = sum(stage.num_tokens * operations(model, stage) for stage in stages.values() if stage.num_tokens)
    is_served = stages["last"].clean_grid == TARGET
    write_json(
        target / RESULT,
        {
            "size": size,
            "arm": name,
            "seed": seed,
            "document_tokens": round(tokens),
            "operations": cost,
            "elbo": ends[-1][f"validation_elbo/{TARGET}"],
            "own_elbo": ends[-1][f"validation_elbo/{TARGET}"] if is_served else _own_elbo(target, folder),
            "ar_nll": ends[-1]["validation_elbo/ar"],
            "curve": [(end["consumed_tokens"] / tokens * cost, end[f"validation_elbo/{TARGET}"]) for end in ends],
            "seconds": seconds,
        },
    )


def _own_elbo(target: Path, folder: Path) -> float:
    """The ELBO of a run under the mask that it was trained with, in nats per token."""
    output = target / "own_mask.json"
    words = [f"checkpoint.load={target}", f"data.validation={folder.parent / 'validation'}", f"output={output}"]
    words += [
        "evaluation.clean_block_size=1",
        f"evaluation.num_tokens={HELD_OUT_TOKENS}",
        "evaluation.micro_batch_size=8",
    ]
    subprocess.run([sys.executable, "-m", "megatron_dllm.evaluate", *words, "overwrite=true"], check=True)
    found = read_validation_file(output).elbo
    assert found is not None, f"{output} has no ELBO at {TARGET}"
    return found


def main(arguments: list[str] | None = None) -> int:
    """Run what is missing, and write the table after each run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--study", type=Path, default=Path("runs/ar_guided"), help="folder of the runs")
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=list(SIZES))
    parser.add_argument("--seeds", type=int, nargs="+", help="number of seeds of each size; 5 of tiny, 3 of triple")
    parser.add_argument("--weights", type=float, nargs="+", default=[0.5, 0.2, 1.0, 3.3], help="of the AR loss")
    parser.add_argument("--tokens", type=int, default=800_000, help="document tokens of the arm with the report's mask")
    parser.add_argument("--base_tokens", type=int, default=3_000_000, help="document tokens of the AR model")
    parser.add_argument("--output", type=Path, default=RESULTS / "ar_guided", help="results, without suffix")
    options = parser.parse_args(arguments)
    seeds_of_size = num_seeds_of(options.sizes, options.seeds)
    write_corpora(options.study)
    about: dict[str, Any] = machine() | {"tokens": options.tokens, "base_tokens": options.base_tokens}
    # Runs of other lengths lie elsewhere: they are neither gone on with nor put into this table.
    lengths = f"{options.base_tokens}_{options.tokens}"
    for size, num_seeds in seeds_of_size.items():
        folder = options.study / f"{size}_{lengths}"
        run(run_config(folder, "base", SIZES[size], 0, base_stages(options.base_tokens)))
        for seed in range(1, num_seeds + 1):
            for name, arm in arms(options.weights).items():
                measure(folder, size, name, arm, seed, options.tokens)
                write_study(options.study.glob(f"*_{lengths}/*/{RESULT}"), options.output, about)
    return 0


if __name__ == "__main__":
    run_command(main)

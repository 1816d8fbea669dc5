"""Is a clean half that stays autoregressive worth it? Arms at equal floating-point operations, over seeds.

    python -m benchmarks.ar_guided [--sizes tiny triple] [--seeds 5 3] [--weights 0.5 0.2 1 3.3]

The claim: with clean blocks of one and an AR loss, the warmup reaches the ELBO of the report's warmup in at most half
the tokens, and a short last stage with the report's blocks keeps that. All arms convert the same AR model
(`benchmarks.guided_runs`). The ELBO is measured under the mask that a server computes; beside it stand the ELBO under
the mask of the last stage, where that is another one, the exact NLL of the next token by the same weights, and what
answers are worth after the same short fine-tuning (`benchmarks.study_answers`).

The arms with the first weight come first, seed by seed, then the other weights. A job that has its result is not
repeated, and one that was interrupted goes on: the command may be stopped and given again. Runs of other lengths have a
folder of their own, so that a short trial leaves nothing in the table. Table and picture are written after each arm.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.guided_runs import ROWS, SIZES, TARGET, Arm, arm_run, arms, base_stages, run_config
from benchmarks.guided_table import write_study
from benchmarks.record import RESULTS, machine
from benchmarks.study_answers import answers_of, fine_tuning
from benchmarks.study_corpus import write_corpora
from benchmarks.study_cost import MANY, check_tokens, mean_operations
from benchmarks.study_jobs import RESULT, Job, Lengths, base_job, held_out_nats, num_tokens, run, run_jobs, run_name
from benchmarks.tiny_run import read_metrics
from megatron_dllm.config import TrainConfig
from megatron_dllm.config.rules import check_positive
from megatron_dllm.run.command import run_command

NUM_SEEDS = {"tiny": 5, "triple": 3}


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


def validate(sizes: Sequence[str], weights: Sequence[float], lengths: Lengths) -> None:
    """Raise ValueError for an impossible weight, and where a stage would be shorter than a step."""
    check_positive("rows", lengths.rows)
    nowhere, models = Path("runs"), [SIZES[size] for size in sizes]
    bases = [run_config(nowhere, "base", model, 0, base_stages(MANY, lengths.rows)) for model in models]
    check_tokens("base_tokens", lengths.base_tokens, bases)
    chosen = arms(weights).values()
    runs = [arm_run(nowhere, "run", model, arm, 1, MANY, lengths.rows) for model in models for arm in chosen]
    runs += [fine_tuning(found, MANY) for found in runs]
    for found in runs:
        found.validate(1)
    check_tokens("tokens", lengths.tokens, runs)


def jobs_of(study: Path, size: str, num_seeds: int, weights: Sequence[float], lengths: Lengths) -> Iterator[Job]:
    """The AR model of a size, and the arms that convert it, in the order in which they run.

    Args:
        study: folder of the runs, with the corpora.
        size: of the model.
        num_seeds: seeds of each arm.
        weights: of the AR loss.
        lengths: of the runs.
    """
    folder, model = study / f"{size}_{lengths.name}", SIZES[size]
    base = run_config(folder, "base", model, 0, base_stages(lengths.base_tokens, lengths.rows))
    yield base_job(base, f"{size}, AR model")
    for number in range(1, len(weights) + 1):
        before = arms(weights[: number - 1]) if number > 1 else {}
        new = {name: arm for name, arm in arms(weights[:number]).items() if name not in before}
        for seed in range(1, num_seeds + 1):
            yield from (_arm_job(folder, size, name, arm, seed, lengths) for name, arm in new.items())


def _arm_job(folder: Path, size: str, name: str, arm: Arm, seed: int, lengths: Lengths) -> Job:
    config = arm_run(folder, run_name(name, seed), SIZES[size], arm, seed, lengths.tokens, lengths.rows)
    about = {"size": size, "arm": name, "seed": seed, "document_tokens": num_tokens(config)}
    cost = num_tokens(config) * mean_operations(config)
    taught = fine_tuning(config, lengths.tokens)
    return Job(
        f"{size}, seed {seed}, {name}",
        folder / config.run.name / RESULT,
        cost + num_tokens(taught) * mean_operations(taught),
        lambda: {**about, **measure(config, cost, lengths.tokens)},
    )


def measure(config: TrainConfig, cost: float, study_tokens: int) -> Mapping[str, Any]:
    """Convert by one arm with one seed, fine-tune, and say what came of it.

    Args:
        config: of the conversion.
        cost: its floating-point operations.
        study_tokens: document tokens of the study.
    """
    run(config)
    ends = [record for record in read_metrics(config) if record.get("validation")]
    served = ends[-1][f"validation_elbo/{TARGET}"]
    is_served = config.schedule.stages["last"].clean_grid == TARGET
    total = num_tokens(config)
    return {
        "conversion_operations": cost,
        "elbo": served,
        "own_elbo": served if is_served else own_elbo(config),
        "ar_nll": ends[-1]["validation_elbo/ar"],
        "curve": [(end["consumed_tokens"] / total * cost, end[f"validation_elbo/{TARGET}"]) for end in ends],
        **asdict(answers_of(config, study_tokens)),
    }


def own_elbo(config: TrainConfig) -> float:
    """The ELBO of a run with clean blocks of one under that mask, in nats per token."""
    return held_out_nats(config, "evaluation.clean_block_size=1")[str(TARGET)]


def main(arguments: list[str] | None = None) -> int:
    """Run what is missing, and write the table after each arm."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--study", type=Path, default=Path("runs/ar_guided"), help="folder of the runs")
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=list(SIZES))
    parser.add_argument("--seeds", type=int, nargs="+", help="number of seeds of each size; 5 of tiny, 3 of triple")
    parser.add_argument("--weights", type=float, nargs="+", default=[0.5, 0.2, 1.0, 3.3], help="of the AR loss")
    parser.add_argument("--tokens", type=int, default=150_000, help="document tokens of the arm with the report's mask")
    parser.add_argument("--base_tokens", type=int, default=2_400_000, help="document tokens of the AR model")
    parser.add_argument("--rows", type=int, default=ROWS, help="of a step")
    parser.add_argument("--output", type=Path, default=RESULTS / "ar_guided", help="results, without suffix")
    options = parser.parse_args(arguments)
    lengths = Lengths(options.tokens, options.base_tokens, options.rows)
    seeds_of_size = num_seeds_of(options.sizes, options.seeds)
    validate(options.sizes, options.weights, lengths)
    write_corpora(options.study)
    about: dict[str, Any] = machine() | asdict(lengths)
    jobs = [
        job
        for size, num_seeds in seeds_of_size.items()
        for job in jobs_of(options.study, size, num_seeds, options.weights, lengths)
    ]
    run_jobs(jobs, lambda: write_study(options.study.glob(f"*_{lengths.name}/*/{RESULT}"), options.output, about))
    return 0


if __name__ == "__main__":
    run_command(main)

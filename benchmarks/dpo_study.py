"""Collect the study of preferences: mean and spread over seeds, as JSON, Markdown and a picture.

The last job of `make dpo-study`; run it again with `python -m benchmarks.dpo_study --study runs/dpo_study`.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.record import origin
from benchmarks.seeds import png, spread
from megatron_dllm.evaluation.answer_scores import TaskScore, read_answer_scores
from megatron_dllm.evaluation.scores_file import open_scores
from megatron_dllm.run.files import write_bytes, write_json, write_text

ARMS = {
    "k1": "1 view",
    "k4": "4 views",
    "k8": "8 views",
    "k1_apart": "1 view, masks not shared with the reference",
    "k4_apart": "4 views, not shared",
    "k8_apart": "8 views, not shared",
}
START = "start"  # the model before preferences
THRESHOLD = 0.9
RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Measured:
    """What one seed of an arm came to on held-out questions and pairs.

    Attributes:
        accuracy: share of right answers.
        of_tasks: the same by task.
        margin_accuracy: share of held-out pairs that the model has moved towards the chosen side, from where it began.
        elbo_chosen: nats of a chosen answer, its fill included.
        elbo_rejected: of a rejected one.
    """

    accuracy: float
    of_tasks: dict[str, float]
    margin_accuracy: float
    elbo_chosen: float
    elbo_rejected: float


def measured(answers: Path, scores: NDArray[np.float32], start: NDArray[np.float32]) -> Measured:
    """One seed of an arm.

    Args:
        answers: file of its answers.
        scores: [d] fp32 its scores of the sides of held-out pairs, chosen and rejected in turn.
        start: [d] fp32 those of the model it started from.
    """
    found = read_answer_scores(answers)
    tasks = next(entry.tasks for entry in found.thresholds if entry.threshold == THRESHOLD)
    gain = scores.astype(np.float64) - start
    return Measured(
        accuracy=TaskScore.total(tasks.values()).accuracy,
        of_tasks={name: score.accuracy for name, score in tasks.items()},
        margin_accuracy=float((gain[0::2] > gain[1::2]).mean()),
        elbo_chosen=-float(scores[0::2].mean()),
        elbo_rejected=-float(scores[1::2].mean()),
    )


def held_out_scores(path: Path) -> NDArray[np.float32]:
    """[d] fp32 scores of documents, means over views of the first epoch."""
    means: NDArray[np.float32] = open_scores(path).by_view[0].mean(axis=1)
    return means


def collect(study: Path) -> dict[str, list[Measured]]:
    """By arm, what every seed came to; the model before preferences too.

    Raises:
        ValueError: a measurement is missing or damaged.
    """
    start = held_out_scores(study / f"held_out_{START}.scores")
    found = {START: [measured(study / f"answers_{START}.json", start, start)]}
    for arm in ARMS:
        names = sorted(path.stem.removeprefix("answers_") for path in study.glob(f"answers_{arm}_[0-9].json"))
        found[arm] = [
            measured(study / f"answers_{name}.json", held_out_scores(study / f"held_out_{name}.scores"), start)
            for name in names
        ]
    counts = {arm: len(seeds) for arm, seeds in found.items() if arm != START}
    if min(counts.values()) < 2 or len(set(counts.values())) > 1:
        raise ValueError(f"study ({study}) has measured {counts} seeds; finish it first.")
    return found


def to_markdown(study: dict[str, list[Measured]]) -> str:
    """A line for each arm."""
    names = list(study[START][0].of_tasks)
    heads = ["arm", "accuracy", *names, "margin accuracy", "nats of chosen answers", "nats of rejected answers"]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for arm, seeds in study.items():
        columns = [[seed.accuracy for seed in seeds], *([seed.of_tasks[name] for seed in seeds] for name in names)]
        columns.append([] if arm == START else [seed.margin_accuracy for seed in seeds])
        columns += [[seed.elbo_chosen for seed in seeds], [seed.elbo_rejected for seed in seeds]]
        label = "before preferences" if arm == START else ARMS[arm]
        lines.append(f"| {label} | " + " | ".join(spread(column, 3) for column in columns) + " |")
    return "\n".join(lines) + "\n"


def picture(study: dict[str, list[Measured]]) -> bytes:
    """PNG: accuracy and margin accuracy of every arm, a dot a seed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for axis, name in ((left, "accuracy"), (right, "margin_accuracy")):
        for place, arm in enumerate(ARMS):
            values = [getattr(seed, name) for seed in study[arm]]
            axis.plot(values, [place] * len(values), "o", color="#d1495b" if "apart" in arm else "#00798c", alpha=0.7)
        axis.set_yticks(range(len(ARMS)), list(ARMS.values()))
        axis.set_title(f"{name.replace('_', ' ')}, held out", fontsize=10)
    left.axvline(study[START][0].accuracy, color="#777777", lw=1, label="before preferences")
    right.axvline(0.5, color="#777777", lw=1, ls=":")
    left.legend(fontsize=8)
    left.invert_yaxis()
    return png(figure)


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line, print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--study", type=Path, default=Path("runs/dpo_study"))
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder to write the tables to")
    options = parser.parse_args(arguments)
    try:
        study = collect(options.study)
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    options.results.mkdir(exist_ok=True)
    table = {arm: [vars(seed) for seed in seeds] for arm, seeds in study.items()}
    write_json(options.results / "tiny_dpo_study.json", table, sort_keys=True)
    num_seeds = len(next(iter(seeds for arm, seeds in study.items() if arm != START)))
    lead = (
        f"Preferences on the demo's tasks: held-out questions at threshold {THRESHOLD}, and held-out pairs of the "
        f"start's own answers; mean ± standard deviation over {num_seeds} seeds\n\n{origin()}\n\n"
    )
    write_text(options.results / "tiny_dpo_study.md", lead + to_markdown(study))
    write_bytes(options.results / "tiny_dpo_study.png", picture(study))
    print(lead + to_markdown(study))
    return 0


if __name__ == "__main__":
    sys.exit(main())

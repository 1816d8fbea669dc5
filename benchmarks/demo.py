"""Record what a finished demo came to: `python -m benchmarks.demo [--demo runs/demo]`, the end of `make demo-record`.

Writes the tables of the README into benchmarks/results/demo.md and .json: what every model measures, right answers and
tokens per forward pass by threshold, and the time of each job by the clock; and the two pictures that stand there into
docs/images, so that they show the same run.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.record import RESULTS, Rows, machine, table, write_results
from megatron_dllm.reporting.answers import read_answers
from megatron_dllm.reporting.history import History, read_history
from megatron_dllm.reporting.pictures import answers_picture, elbo_picture
from megatron_dllm.reporting.results import drawn_beside, results
from megatron_dllm.run.command import run_command
from megatron_dllm.run.files import write_bytes

IMAGES = Path(__file__).parents[1] / "docs" / "images"
NOTE = (
    "nats are per token of the held-out text, an exact NLL or the ELBO; right answers are shares of the held-out "
    "questions, decoded greedily; seconds are by the clock, on a machine that did whatever else it did."
)


def tables_of(folder: Path) -> dict[str, Rows]:
    """The tables of a demo, by title.

    Raises:
        ValueError: it has not been finished, or a file of it is damaged.
    """
    history = read_history(folder)
    tables = {"models": _models(history), "answers": _answers(history), "time": _times(history)}
    for title in ("models", "answers"):
        if not tables[title]:
            raise ValueError(f"demo ({folder}) has no {title} to record; finish it with make demo.")
    return {title: rows for title, rows in tables.items() if rows}  # only a chain knows the time of its jobs


def pictures_of(folder: Path) -> dict[str, bytes]:
    """PNG of the pictures of a demo, by name: the validations of its conversion, and its answers over thresholds."""
    history = read_history(folder)
    converted = history.validated[-1]
    checkpoints, ar_nll = drawn_beside(converted, history)
    return {
        "demo_elbo": elbo_picture(converted.validations, ar_nll, checkpoints),
        "demo_answers": answers_picture(read_answers(history)),
    }


def _models(history: History) -> Rows:
    names = ("model", "measure", "nats/token", "bits/byte")
    return [dict(zip(names, line.cells(), strict=True)) for line in results(history)]


def _answers(history: History) -> Rows:
    rows = []
    for name, scores in read_answers(history).items():
        for entry in scores.thresholds:
            shares = {task: f"{score.accuracy:.2f}" for task, score in entry.tasks.items()}
            total = entry.all_tasks
            rows.append(
                {"model": name, "threshold": f"{entry.threshold:g}", **shares}
                | {"all": f"{total.accuracy:.2f}", "tokens per forward": f"{total.tokens_per_forward:.2f}"}
            )
    return rows


def _times(history: History) -> Rows:
    seconds = {duration.job: duration.seconds for duration in history.durations}
    if seconds:
        seconds["all"] = sum(seconds.values())
    return [{"job": job, "seconds": f"{value:.0f}"} for job, value in seconds.items()]


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line, print and write the tables; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", type=Path, default=Path("runs/demo"), help="folder of the demo")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder to write the tables to")
    parser.add_argument("--images", type=Path, default=IMAGES, help="folder to draw the pictures into")
    options = parser.parse_args(arguments)
    tables = tables_of(options.demo)
    for title, rows in tables.items():
        print(f"{title}\n\n{table(rows)}")
    write_results(options.results / "demo", "The demo", machine(), tables, NOTE)
    for name, content in pictures_of(options.demo).items():
        write_bytes(options.images / f"{name}.png", content)
    print(f"wrote {options.results / 'demo'}.json and .md, and two pictures into {options.images}")
    return 0


if __name__ == "__main__":
    run_command(main)

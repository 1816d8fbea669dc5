"""One page about a run or a chain of runs; or a table of what tasks made of several checkpoints.

    python -m megatron_dllm.report RUN [--output FILE]
    python -m megatron_dllm.report compare [NAME=]PLACE ... [--output FILE.json]

RUN is the folder of a run, or of a chain (a folder of runs). Writes RUN/report.html, which needs no other file, and
prints the table of results. Whatever was not recorded is left out of the page.

A PLACE is a file of megatron_dllm.harness, or a folder that holds some: of weights, a run or a chain. The table has a
column for each checkpoint, a line for each number, and says which settings were not the same.
"""

from __future__ import annotations

from megatron_dllm.run.command import listen, run_command

if __name__ == "__main__":
    listen()

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from megatron_dllm.run.files import parents_made, write_json, write_text
from megatron_dllm.run.stream import check_new, check_writable


def write_report(folder: Path, output: Path | None = None) -> Path:
    """Write the page and print the table; returns the file.

    Raises:
        ValueError: the folder holds no run, or a file in it is damaged.
    """
    output = output or folder / "report.html"
    if folder.is_dir():  # else that is what is wrong
        check_writable(output)
    # Imported here because it takes seconds, and a mistake in the arguments should show at once.
    from megatron_dllm.reporting.history import read_history
    from megatron_dllm.reporting.page import format_seconds, page, tokens_per_forward
    from megatron_dllm.reporting.results import results

    history = read_history(folder)
    lines = results(history)
    text = page(history, lines)
    console = Console(highlight=False, soft_wrap=True)
    if lines:
        table = Table("model", "measure", "nats/token", "bits/byte")
        for line in lines:
            table.add_row(*map(Text, line.cells()))
        console.print(table)
    rate = tokens_per_forward(history.samples)
    if rate is not None:
        console.print(f"tokens per forward: {rate:.2f}")
    if history.durations:
        times = ", ".join(f"{duration.job} {format_seconds(duration.seconds)}" for duration in history.durations)
        console.print(Text(f"time: {times}"))
    with parents_made(output):
        write_text(output, text)
    console.print(Text(f"report: {output}"))
    return output


def compare(places: Sequence[str], output: Path | None) -> None:
    """Print the table of several checkpoints, and write its numbers.

    Args:
        places: where their results lie, each with a name before it or not.
        output: JSON file; None: none.

    Raises:
        ValueError: nothing was measured at a place, or a file is damaged or exists.
    """
    if output is not None:
        check_new(output)
    from megatron_dllm.reporting.comparison import differences, lines_of, read_models, to_json

    models = read_models(places)
    table = Table("")
    for model in models:
        table.add_column(Text(model.name))
    for line in lines_of(models):
        table.add_row(*map(Text, (line.measure, *line.cells)))
    # A file or a narrow terminal would cut the columns short.
    console = Console(highlight=False, soft_wrap=True, width=max(Console().width, 50 + 30 * len(models)))
    console.print(table)
    for text in differences(models):
        console.print(Text(f"not the same for all: {text}"))
    if output is not None:
        with parents_made(output):
            write_json(output, to_json(models))
        console.print(Text(f"written to {output}"))


def _compare_main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m megatron_dllm.report compare", description="Print what tasks made of several checkpoints."
    )
    parser.add_argument("places", nargs="+", metavar="[NAME=]PLACE", help="file of harness, or a folder that holds one")
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="write the numbers, too")
    options = parser.parse_args(arguments)
    compare(options.places, options.output)
    return 0


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line and write the report; returns the exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments[:1] == ["compare"]:
        return _compare_main(arguments[1:])
    parser = argparse.ArgumentParser(
        prog="python -m megatron_dllm.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, metavar="RUN", help="folder of a run or a chain, e.g. runs/demo")
    parser.add_argument("--output", type=Path, help="file to write instead of RUN/report.html")
    options = parser.parse_args(arguments)
    # A notebook's display has no part in pictures that go to a file; matplotlib refuses a name it does not know.
    os.environ.pop("MPLBACKEND", None)
    write_report(options.folder, options.output)
    return 0


if __name__ == "__main__":
    run_command(main)

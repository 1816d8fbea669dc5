"""Collect the study of conversion: mean and spread over seeds, as JSON and Markdown.

The last job of `make study`; run it again with `python -m benchmarks.study --study runs/study`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

from megatron_dllm.checkpoint import folder as folders
from megatron_dllm.checkpoint.validation import validation_elbo
from megatron_dllm.run.files import write_json, write_text
from megatron_dllm.run.names import CHECKPOINTS

ARMS = {
    "wsd": "WSD from the AR base",
    "direct": "direct switch to block 32 from the AR base",
    "scratch": "WSD from random weights",
}
RESULTS = Path(__file__).parent / "results"


def collect(study: Path) -> dict[str, dict[str, list[float]]]:
    """By arm: validation ELBO at block 32 (nats per token) of the last, best and merged checkpoint of every seed."""
    table: dict[str, dict[str, list[float]]] = {}
    for arm in ARMS:
        entry: dict[str, list[float]] = {"last": [], "best": [], "merged": []}
        for run in sorted(study.glob(f"{arm}_[0-9]")):
            elbos = [
                elbo
                for folder in folders.list_checkpoints(run / CHECKPOINTS)
                if (elbo := validation_elbo(folder)) is not None
            ]
            merged = validation_elbo(study / f"{run.name}_merged")
            if not elbos or merged is None:
                raise ValueError(f"{run} has no evaluated checkpoints or no merge; finish the study first.")
            entry["last"].append(elbos[-1])
            entry["best"].append(min(elbos))
            entry["merged"].append(merged)
        table[arm] = entry
    return table


def to_markdown(table: dict[str, dict[str, list[float]]]) -> str:
    """The table with mean and standard deviation over seeds."""
    lines = ["| arm | seeds | last checkpoint | best checkpoint | merge of 5 |", "|---|---|---|---|---|"]
    for arm, entry in table.items():
        cells = [f"{statistics.mean(values):.4f} ± {statistics.stdev(values):.4f}" for values in entry.values()]
        lines.append(f"| {ARMS[arm]} | {len(entry['last'])} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line, print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--study", type=Path, default=Path("runs/study"))
    try:
        table: dict[str, Any] = collect(parser.parse_args(arguments).study)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    RESULTS.mkdir(exist_ok=True)
    write_json(RESULTS / "tiny_study.json", table, sort_keys=True)
    text = "Validation ELBO at block 32, nats per token (mean ± standard deviation over seeds; lower is better)\n\n"
    write_text(RESULTS / "tiny_study.md", text + to_markdown(table))
    print(text + to_markdown(table))
    print(json.dumps(table))
    return 0


if __name__ == "__main__":
    sys.exit(main())

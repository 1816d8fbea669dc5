"""The table of a small run to a longer context.

    python -m benchmarks.tiny_long --plain plain.json --stretched stretched.json --trained trained.json

From three measurements of the same texts, which docs/long_context.md names: needles by length and the ELBO by position
of the demo's model without a scaling, with one at inference alone, and after `experiment=tiny_long`; beside them what
that run validated. Writes benchmarks/results/tiny_long.json and .md, and the picture docs/images/long_context.png.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.record import RESULTS, Rows, machine, write_results
from benchmarks.seeds import png
from megatron_dllm.run.command import run_command
from megatron_dllm.run.files import read_json_lines, read_json_object, write_bytes
from megatron_dllm.run.names import METRICS

Measured = Mapping[str, Any]
IMAGES = RESULTS.parents[1] / "docs" / "images"
NAMES = {"plain": "no scaling", "stretched": "scaling at inference alone", "trained": "after the run"}
SAME = ("corpus", "block_size", "likelihood", "needle", "question", "answer", "num_choices", "seed")
# What has to be the same of every cell of these tables.
SAME_CELLS = {"needles": ("length", "depth", "num_needles"), "by_position": ("start", "stop", "num_documents")}
NOTE = (
    "right: needles of all depths that were found among `num_choices` values; nats: of the right value; gain: nats by "
    "which it is likelier than the mean of the wrong ones; ± is the standard error of the mean over documents, which "
    "are the same ones in every column."
)


def read(files: Mapping[str, Path]) -> Mapping[str, Measured]:
    """The measurements by name.

    Raises:
        ValueError: a file is damaged, or two have not measured the same texts in the same way.
    """
    found = {name: read_json_object(path, "measure again") for name, path in files.items()}
    first, *others = found.values()
    for name in SAME:
        if any(other.get(name) != first.get(name) for other in others):
            values = ", ".join(str(one.get(name)) for one in found.values())
            raise ValueError(f"{name} ({values}) must be the same in all three; measure with the same words.")
    for name in SAME_CELLS:
        expected = _cells(first, name)
        for path, one in zip(files.values(), found.values(), strict=True):
            if not expected or _cells(one, name) != expected:
                raise ValueError(
                    f"{name} of {path} must be there, and the same cells in all three; measure with the same words."
                )
    return found


def _cells(measured: Measured, name: str) -> list[tuple[Any, ...]]:
    """What a table measured, and on how many texts; empty where it is not there."""
    return [tuple(cell[key] for key in SAME_CELLS[name]) for cell in measured.get(name, [])]


def needle_rows(found: Mapping[str, Measured]) -> Rows:
    """A line for each length: right needles, nats and gain of every measurement."""
    rows = []
    for length in sorted({cell["length"] for cell in next(iter(found.values()))["needles"]}):
        row: dict[str, Any] = {"tokens": length}
        for name, one in found.items():
            cells = [cell for cell in one["needles"] if cell["length"] == length]
            number = sum(cell["num_needles"] for cell in cells)
            means = {key: sum(cell[key] * cell["num_needles"] for cell in cells) / number for key in ("nats", "gain")}
            right = round(sum(cell["accuracy"] * cell["num_needles"] for cell in cells))
            row |= {f"right, {NAMES[name]}": f"{right} of {number}"}
            row |= {f"{key}, {NAMES[name]}": round(value, 2) for key, value in means.items()}
        rows.append(row)
    return rows


def position_rows(found: Mapping[str, Measured]) -> Rows:
    """A line for each range of positions: nats per token of every measurement."""
    rows = []
    for cells in zip(*(one["by_position"] for one in found.values()), strict=True):
        row = {"positions": f"{cells[0]['start']} to {cells[0]['stop'] - 1}"}
        row |= {
            NAMES[name]: f"{cell['nats_per_token']:.3f}" + _error(cell["standard_error"])
            for name, cell in zip(found, cells, strict=True)
        }
        rows.append(row)
    return rows


def _error(standard_error: float | None) -> str:
    return "" if standard_error is None else f" ± {standard_error:.3f}"


def validation_rows(run: Path) -> Rows:
    """What the run validated on its way.

    Raises:
        ValueError: it has validated nothing.
    """
    rows = [
        {"step": line["step"], "document tokens": line["consumed_tokens"], "nats/token": f"{value:.3f}"}
        for line in read_json_lines(run / METRICS)
        if line.get("validation")
        for key, value in line.items()
        if key.startswith("validation_elbo/")
    ]
    if not rows:
        raise ValueError(f"run ({run}) has validated nothing; train with data.validation.")
    return rows


def picture(found: Mapping[str, Measured]) -> bytes:
    """PNG: the ELBO by position, and the nats of needles by length."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    lengths = needle_rows(found)
    for (name, one), color in zip(found.items(), ("#777777", "#00798c", "#d1495b"), strict=True):
        places = [(cell["start"] + cell["stop"]) / 2 for cell in one["by_position"]]
        left.plot(places, [cell["nats_per_token"] for cell in one["by_position"]], "o-", color=color, label=NAMES[name])
        right.plot(
            [row["tokens"] for row in lengths], [row[f"nats, {NAMES[name]}"] for row in lengths], "o-", color=color
        )
    left.set(xlabel="position in the document (tokens)", ylabel="nats per token", title="ELBO by position")
    right.set(xlabel="tokens of context", ylabel="nats of the right value", title="Needles")
    left.legend(fontsize=8)
    return png(figure)


def main(arguments: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plain", type=Path, required=True, help="measurement of needle without a scaling")
    parser.add_argument("--stretched", type=Path, required=True, help="with a scaling at inference alone")
    parser.add_argument("--trained", type=Path, required=True, help="after the run")
    parser.add_argument("--run", type=Path, default=Path("runs/demo/long"))
    parser.add_argument("--output", type=Path, default=RESULTS / "tiny_long", help="results, without suffix")
    parser.add_argument("--image", type=Path, default=IMAGES / "long_context.png")
    args = parser.parse_args(arguments)
    found = read({name: getattr(args, name) for name in NAMES})
    tables = {
        "Validation of the run, contexts of 4096": validation_rows(args.run),
        "Needles": needle_rows(found),
        "ELBO by position, nats per token": position_rows(found),
    }
    first = next(iter(found.values()))
    about = machine() | {name: first[name] for name in ("num_choices", "block_size")}
    about |= {"documents": first["by_position"][0]["num_documents"]}
    write_results(args.output, "A small run to a longer context", about, tables, NOTE)
    write_bytes(args.image, picture(found))
    return 0


if __name__ == "__main__":
    run_command(main)

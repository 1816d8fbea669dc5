"""The acceptance run: what works on this GPU, how fast it is, and where the time goes, in a few minutes.

    python -m benchmarks.gpu --minutes 8 --output DIR              # on one GPU, without network
    python -m benchmarks.gpu --device cpu --output DIR             # the same program with tiny sizes, on a CPU
    python -m benchmarks.gpu --output DIR --resume                 # the parts that were not finished
    python -m benchmarks.gpu --output DIR --only attention step

Each part is a process of its own with a time limit, so that none can take another with it. Its rows are written as
they come (DIR/PART.jsonl, its output in DIR/PART.log); after every part DIR/results.md and .json hold all that is
known. Exit code 0: every part ran to its end and no check failed; 1: not so; 2: the command is wrong.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.parts import PARTS, Part
from benchmarks.record import machine, write_results
from megatron_dllm.run.files import read_json_object

# A part past its time is asked to begin nothing new; past so much more, its processes are killed.
GRACE = 1.5
NOTE = (
    "One table for each part; a part that did not reach its end says so in the first table. Seconds are wall time. "
    "pace: the time of the causal kernel for as many visible pairs over the time of the backend."
)


def run_part(part: Part, args: argparse.Namespace, seconds: float) -> dict[str, Any]:
    """Run one part, from its beginning, to its end or its limit: the row of the summary."""
    folder = args.output / part.name
    shutil.rmtree(folder, ignore_errors=True)
    folder.with_suffix(".jsonl").unlink(missing_ok=True)
    command = [sys.executable, "-m", "benchmarks.gpu.part", part.name, "--device", args.device]
    command += ["--folder", str(folder), "--seconds", f"{seconds:.0f}", *(["--small"] if args.small else [])]
    started = time.monotonic()
    with folder.with_suffix(".log").open("w", encoding="utf-8") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True, cwd=Path(__file__).parents[2]
        )
        try:
            code: int | None = process.wait(timeout=GRACE * seconds)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            _end(process)
    end = "finished" if code == 0 else f"stopped after {GRACE * seconds:.0f} s" if code is None else f"exit code {code}"
    return {"part": part.name, "end": end, "seconds": time.monotonic() - started} | count_of(
        read_rows(args.output, part)
    )


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill what is left of a part, its children included."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def read_rows(output: Path, part: Part) -> list[dict[str, Any]]:
    """The rows of a part that are on the disk; a last line that was cut off is left out."""
    path = output / f"{part.name}.jsonl"
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def count_of(rows: list[dict[str, Any]]) -> dict[str, int]:
    """How many rows there are, and how many of them passed, failed or were skipped."""
    found = Counter(row.get("status") for row in rows)
    return {"rows": len(rows)} | {name: found[name] for name in ("ok", "failed", "skipped")}


def same_columns(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows with every column that one of them has, in the order of first sight."""
    columns = {name: None for row in rows for name in row}
    return [{name: row.get(name) for name in columns} for row in rows]


def parse_arguments() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=8.0, help="for all parts together")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--small", action="store_true", help="tiny sizes; always so on a CPU")
    parser.add_argument("--only", nargs="+", choices=list(PARTS), metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--resume", action="store_true", help="leave out the parts that are finished in --output")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device (cuda) needs a GPU that torch can see; there is none: --device cpu runs tiny sizes.")
    if not args.minutes > 0:
        parser.error(f"--minutes ({args.minutes:g}) must be positive; the default is 8.")
    args.output = args.output.resolve()
    args.small = args.small or args.device == "cpu"
    check_output(parser, args.output, args.resume or args.only is not None)
    check_same_place(parser, args.output, about(args))
    return args


def about(args: argparse.Namespace) -> dict[str, Any]:
    """The device, what it ran, and the sizes of the parts."""
    return machine(torch.device(args.device)) | {"sizes": "tiny" if args.small else "real"}


def check_output(parser: argparse.ArgumentParser, output: Path, is_going_on: bool) -> None:
    """Refuse a place that is not this run's: parts empty their folders before they begin."""
    if output.exists() and not output.is_dir():
        parser.error(f"--output ({output}) must be a folder; name another.")
    if output.exists() and any(output.iterdir()) and not (is_going_on and (output / "results.json").exists()):
        parser.error(
            f"--output ({output}) holds something already; name another folder, or one that an acceptance run has "
            "begun, with --resume or --only."
        )


def check_same_place(parser: argparse.ArgumentParser, output: Path, ours: dict[str, Any]) -> None:
    """Refuse to go on with damaged results, or with those of another device or sizes: a table would hold both."""
    try:
        found = read_results(output).get("about", {})
    except ValueError as error:
        parser.error(str(error))
    for name in ("device", "sizes"):
        if found.get(name, ours[name]) != ours[name]:
            parser.error(
                f"--output ({output}) holds results of {name} {found[name]}, and this run has {ours[name]}; "
                "name another folder."
            )


def read_results(output: Path) -> dict[str, Any]:
    """What an earlier run has written; empty where there was none."""
    path = output / "results.json"
    return read_json_object(path, "name another folder") if path.exists() else {}


def read_summary(output: Path) -> dict[str, dict[str, Any]]:
    """The summary rows of an earlier run, by part."""
    return {row["part"]: row for row in read_results(output).get("Summary", [])}


def save(args: argparse.Namespace, summary: dict[str, dict[str, Any]]) -> None:
    """Write what is known."""
    tables = {"Summary": [summary[name] for name in PARTS if name in summary]}
    tables |= {part.title: same_columns(read_rows(args.output, part)) for part in PARTS.values()}
    write_results(args.output / "results", "Acceptance run on one GPU", about(args), tables, NOTE)


def main() -> None:
    """Command line."""
    args = parse_arguments()
    args.output.mkdir(parents=True, exist_ok=True)
    summary = read_summary(args.output)
    parts = [
        part
        for part in PARTS.values()
        if (args.only is None or part.name in args.only)
        and not (args.resume and summary.get(part.name, {}).get("end") == "finished")
    ]
    save(args, summary)  # from now on the folder is known as an acceptance run's
    end = time.monotonic() + 60 * args.minutes
    for index, part in enumerate(parts):
        left, shares = end - time.monotonic(), sum(other.share for other in parts[index:])
        if left <= 0:
            summary[part.name] = {"part": part.name, "end": "no time left", "seconds": 0.0} | count_of([])
        else:
            summary[part.name] = run_part(part, args, left * part.share / shares)
        print(
            "  ".join(
                f"{name} {value:.0f}" if isinstance(value, float) else f"{name} {value}"
                for name, value in summary[part.name].items()
            ),
            flush=True,
        )
        save(args, summary)
    print(f"results: {args.output / 'results.md'}")
    is_good = all(row["end"] == "finished" and row["failed"] == 0 for row in summary.values())
    raise SystemExit(0 if is_good else 1)


if __name__ == "__main__":
    main()

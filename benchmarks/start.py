"""From the start of a process to its first step: CPU seconds and time of every rank, and where they go.

    python -m benchmarks.start                              # the tiny model of the tests on one rank, three times
    python -m benchmarks.start --ranks 4 --repeats 1

Every rank is a fresh Python. imports: until torch, megatron-core and this program are loaded; set_up: until the first
step's rows are there; step: the step.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NoReturn

import psutil
from torch.distributed import TCPStore

from benchmarks.ranks import rank_environment
from benchmarks.record import RESULTS, machine, write_results
from megatron_dllm.config.rules import check_positive
from megatron_dllm.run.command import run_command
from megatron_dllm.run.files import read_json_object, write_json

NOTE = (
    "CPU seconds of a rank with its loader's processes up to then, and seconds since its process began (wall); of all "
    "ranks the slowest."
)


def _spent() -> dict[str, float]:
    """What this process and its children have taken by now."""
    process = psutil.Process()
    used = [process.cpu_times(), *(child.cpu_times() for child in process.children(recursive=True))]
    return dict(cpu=sum(times.user + times.system for times in used), wall=time.time() - process.create_time())


def train_first_step(folder: Path, name: str) -> NoReturn:
    """Start the tiny run on this rank, write down what it took, and end with its first step."""
    from benchmarks.tiny_run import run_config
    from megatron_dllm.train import train

    marks: dict[str, dict[str, float]] = {}

    def make_parts() -> Any:
        from megatron_dllm.training.observers.observer import Observer
        from megatron_dllm.training.parts import Parts

        class FirstStep(Observer):
            """Looks at the clocks, and ends the process."""

            def around_step(self, is_logged: bool) -> AbstractContextManager[None]:
                """The rows are there."""
                marks["set_up"] = _spent()
                return nullcontext()

            def after_step(self, report: Any, measured: Any) -> None:
                """The step is done."""
                write_json(folder / f"{name}_{os.environ['RANK']}.json", {**marks, "step": _spent()})
                os._exit(0)

        marks["imports"] = _spent()
        return Parts(extra_observers=[FirstStep()])

    train(run_config(folder, name), make_parts)
    raise AssertionError("the run has ended without a step")


def measure(folder: Path, name: str, num_ranks: int) -> dict[str, Any]:
    """A row of one start, by the slowest rank of each number."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    words = [sys.executable, "-m", "benchmarks.start", "--child", str(folder), name]
    ranks = [
        subprocess.Popen(
            words, env=os.environ | rank_environment(rank, num_ranks, store.port), stdout=subprocess.DEVNULL
        )
        for rank in range(num_ranks)
    ]
    codes = [rank.wait() for rank in ranks]
    assert not any(codes), f"the ranks ended with {codes}"
    found = [read_json_object(folder / f"{name}_{rank}.json", "") for rank in range(num_ranks)]
    row: dict[str, Any] = dict(ranks=num_ranks)
    for kind in ("cpu", "wall"):
        until = {mark: max(one[mark][kind] for one in found) for mark in ("imports", "set_up", "step")}
        row |= {
            f"imports_{kind}": until["imports"],
            f"set_up_{kind}": until["set_up"] - until["imports"],
            f"step_{kind}": until["step"] - until["set_up"],
            f"{kind}": until["step"],
        }
    return row


def main(words: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, default=RESULTS / "start_cpu", help="without suffix")
    parser.add_argument("--child", nargs=2, metavar=("FOLDER", "NAME"), help="be a rank that is measured")
    args = parser.parse_args(words)
    if args.child is not None:
        train_first_step(Path(args.child[0]), args.child[1])
    check_positive("ranks", min(args.ranks))
    check_positive("repeats", args.repeats)
    from benchmarks.tiny_run import write_corpus

    with tempfile.TemporaryDirectory() as folder:
        write_corpus(Path(folder) / "corpus")
        rows = []
        for number in args.ranks:
            for repeat in range(args.repeats):
                rows.append(measure(Path(folder), f"start_{number}_{repeat}", number))
                print(rows[-1], flush=True)
    write_results(args.output, "From the start of a process to its first step", machine(), {"rows": rows}, NOTE)
    return 0


if __name__ == "__main__":
    run_command(main)

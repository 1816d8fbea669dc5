"""Kill random ranks (kill -9) at random moments, many times; the run must end as if nothing had happened.

    python -m benchmarks.kill --kills 30 [--saves sync async] [--ranks 2] [--launcher local] [--seed 0]

Every attempt continues from the newest checkpoint. The kills take turns: between steps, while a checkpoint is written,
and while an attempt starts (it verifies and loads its checkpoint, cuts its records back). At the end the weights, the
optimizer state and every step's record (loss, fingerprint of samples, masks and noise levels) must equal those of a run
that was left alone, bit for bit. An attempt that fails by itself, or does not end soon after its rank was killed, fails
the test. Writes benchmarks/results/kill.json and .md.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from benchmarks.ranks import set_rank
from benchmarks.record import RESULTS, machine, write_results
from benchmarks.tiny_run import checkpoints_of, read_metrics, read_tensors, scaled_config, train_here, write_corpus
from launch.local_ranks import LocalRanks
from launch.record import next_attempt
from megatron_dllm.config import TrainConfig

ROOT = Path(__file__).resolve().parents[1]
NOTE = (
    "A random rank is killed (SIGKILL) again and again; every attempt continues from the newest checkpoint. "
    "slowest_end: the most seconds from a kill to the end of that attempt's last rank. other_samples: steps lost, "
    "repeated, or made on other samples, masks or noise levels than in a run left alone. end: the weights, "
    "optimizer state and records of all steps against that run's, bit for bit."
)
# Seconds that forked ranks get to end by themselves once one of them is dead.
GRACE_SECONDS = 30.0
# Seconds in which an attempt must be over once a rank is dead, however it was started.
DOWN_SECONDS = 60.0
# Seconds without a further step that count as a hang.
STILL_SECONDS = 300.0


class Attempt(Protocol):
    """One start of the run's ranks."""

    def pids(self) -> list[int]:
        """Processes of the ranks, by rank."""

    def poll(self) -> bool | None:
        """Whether the run finished; None while it goes on."""

    def stop(self) -> None:
        """End every process."""


class ForkedAttempt:
    """Ranks forked from a server that has imported everything, so that they start fast."""

    def __init__(self, config: TrainConfig, ranks: int, log: Path) -> None:
        """Start them."""
        self._store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["benchmarks.preload"])
        self._processes = [
            context.Process(target=_rank, args=(config, rank, ranks, self._store.port, log)) for rank in range(ranks)
        ]
        for process in self._processes:
            process.start()

    def pids(self) -> list[int]:
        """Processes of the ranks."""
        return [process.pid for process in self._processes]

    def poll(self) -> bool | None:
        """Whether all ranks finished; when one has died, the others are asked to stop and, after a while, killed."""
        if all(process.exitcode == 0 for process in self._processes):
            return True
        if any(process.exitcode not in (None, 0) for process in self._processes):
            for process in self._processes:
                process.terminate()
            deadline = time.monotonic() + GRACE_SECONDS
            for process in self._processes:
                process.join(max(0.0, deadline - time.monotonic()))
            self.stop()
            return False
        return None

    def stop(self) -> None:
        """Kill what is left."""
        for process in self._processes:
            process.kill()
            process.join()


def _rank(config: TrainConfig, rank: int, ranks: int, port: int, log: Path) -> None:
    output = os.open(log, os.O_CREAT | os.O_APPEND | os.O_WRONLY)
    os.dup2(output, 1)
    os.dup2(output, 2)
    set_rank(rank, ranks, port)
    sys.exit(train_here(config))


class LaunchedAttempt:
    """The ranks as launch/local.py starts them, each under its wrapper."""

    def __init__(self, num_ranks: int, folder: Path, arguments: list[str]) -> None:
        """Start them; their logs go to a new folder below `folder`."""
        folder.mkdir(exist_ok=True)
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-m", "benchmarks.tiny_run", *arguments]
        self._ranks = LocalRanks(command, num_ranks, next_attempt(folder), environment)

    def pids(self) -> list[int]:
        """Processes of the ranks: the wrappers' children."""
        found = []
        for wrapper in self._ranks.wrappers:
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                found += Path(f"/proc/{wrapper.pid}/task/{wrapper.pid}/children").read_text().split()
        return [int(pid) for pid in found]

    def poll(self) -> bool | None:
        """Whether all ranks ended well."""
        code = self._ranks.poll()
        return None if code is None else code == 0

    def stop(self) -> None:
        """Kill what is left."""
        self._ranks.kill()
        for wrapper in self._ranks.wrappers:
            wrapper.wait()


@dataclass
class Report:
    """What happened: kills by the moment they hit, attempts, and the most seconds from a kill to the attempt's end."""

    kills: int = 0
    in_steps: int = 0
    in_saves: int = 0
    in_starts: int = 0
    attempts: int = 0
    seconds: float = 0.0
    slowest_end: float = 0.0
    # Steps of the run, and those not made once with the samples, masks and noise levels of the unbroken run.
    steps: int = 0
    other_samples: int = 0


KINDS = ("in_steps", "in_saves", "in_starts")


def run_with_kills(
    start: Callable[[], Attempt], config: TrainConfig, kills: int, seed: int, say: Callable[[str], None], steps: int = 0
) -> Report:
    """Start attempts until the run has finished, killing a random rank in each of the first `kills`.

    The kills are spread over the `steps` of the run, except for a few at its end, so that the last kills find a moment.
    """
    dice, report, began = random.Random(seed), Report(), time.monotonic()
    start_seconds = 1.0
    while True:
        report.attempts += 1
        moment = Moment(config, start, start_seconds)
        try:
            kind = None
            if report.kills < kills:
                turns = (kills - report.kills) // len(KINDS) + 2
                stride = max(1, 2 * (steps - moment.resumed - 10) // turns)
                kind = moment.kill(KINDS[report.kills % len(KINDS)], dice, stride)
            died = time.monotonic()
            finished = _finish(moment.attempt, config) if kind is None else _wait(moment.attempt, DOWN_SECONDS)
        finally:
            moment.attempt.stop()
        assert finished or kind is not None, "an attempt that nobody killed has failed; see its output"
        if not finished:
            report.kills += 1
            setattr(report, kind, getattr(report, kind) + 1)
            report.slowest_end = max(report.slowest_end, time.monotonic() - died)
        start_seconds = moment.start_seconds
        end = "finished" if finished else f"kill {report.kills}, {kind}"
        say(f"attempt {report.attempts}: {end}; newest checkpoint {_newest(config)}")
        if finished:
            report.seconds = time.monotonic() - began
            assert report.attempts == report.kills + 1
            return report


class Moment:
    """Starts an attempt and watches it for the moment to kill a rank."""

    def __init__(self, config: TrainConfig, start: Callable[[], Attempt], start_seconds: float) -> None:
        """Start it; the attempt before took `start_seconds` to its first step."""
        self._metrics = Path(config.run.root) / config.run.name / "metrics.jsonl"
        self._checkpoints = checkpoints_of(config)
        self._began, self.resumed = time.time(), int(_newest(config).removeprefix("step_"))
        self._seen: set[str] = set()
        self.start_seconds = start_seconds
        self.attempt = start()

    def kill(self, kind: str, dice: random.Random, stride: int) -> str | None:
        """Kill a random rank at a moment of that kind, within `stride` steps if that is between steps.

        Returns:
            What it hit, or None where the attempt ended before.
        """
        if not self._wait_for(kind, dice, stride) or not self._until(lambda: bool(self.attempt.pids())):
            return None
        hit = self._kind()
        with contextlib.suppress(ProcessLookupError):
            os.kill(dice.choice(self.attempt.pids()), signal.SIGKILL)
        return hit

    def _wait_for(self, kind: str, dice: random.Random, stride: int) -> bool:
        if kind == "in_starts":
            time.sleep(dice.random() * self.start_seconds)
            return self.attempt.poll() is None
        if not self._until(lambda: self._steps() > 0):
            return False
        self.start_seconds = time.time() - self._began
        if kind == "in_steps":
            steps = dice.randint(1, stride)
            is_there = self._until(lambda: self._steps() >= steps)
            time.sleep(dice.random() * 0.2)
            return is_there and self.attempt.poll() is None
        passed = dice.randint(0, 1)
        while self._until(lambda passed=passed: len(self._saves()) > passed):
            time.sleep(dice.random() * 0.03)
            if self._kind() == kind:
                return True
            passed = len(self._seen)
        return False

    def _kind(self) -> str:
        """What is going on now."""
        if self._steps() == 0:
            return "in_starts"
        return "in_saves" if any(self._checkpoints.glob(".tmp-step*")) else "in_steps"

    def _steps(self) -> int:
        """Steps this attempt has logged. It cuts the file back to the checkpoint before its first one."""
        is_new = self._metrics.exists() and self._metrics.stat().st_mtime > self._began
        return self._metrics.read_bytes().count(b"\n") - self.resumed if is_new else 0

    def _saves(self) -> set[str]:
        """Checkpoints that this attempt has been seen writing; it removes what others left before its first step."""
        self._seen.update(path.name for path in self._checkpoints.glob(".tmp-step*"))
        return self._seen

    def _until(self, condition: Callable[[], bool]) -> bool:
        deadline = time.monotonic() + STILL_SECONDS
        while time.monotonic() < deadline:
            with contextlib.suppress(FileNotFoundError):
                if condition():
                    return True
            if self.attempt.poll() is not None:
                return False
            time.sleep(0.002)
        raise TimeoutError(f"nothing happened within {STILL_SECONDS:g} s: the run hangs")


def _wait(attempt: Attempt, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        finished = attempt.poll()
        if finished is not None:
            return finished
        time.sleep(0.01)
    raise TimeoutError(f"the ranks were not done within {seconds:g} s: the run hangs")


def _finish(attempt: Attempt, config: TrainConfig) -> bool:
    """Wait for the end of an attempt that makes progress."""
    metrics = Path(config.run.root) / config.run.name / "metrics.jsonl"
    moved, size = time.monotonic(), -1
    while time.monotonic() < moved + STILL_SECONDS:
        finished = attempt.poll()
        if finished is not None:
            return finished
        now = metrics.stat().st_size if metrics.exists() else 0
        moved, size = (moved, size) if now == size else (time.monotonic(), now)
        time.sleep(0.01)
    raise TimeoutError(f"no step within {STILL_SECONDS:g} s: the run hangs")


def _newest(config: TrainConfig) -> str:
    names = sorted(path.name for path in checkpoints_of(config).glob("step_*"))
    return names[-1] if names else "step_0"


def compare(config: TrainConfig, expected: TrainConfig) -> list[str]:
    """What differs between two finished runs: tensors of the last checkpoint, records of the steps."""
    tensors = read_tensors(checkpoints_of(config) / _newest(config))
    expected_tensors = read_tensors(checkpoints_of(expected) / _newest(expected))
    problems = [
        f"tensor {key}"
        for key in sorted(tensors.keys() | expected_tensors.keys())
        if key not in tensors or key not in expected_tensors or not torch.equal(tensors[key], expected_tensors[key])
    ]
    records, expected_records = read_metrics(config), read_metrics(expected)
    if [r["step"] for r in records] != [r["step"] for r in expected_records]:
        problems.append(f"steps {[r['step'] for r in records]}")
    problems += [
        f"record of step {record['step']}"
        for record, reference in zip(records, expected_records, strict=False)
        if record != reference
    ]
    return problems


def count_other_samples(config: TrainConfig, expected: TrainConfig) -> int:
    """Steps that are missing, were made twice, or on other samples, masks or noise levels than in the unbroken run."""
    made, planned = (
        Counter((record["step"], record["data_fingerprint"]) for record in read_metrics(run))
        for run in (config, expected)
    )
    return len({step for step, _ in (made - planned) | (planned - made)})


def run_test(
    folder: Path,
    kills: int,
    ranks: int,
    scale: float,
    seed: int,
    launcher: str = "fork",
    is_async: bool = False,
    say: Callable[[str], None] = lambda text: None,
) -> tuple[Report, list[str]]:
    """Run the whole test: what happened, and what differs from the unbroken run, which should be nothing."""
    write_corpus(folder / "corpus")

    def starter(config: TrainConfig) -> Callable[[], Attempt]:
        arguments = [str(folder), config.run.name, str(scale), str(int(is_async))]
        make: dict[str, Callable[[], Attempt]] = {
            "fork": lambda: ForkedAttempt(config, ranks, folder / f"{config.run.name}.log"),
            "local": lambda: LaunchedAttempt(ranks, folder / f"{config.run.name}_attempts", arguments),
        }
        return make[launcher]

    unbroken, killed = (scaled_config(folder, name, scale, is_async) for name in ("unbroken", "killed"))
    run_with_kills(starter(unbroken), unbroken, 0, seed, say)
    steps = len(read_metrics(unbroken))
    report = run_with_kills(starter(killed), killed, kills, seed, say, steps)
    report.steps = steps
    report.other_samples = count_other_samples(killed, unbroken)
    return report, compare(killed, unbroken)


def main() -> int:
    """Run the test, print its figures and write them down."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument(
        "--saves",
        nargs="+",
        choices=("sync", "async"),
        default=["sync", "async"],
        help="how checkpoints are written; so many kills in each",
    )
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--scale", type=float, help="length of the run (default: enough for the kills)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--launcher", choices=("fork", "local"), default="fork")
    parser.add_argument("--output", type=Path, default=RESULTS / "kill", help="without suffix")
    arguments = parser.parse_args()
    scale = arguments.scale or 1.0 + arguments.kills / 4.0
    rows: list[dict[str, Any]] = []
    for saves in arguments.saves:
        with tempfile.TemporaryDirectory() as folder:
            report, problems = run_test(
                Path(folder),
                arguments.kills,
                arguments.ranks,
                scale,
                arguments.seed,
                arguments.launcher,
                saves == "async",
                lambda text: print(text, flush=True),
            )
        rows.append({"saves": saves, **asdict(report), "end": "different" if problems else "equal"})
        print(rows[-1], *problems[:5], flush=True)
    write_results(
        arguments.output,
        "Ranks killed at random moments",
        machine() | {"ranks": arguments.ranks, "launcher": arguments.launcher},
        {"rows": rows},
        NOTE,
    )
    is_passed = all(
        row["end"] == "equal"
        and row["other_samples"] == 0
        and row["kills"] == arguments.kills
        and row["in_saves"] >= row["kills"] // 4
        for row in rows
    )
    print(f"{'passed' if is_passed else 'FAILED'}; wrote {arguments.output}.md")
    return int(not is_passed)


if __name__ == "__main__":
    sys.exit(main())

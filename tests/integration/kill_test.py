"""Kill -9 of random ranks at random moments, again and again; the run must end as if nothing had happened.

    python -m tests.integration.kill_test --kills 30 [--ranks 2] [--launcher torchrun] [--async_saves] [--seed 0]

Every life continues from the newest checkpoint. Half of the kills wait for a checkpoint to be written and hit while
it is. At the end the weights, the optimizer state and every step's record (loss, fingerprint of samples, masks and
noise levels) must equal those of a run that was left alone, bit for bit. A life that does not end soon after its
rank was killed is a hang, and fails the test.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from megatron_dllm.config import TrainConfig
from tests.distributed.ranks import set_rank
from tests.tiny_run import checkpoints_of, read_metrics, read_tensors, scaled_config, train_here, write_corpus

ROOT = Path(__file__).resolve().parents[2]
# Seconds in which a life must be over once a rank is dead; torchrun gives the others 30 to end by themselves.
DOWN_SECONDS = 60.0
# Seconds without a further step that count as a hang.
STILL_SECONDS = 300.0


class Life(Protocol):
    """One start of the run's ranks."""

    def pids(self) -> list[int]:
        """Processes of the ranks, by rank."""

    def poll(self) -> bool | None:
        """Whether the run finished; None while it goes on."""

    def stop(self) -> None:
        """Leave nothing behind."""


class ForkedLife:
    """Ranks forked from a server that has imported everything: starts in a moment. Ended as torchrun would."""

    def __init__(self, config: TrainConfig, ranks: int, log: Path) -> None:
        """Start them."""
        self._store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["tests.distributed.preload"])
        self._processes = [context.Process(target=_rank, args=(config, rank, ranks, self._store.port, log))
                           for rank in range(ranks)]
        for process in self._processes:
            process.start()

    def pids(self) -> list[int]:
        """Processes of the ranks."""
        return [process.pid for process in self._processes]

    def poll(self) -> bool | None:
        """Whether all ranks finished; when one has died, the others are given torchrun's grace and ended."""
        if all(process.exitcode == 0 for process in self._processes):
            return True
        if any(process.exitcode not in (None, 0) for process in self._processes):
            for process in self._processes:
                process.terminate()
            deadline = time.monotonic() + 30.0
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


class TorchrunLife:
    """The ranks under torchrun, as users start them."""

    def __init__(self, config: TrainConfig, ranks: int, log: Path, arguments: list[str]) -> None:
        """Start torchrun."""
        self._log = open(log, "ab")  # noqa: SIM115 - as long as the process
        self.process = subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}",
             "--max-restarts=0", "--monitor-interval=0.1", "-m", "tests.tiny_run", *arguments],
            cwd=ROOT, stdout=self._log, stderr=subprocess.STDOUT, start_new_session=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"})

    def pids(self) -> list[int]:
        """Processes that torchrun started."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            return [int(pid) for pid in children.read_text().split()]
        return []

    def poll(self) -> bool | None:
        """Whether torchrun ended well."""
        code = self.process.poll()
        return None if code is None else code == 0

    def stop(self) -> None:
        """Kill torchrun and its ranks."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self._log.close()


@dataclass
class Report:
    """What happened: kills by moment, lives, and the slowest end of a life after its kill, in seconds."""

    kills: int = 0
    in_saves: int = 0
    lives: int = 0
    slowest_end: float = 0.0
    seconds: float = 0.0


def run_with_kills(start: Callable[[], Life], config: TrainConfig, kills: int, seed: int,
                   say: Callable[[str], None]) -> Report:
    """Start lives until the run has finished, killing a random rank in each of the first `kills`."""
    dice, report, began = random.Random(seed), Report(), time.monotonic()
    while True:
        report.lives += 1
        life = start()
        try:
            is_killing = report.kills < kills
            finished = _live(life, config, dice, report) if is_killing else _finish(life, config)
        finally:
            life.stop()
        say(f"life {report.lives}: {'finished' if finished else 'killed'}, newest checkpoint {_newest(config)}, "
            f"{report.kills} kills")
        if finished:
            report.seconds = time.monotonic() - began
            return report
        assert is_killing, "a life that nobody killed has failed; see its output"


def _live(life: Life, config: TrainConfig, dice: random.Random, report: Report) -> bool:
    """One life with its kill; whether the run finished before it."""
    is_in_save = dice.random() < 0.5
    steps = dice.randint(0, 6)
    moment = _Moment(config, life)
    if is_in_save and not moment.wait_for_save(dice.randint(0, 1)):
        return _wait(life, DOWN_SECONDS)
    if not is_in_save and not moment.wait_for_steps(steps):
        return _wait(life, DOWN_SECONDS)
    time.sleep(dice.random() * (0.03 if is_in_save else 0.2))
    pids = life.pids()
    if life.poll() is not None or not pids:
        return _wait(life, DOWN_SECONDS)
    is_hit = bool(list(checkpoints_of(config).glob(".tmp-step*")))
    with contextlib.suppress(ProcessLookupError):
        os.kill(dice.choice(pids), signal.SIGKILL)
    died = time.monotonic()
    finished = _wait(life, DOWN_SECONDS)
    if not finished:
        report.kills += 1
        report.in_saves += is_hit
        report.slowest_end = max(report.slowest_end, time.monotonic() - died)
    return finished


class _Moment:
    """Waits for something to happen in a life; false when the life ends first."""

    def __init__(self, config: TrainConfig, life: Life) -> None:
        self._metrics = Path(config.run.root) / config.run.name / "metrics.jsonl"
        self._checkpoints, self._life = checkpoints_of(config), life
        self._began = time.time()

    def wait_for_save(self, skipped: int) -> bool:
        """Until a checkpoint is being written, after `skipped` others."""
        seen: set[str] = set()

        def is_saving() -> bool:
            seen.update(path.name for path in self._checkpoints.glob(".tmp-step*")
                        if path.stat().st_ctime > self._began)
            return len(seen) > skipped
        return self._until(is_saving)

    def wait_for_steps(self, steps: int) -> bool:
        """Until so many steps of this life are logged."""
        def count() -> int:
            # The file is cut back to the checkpoint when a life begins.
            is_new = self._metrics.exists() and self._metrics.stat().st_mtime > self._began
            return len(self._metrics.read_bytes().splitlines()) if is_new else 0
        if not self._until(lambda: count() > 0):
            return False
        first = count()
        return self._until(lambda: count() >= first + steps)

    def _until(self, condition: Callable[[], bool]) -> bool:
        deadline = time.monotonic() + STILL_SECONDS
        while time.monotonic() < deadline:
            with contextlib.suppress(FileNotFoundError):
                if condition():
                    return True
            if self._life.poll() is not None:
                return False
            time.sleep(0.002)
        raise TimeoutError(f"nothing happened within {STILL_SECONDS:g} s: the run hangs")


def _wait(life: Life, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        finished = life.poll()
        if finished is not None:
            return finished
        time.sleep(0.01)
    raise TimeoutError(f"the ranks were not done within {seconds:g} s: the run hangs")


def _finish(life: Life, config: TrainConfig) -> bool:
    """Wait for the end of a life that makes progress."""
    metrics = Path(config.run.root) / config.run.name / "metrics.jsonl"
    moved, size = time.monotonic(), -1
    while time.monotonic() < moved + STILL_SECONDS:
        finished = life.poll()
        if finished is not None:
            return finished
        now = metrics.stat().st_size if metrics.exists() else 0
        moved, size = (moved, size) if now == size else (time.monotonic(), now)
        time.sleep(0.01)
    raise TimeoutError(f"no step within {STILL_SECONDS:g} s: the run hangs")


def _newest(config: TrainConfig) -> str:
    names = sorted(path.name for path in checkpoints_of(config).glob("step_*"))
    return names[-1] if names else "none"


def compare(config: TrainConfig, expected: TrainConfig) -> list[str]:
    """What differs between two finished runs: tensors of the last checkpoint, records of the steps."""
    tensors = read_tensors(checkpoints_of(config) / _newest(config))
    expected_tensors = read_tensors(checkpoints_of(expected) / _newest(expected))
    problems = [f"tensor {key}" for key in sorted(tensors.keys() | expected_tensors.keys())
                if key not in tensors or key not in expected_tensors
                or not torch.equal(tensors[key], expected_tensors[key])]
    records, expected_records = read_metrics(config), read_metrics(expected)
    if [r["step"] for r in records] != [r["step"] for r in expected_records]:
        problems.append(f"steps {[r['step'] for r in records]}")
    problems += [f"record of step {record['step']}"
                 for record, reference in zip(records, expected_records, strict=False) if record != reference]
    return problems


def run_test(folder: Path, kills: int, ranks: int, scale: float, seed: int, launcher: str = "fork",
             is_async: bool = False, say: Callable[[str], None] = lambda text: None) -> tuple[Report, list[str]]:
    """The whole test; what happened, and what differs from the unbroken run (nothing, or it failed)."""
    write_corpus(folder / "corpus")

    def starter(config: TrainConfig) -> Callable[[], Life]:
        log = folder / f"{config.run.name}.log"
        arguments = [str(folder), config.run.name, str(scale), str(int(is_async))]
        make: dict[str, Callable[[], Any]] = {
            "fork": lambda: ForkedLife(config, ranks, log),
            "torchrun": lambda: TorchrunLife(config, ranks, log, arguments)}
        return make[launcher]

    unbroken, killed = (scaled_config(folder, name, scale, is_async) for name in ("unbroken", "killed"))
    run_with_kills(starter(unbroken), unbroken, 0, seed, say)
    report = run_with_kills(starter(killed), killed, kills, seed, say)
    return report, compare(killed, unbroken)


def main() -> int:
    """Run the test and print its figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--scale", type=float, help="length of the run (default: enough for the kills)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--launcher", choices=("fork", "torchrun"), default="fork")
    parser.add_argument("--async_saves", action="store_true", help="write checkpoints in the background")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        report, problems = run_test(
            Path(folder), arguments.kills, arguments.ranks, arguments.scale or 1.0 + arguments.kills / 4.0,
            arguments.seed, arguments.launcher, arguments.async_saves, lambda text: print(text, flush=True))
    print(f"{report.kills} kills ({report.in_saves} while a checkpoint was written) in {report.lives} lives and "
          f"{report.seconds:.0f} s; a life ended at most {report.slowest_end:.1f} s after its rank was killed")
    print("equal to the unbroken run, bit for bit" if not problems else f"DIFFERENT: {problems[:5]}")
    return int(bool(problems) or report.kills < arguments.kills)


if __name__ == "__main__":
    sys.exit(main())

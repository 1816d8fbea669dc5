"""Wrapper of one rank: its log, its signals, its exit record, and its end when a newer attempt owns the run.

    python launch/rank.py ATTEMPT_FOLDER -- COMMAND ...

Started by srun or by launch/local_ranks.py, it starts COMMAND and writes rank_00003.log and exit_00003.json there.
SIGTERM and SIGUSR1 reach COMMAND as SIGUSR1, again every few seconds, because one that comes before the handler is
installed is ignored. A rank that was asked to stop and did (EXIT_PREEMPTED) looks like success from outside,
so that nobody ends the ranks that are still saving; the exit record has the true code.

Standard library only: it also wraps tools that know nothing of training.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from megatron_dllm.run.exit_codes import EXIT_FENCED, EXIT_LAYOUT, EXIT_PREEMPTED
from megatron_dllm.run.files import write_json
from megatron_dllm.run.lease import LEASE_VARIABLE, newest_generation
from megatron_dllm.run.names import LEASE

REPEAT_SECONDS = 5.0
LEASE_SECONDS = 3.0
# Run folder whose lease is watched; unset: none.
RUN_VARIABLE = "MEGATRON_DLLM_RUN"
# "1": rank 0's output also goes to this process's own.
SHOW_VARIABLE = "MEGATRON_DLLM_SHOW"
_PR_SET_PDEATHSIG = 1


def adopt_slurm_ranks(environment: dict[str, str]) -> None:
    """Where srun starts the ranks, set the variables that torchrun would have set."""
    if "RANK" in environment or "SLURM_PROCID" not in environment:
        return
    environment["RANK"] = environment["SLURM_PROCID"]
    environment["LOCAL_RANK"] = environment["SLURM_LOCALID"]
    environment["WORLD_SIZE"] = environment["SLURM_NTASKS"]
    environment["LOCAL_WORLD_SIZE"] = environment["SLURM_NTASKS_PER_NODE"]


def die_with_parent() -> None:
    """Have the kernel kill this process when its parent ends: no rank outlives its launcher."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def prepare_child() -> None:
    """Called in a new process: die with its parent, and survive stop signals until the program handles them."""
    die_with_parent()
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


class RankProcess:
    """The running command, and what has been asked of it."""

    def __init__(self, command: list[str], log: Path, is_shown: bool) -> None:
        self.is_stopping = False
        self.is_fenced = False
        self._log = open(log, "ab", buffering=0)  # noqa: SIM115 - as long as the process
        output = subprocess.PIPE if is_shown else self._log
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._ask_to_stop)
        # The user's Ctrl-C reaches the whole terminal; the launcher turns it into an orderly stop.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        self.process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, preexec_fn=prepare_child)
        self._copier = threading.Thread(target=self._copy, daemon=True) if is_shown else None
        if self._copier:
            self._copier.start()

    def _copy(self) -> None:
        assert self.process.stdout is not None, "a shown rank writes into a pipe"
        while chunk := os.read(self.process.stdout.fileno(), 65536):
            # Whatever becomes of the words (a full disk, a closed terminal): the rank must not wait for a reader.
            for descriptor in (self._log.fileno(), 1):
                with contextlib.suppress(OSError):
                    os.write(descriptor, chunk)

    def _ask_to_stop(self, *_: object) -> None:
        self.is_stopping = True

    def wait(self, run_folder: str | None, generation: int) -> int:
        """Wait for the end, passing on stop requests and watching the lease; the command's return code."""
        next_signal = next_look = 0.0
        while self.process.poll() is None:
            now = time.monotonic()
            if self.is_stopping and now >= next_signal:
                self.process.send_signal(signal.SIGUSR1)
                next_signal = now + REPEAT_SECONDS
            if run_folder and now >= next_look:
                next_look = now + LEASE_SECONDS
                if newest_generation(Path(run_folder) / LEASE) > generation:
                    self.is_fenced = True
                    self.process.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(0.5)
        if self._copier:
            self._copier.join(5.0)
        if self.is_fenced:
            return EXIT_FENCED
        # The command ignores stop signals until it handles them, and Python gives its handlers up while it exits: one
        # that kills it finds the work done.
        if self.is_stopping and self.process.returncode in (-signal.SIGUSR1, -signal.SIGTERM):
            return EXIT_PREEMPTED
        return self.process.returncode


def main() -> int:
    """Run the command and report; returns what whoever started this wrapper is told."""
    attempt_folder, separator, *command = sys.argv[1:]
    assert separator == "--", "usage: rank.py ATTEMPT_FOLDER -- COMMAND ..."
    die_with_parent()
    adopt_slurm_ranks(os.environ)  # type: ignore[arg-type]
    rank = int(os.environ.get("RANK", "0"))
    folder = Path(attempt_folder)
    is_shown = os.environ.get(SHOW_VARIABLE) == "1" and rank == 0
    began = time.time()
    process = RankProcess(command, folder / f"rank_{rank:05d}.log", is_shown)
    code = process.wait(os.environ.get(RUN_VARIABLE), int(os.environ.get(LEASE_VARIABLE, "0")))
    write_json(
        folder / f"exit_{rank:05d}.json",
        {"rank": rank, "host": socket.gethostname(), "code": code, "began": began, "ended": time.time()},
    )
    if code in (0, EXIT_PREEMPTED, EXIT_LAYOUT):
        return 0
    return code if code > 0 else 128 - code


if __name__ == "__main__":
    sys.exit(main())

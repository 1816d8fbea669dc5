"""The ranks of a job on this machine: processes under launch/rank.py that meet at a port of this machine's own.

What srun does on a cluster: every rank gets its place in its environment, a stop request reaches all of them, and when
one has failed the others end soon after. Standard library only.
"""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from launch.failure import FAILURE_GRACE_SECONDS
from launch.rank import REPEAT_SECONDS, prepare_child
from megatron_dllm.run.command import STOP_SIGNALS
from megatron_dllm.run.exit_codes import EXIT_PREEMPTED
from megatron_dllm.run.place import without_place

ROOT = Path(__file__).resolve().parents[1]
ADDRESS = "127.0.0.1"
POLL_SECONDS = 0.1


def reserve_port() -> socket.socket:
    """A socket whose port nobody but rank 0 will use while the socket is open.

    It is bound and never listens. The kernel gives a bound port to no program that leaves the choice to the kernel,
    and it lets rank 0 listen there because both sides set SO_REUSEADDR (torch's store does).
    """
    holder = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    holder.bind((ADDRESS, 0))
    return holder


def rank_environment(environment: Mapping[str, str], rank: int, num_ranks: int, port: int) -> dict[str, str]:
    """The variables of one rank, as torchrun would set them on one machine.

    Variables of a launcher around this process are left out: they would send the ranks to its meeting point.
    """
    return {
        **without_place(environment),
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(num_ranks),
        "LOCAL_WORLD_SIZE": str(num_ranks),
        "MASTER_ADDR": ADDRESS,
        "MASTER_PORT": str(port),
    }


class LocalRanks:
    """Running ranks. Nothing happens by itself: whoever started them calls `poll` several times a second."""

    def __init__(self, command: Sequence[str], num_ranks: int, attempt: Path, environment: Mapping[str, str]) -> None:
        """Start them.

        Args:
            command: of a rank, the interpreter included.
            num_ranks: how many.
            attempt: folder for their logs and exit records.
            environment: theirs, apart from their place.
        """
        self._is_stopping = False
        self._next_request = 0.0
        self._failed_at: float | None = None
        self._port_holder = reserve_port()
        port = self._port_holder.getsockname()[1]
        words = [sys.executable, str(ROOT / "launch" / "rank.py"), str(attempt), "--", *command]
        self.wrappers = [
            subprocess.Popen(words, env=rank_environment(environment, rank, num_ranks, port), preexec_fn=prepare_child)
            for rank in range(num_ranks)
        ]

    def ask_to_stop(self) -> None:
        """Have the ranks save and stop; the request is repeated until they have ended, as an early one is ignored."""
        self._is_stopping = True

    def kill(self) -> None:
        """End all ranks at once; each dies with its wrapper."""
        for wrapper in self.wrappers:
            wrapper.kill()

    def poll(self) -> int | None:
        """Do what is due: pass a stop request on, end the others some time after one has failed.

        Returns:
            None while a rank runs; then 0, or the exit code of a wrapper that did not end well.
        """
        codes = [wrapper.poll() for wrapper in self.wrappers]
        if None not in codes:
            self._port_holder.close()
            return next((code for code in codes if code), 0)
        now = time.monotonic()
        if self._failed_at is None and any(codes):
            self._failed_at = now
        if self._failed_at is not None and now - self._failed_at > FAILURE_GRACE_SECONDS:
            self.kill()
        elif self._is_stopping and now >= self._next_request:
            self._next_request = now + REPEAT_SECONDS
            for wrapper in self.wrappers:
                wrapper.send_signal(signal.SIGUSR1)
        return None


def run_ranks(command: Sequence[str], num_ranks: int, attempt: Path, environment: Mapping[str, str]) -> int:
    """Run the ranks to their end in the foreground; SIGTERM, SIGUSR1 and Ctrl-C stop them in order.

    A second Ctrl-C ends them at once. See LocalRanks for the arguments and `LocalRanks.poll` for the result.
    """
    with _received_signals() as received:
        ranks = LocalRanks(command, num_ranks, attempt, environment)
        try:
            while (code := ranks.poll()) is None:
                if received.count(signal.SIGINT) > 1:
                    ranks.kill()
                elif received:
                    ranks.ask_to_stop()
                time.sleep(POLL_SECONDS)
            return code
        finally:
            ranks.kill()


def run_tool(command: Sequence[str], environment: Mapping[str, str]) -> int:
    """Run one process to its end in the foreground, as `run_ranks` runs ranks; its exit code."""
    with _received_signals() as received:
        process = subprocess.Popen(command, env=without_place(environment), preexec_fn=prepare_child)
        next_request = 0.0
        try:
            while (code := process.poll()) is None:
                if received.count(signal.SIGINT) > 1:
                    process.kill()
                elif received and time.monotonic() >= next_request:
                    next_request = time.monotonic() + REPEAT_SECONDS
                    process.send_signal(signal.SIGTERM)
                time.sleep(POLL_SECONDS)
        finally:
            process.kill()
    return EXIT_PREEMPTED if received and -code in STOP_SIGNALS else code


@contextmanager
def _received_signals() -> Iterator[list[int]]:
    """The stop signals that come meanwhile, which then interrupt nothing."""
    received: list[int] = []
    previous = {number: signal.signal(number, lambda got, _: received.append(got)) for number in STOP_SIGNALS}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)

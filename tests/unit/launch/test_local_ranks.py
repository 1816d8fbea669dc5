"""Ranks on this machine: their place, their port, their stop and their common end."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from launch.failure import FAILURE_GRACE_SECONDS, exit_records
from launch.local_ranks import LocalRanks, rank_environment, reserve_port
from megatron_dllm.run.exit_codes import EXIT_PREEMPTED

pytestmark = pytest.mark.ranks
ROOT = Path(__file__).resolve().parents[3]
# Ready at once for a request to stop, as the trainer is after its first seconds.
OBEDIENT = """
import signal, sys, time
asked = []
signal.signal(signal.SIGUSR1, lambda *_: asked.append(1))
print("ready", flush=True)
while not asked: time.sleep(0.05)
sys.exit(85)
"""
FAILING = "import os, sys, time\nif os.environ['RANK'] == '1': sys.exit(7)\ntime.sleep(600)"
PLACE = "import os; print(*(os.environ[n] for n in ('RANK', 'LOCAL_RANK', 'WORLD_SIZE', 'LOCAL_WORLD_SIZE')))"


@contextlib.contextmanager
def ranks_of(code: str, attempt: Path, num_ranks: int = 2) -> Iterator[LocalRanks]:
    ranks = LocalRanks([sys.executable, "-S", "-c", code], num_ranks, attempt, os.environ)
    try:
        yield ranks
    finally:
        ranks.kill()


def wait(ranks: LocalRanks, seconds: float = 120.0) -> int:
    deadline = time.monotonic() + seconds
    while (code := ranks.poll()) is None:
        assert time.monotonic() < deadline, "the ranks did not end"
        time.sleep(0.05)
    return code


def codes_of(attempt: Path) -> list[int]:
    return sorted(entry["code"] for entry in exit_records(attempt))


def wait_for_ready(attempt: Path, num_ranks: int) -> None:
    deadline = time.monotonic() + 120
    while sum("ready" in path.read_text() for path in attempt.glob("rank_*.log")) < num_ranks:
        assert time.monotonic() < deadline, "the ranks never began"
        time.sleep(0.05)


def test_every_rank_knows_its_place(tmp_path: Path) -> None:
    with ranks_of(PLACE, tmp_path) as ranks:
        assert wait(ranks) == 0
    assert [(tmp_path / f"rank_0000{rank}.log").read_text() for rank in range(2)] == ["0 0 2 2\n", "1 1 2 2\n"]
    assert codes_of(tmp_path) == [0, 0]


def test_a_torchrun_around_the_launcher_does_not_reach_the_ranks() -> None:
    around = {"RANK": "5", "MASTER_PORT": "1", "TORCHELASTIC_USE_AGENT_STORE": "True", "OMP_NUM_THREADS": "1"}
    environment = rank_environment(around, 0, 2, 4711)
    assert (environment["RANK"], environment["MASTER_PORT"], environment["OMP_NUM_THREADS"]) == ("0", "4711", "1")
    assert "TORCHELASTIC_USE_AGENT_STORE" not in environment


def test_a_reserved_port_is_given_to_nobody_but_rank_zero() -> None:
    with reserve_port() as holder, contextlib.ExitStack() as others:
        port = holder.getsockname()[1]
        with socket.socket() as stranger, pytest.raises(OSError, match="in use"):
            stranger.bind(("127.0.0.1", port))
        # As torch's store does: reuse, and all of this machine's addresses.
        store = others.enter_context(socket.socket(socket.AF_INET6))
        store.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        store.bind(("::", port))
        store.listen()
        others.enter_context(socket.create_connection(("127.0.0.1", port)))


def test_a_request_stops_every_rank_in_order(tmp_path: Path) -> None:
    with ranks_of(OBEDIENT, tmp_path) as ranks:
        wait_for_ready(tmp_path, 2)
        ranks.ask_to_stop()
        assert wait(ranks) == 0
    assert codes_of(tmp_path) == [EXIT_PREEMPTED, EXIT_PREEMPTED]


def test_a_request_that_comes_before_the_ranks_are_there_reaches_them(tmp_path: Path) -> None:
    with ranks_of("import time; time.sleep(2)\n" + OBEDIENT, tmp_path) as ranks:
        ranks.ask_to_stop()
        assert wait(ranks) == 0
    assert codes_of(tmp_path) == [EXIT_PREEMPTED, EXIT_PREEMPTED]


def test_a_rank_that_fails_ends_the_others_after_their_grace(tmp_path: Path) -> None:
    began = time.monotonic()
    with ranks_of(FAILING, tmp_path) as ranks:
        assert wait(ranks) in (7, -signal.SIGKILL)
    # The others die with their wrappers, which therefore write no records.
    assert codes_of(tmp_path) == [7]
    assert time.monotonic() - began > FAILURE_GRACE_SECONDS


def test_no_rank_outlives_the_launcher(tmp_path: Path) -> None:
    code = f"""
import os, sys, time
from pathlib import Path
from launch.local_ranks import LocalRanks
LocalRanks([sys.executable, "-S", "-c", "import os, time; print(os.getpid(), flush=True); time.sleep(600)"],
           2, Path({str(tmp_path)!r}), os.environ)
time.sleep(600)
"""
    launcher = subprocess.Popen(
        [sys.executable, "-S", "-c", code], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    logs = [tmp_path / f"rank_0000{rank}.log" for rank in range(2)]
    deadline = time.monotonic() + 120
    while not all(log.exists() and log.read_text().strip() for log in logs):
        assert time.monotonic() < deadline, "the ranks never began"
        time.sleep(0.05)
    launcher.kill()
    launcher.wait()
    for log in logs:
        status = Path(f"/proc/{log.read_text().strip()}/stat")
        while status.exists() and status.read_text().split()[2] != "Z":
            assert time.monotonic() < deadline, "a rank outlived the launcher"
            time.sleep(0.05)

"""The wrapper of one rank, run as srun and launch/local_ranks.py run it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from launch import record
from launch.rank import RUN_VARIABLE, SHOW_VARIABLE, adopt_slurm_ranks
from megatron_dllm.run.exit_codes import EXIT_FENCED, EXIT_PREEMPTED
from megatron_dllm.run.lease import LEASE_VARIABLE, Lease

pytestmark = pytest.mark.ranks
ROOT = Path(__file__).resolve().parents[3]
OBEDIENT = """
import signal, sys, time
asked = []
signal.signal(signal.SIGUSR1, lambda *_: asked.append(1))
print("ready", flush=True)
while not asked: time.sleep(0.05)
sys.exit(85)
"""


def start(folder: Path, code: str, **environment: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, str(ROOT / "launch" / "rank.py"), str(folder), "--", sys.executable, "-c", code],
        env={**os.environ, "RANK": "3", **environment},
    )


def record_of(folder: Path) -> dict[str, Any]:
    return record.read_json(folder / "exit_00003.json")


def wait_for_log(folder: Path, text: str) -> None:
    deadline = time.monotonic() + 60
    path = folder / "rank_00003.log"
    while not (path.exists() and text in path.read_text()):
        assert time.monotonic() < deadline, f"{text!r} never came"
        time.sleep(0.05)


def test_output_and_exit_code_are_kept(tmp_path: Path) -> None:
    assert start(tmp_path, "import sys; print('out'); print('err', file=sys.stderr); sys.exit(7)").wait(60) == 7
    assert record_of(tmp_path)["code"] == 7
    assert {"out", "err"} <= set((tmp_path / "rank_00003.log").read_text().split())


def test_a_stop_request_becomes_one_signal_and_looks_like_success(tmp_path: Path) -> None:
    for number in (signal.SIGTERM, signal.SIGUSR1):
        process = start(tmp_path, OBEDIENT)
        wait_for_log(tmp_path, "ready")
        process.send_signal(number)
        assert process.wait(60) == 0
        assert record_of(tmp_path)["code"] == EXIT_PREEMPTED
        (tmp_path / "rank_00003.log").unlink()


def test_a_request_before_the_handler_stands_is_repeated(tmp_path: Path) -> None:
    code = "import time; print('early', flush=True); time.sleep(2)\n" + OBEDIENT
    process = start(tmp_path, code)
    wait_for_log(tmp_path, "early")
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0
    assert record_of(tmp_path)["code"] == EXIT_PREEMPTED


def test_a_newer_attempt_ends_the_rank(tmp_path: Path) -> None:
    lease = Lease.take_next(tmp_path)
    process = start(
        tmp_path,
        "import time; print('on', flush=True); time.sleep(600)",
        **{RUN_VARIABLE: str(tmp_path), LEASE_VARIABLE: str(lease.generation)},
    )
    wait_for_log(tmp_path, "on")
    Lease.take_next(tmp_path)
    assert process.wait(60) == EXIT_FENCED
    assert record_of(tmp_path)["code"] == EXIT_FENCED


def test_the_rank_dies_with_its_wrapper(tmp_path: Path) -> None:
    process = start(tmp_path, "import os, time; print('pid', os.getpid(), flush=True); time.sleep(600)")
    wait_for_log(tmp_path, "pid")
    pid = int((tmp_path / "rank_00003.log").read_text().split()[1])
    process.kill()
    process.wait(60)
    deadline = time.monotonic() + 20
    while Path(f"/proc/{pid}").exists() and Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z":
        assert time.monotonic() < deadline, "the rank outlived its wrapper"
        time.sleep(0.05)


def test_a_shown_rank_outlives_a_full_disk(tmp_path: Path) -> None:
    (tmp_path / "rank_00000.log").symlink_to("/dev/full")
    process = start(tmp_path, "print('x' * 300000)", **{"RANK": "0", SHOW_VARIABLE: "1"})
    try:
        assert process.wait(60) == 0
    finally:
        process.kill()


def test_srun_s_variables_stand_in_for_torchrun_s() -> None:
    environment = {"SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_NTASKS": "8", "SLURM_NTASKS_PER_NODE": "4"}
    adopt_slurm_ranks(environment)
    assert [environment[k] for k in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")] == ["5", "1", "8", "4"]
    torchrun = {"RANK": "0", "SLURM_PROCID": "5"}
    adopt_slurm_ranks(torchrun)
    assert torchrun["RANK"] == "0"

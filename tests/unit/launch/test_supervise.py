"""The job's supervisor with stand-ins for SLURM's commands on PATH; the real ones are met in tests/slurm."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from launch import record, slurm
from megatron_dllm.run.files import write_json

pytestmark = pytest.mark.ranks  # the stand-ins are programs
ROOT = Path(__file__).resolve().parents[3]
JOB = {
    "run_folder": None,
    "name": "train",
    "digest": "x",
    "rank_python": "python",
    "stages": [],
    "ranks_per_node": 1,
    "valid_nodes": [1],
    "preflight": {"is_on": True},
    "srun_options": [],
    "command_prefix": [],
    "max_crashes": 1,
    "max_crashes_without_progress": 1,
}


@pytest.fixture
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folder of the stand-ins, first on PATH."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    monkeypatch.setenv("HOME", str(tmp_path))
    return folder


def stand_in(folder: Path, name: str, text: str) -> None:
    (folder / name).write_text(f"#!/bin/sh\n{text}\n")
    (folder / name).chmod(0o755)


@pytest.mark.ranks
def test_a_preflight_that_a_stop_request_ends_is_no_crash(commands: Path, tmp_path: Path) -> None:
    """Under an interpreter without packages, as on a node."""
    write_json(tmp_path / "job.json", JOB)
    stand_in(commands, "srun", 'env >"$HOME/environment"; kill -TERM $PPID; exit 1')
    stand_in(commands, "scontrol", "echo node1")
    stand_in(commands, "squeue", "echo COMPLETING")
    done = subprocess.run(
        [sys.executable, "-S", str(ROOT / "launch" / "supervise.py"), str(tmp_path)],
        check=False,
        env={**os.environ, "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node1", "SLURM_GPU_BIND": "closest"},
        capture_output=True,
        text=True,
    )
    (end,) = (event for event in record.events(tmp_path) if event["event"] == "end")
    assert (end["how"], end["reason"]) == ("terminated", "preflight: node1 gave no report"), done.stderr
    assert "SLURM is ending the job itself (completing)" in done.stdout
    environment = (tmp_path / "environment").read_text()
    assert "MASTER_ADDR=node1" in environment and "SLURM_GPU_BIND" not in environment


def test_a_requeue_waits_for_a_controller_that_restarts(commands: Path, tmp_path: Path) -> None:
    stand_in(commands, "squeue", '[ -e "$HOME/asked" ] && echo RUNNING || { touch "$HOME/asked"; exit 1; }')
    stand_in(commands, "scontrol", 'echo "$@" >"$HOME/said"')
    assert slurm.requeue("7", poll_seconds=0.01) is None
    assert (tmp_path / "said").read_text() == "requeue 7\n"
    # SLURM is quick: it has ended scontrol with the rest of the job.
    stand_in(commands, "squeue", '[ -e "$HOME/killed" ] && echo PENDING || echo RUNNING')
    stand_in(commands, "scontrol", 'touch "$HOME/killed"; kill -TERM $$')
    assert slurm.requeue("7", poll_seconds=0.01) == "SLURM is ending the job itself (pending)"
    stand_in(commands, "squeue", "exit 1")
    with pytest.raises(RuntimeError, match="squeue has not told the state of job 7"):
        slurm.requeue("7", answer_seconds=0.0, poll_seconds=0.01)

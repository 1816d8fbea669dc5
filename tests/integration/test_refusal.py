"""A start that cannot work ends all its ranks with one sentence, before a process group exists."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.kill import ROOT

NUM_RANKS = 2


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_ranks_without_a_launcher_to_end_them_hear_the_refusal_of_rank_0(tmp_path: Path) -> None:
    """Rank 0 alone looks at what lies on disk; nobody kills the other, as torchrun would."""
    words = ["experiment=tiny_base", f"data.train={tmp_path}/nowhere", f"run.root={tmp_path}/runs"]
    environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port()), "WORLD_SIZE": str(NUM_RANKS)}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "megatron_dllm.train", *words],
            cwd=ROOT,
            env={**os.environ, **environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(NUM_RANKS)
    ]
    try:
        texts = [process.communicate(timeout=300)[0] for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    assert [process.returncode for process in ranks] == [2] * NUM_RANKS
    assert texts[0].count(f"corpus {tmp_path}/nowhere has no nowhere.bin") == 1
    assert "nowhere" not in texts[1], "a refusal is said once"
    assert not any("Traceback" in text for text in texts)
    assert not (tmp_path / "runs").exists(), "nothing is written"


TASK = {"SLURM_JOB_ID": "77", "SLURM_NTASKS": "2", "SLURM_PROCID": "1", "SLURM_LOCALID": "1", "WORLD_SIZE": "2"}


@pytest.mark.parametrize(
    ("words", "environment", "message"),
    [
        ([], TASK, "SLURM_NTASKS (2) says that SLURM runs 2 tasks, and RANK is not set"),
        (["-m", "run.name=mr", "run.seed=1,2"], {}, "run.name (mr) is that of several members of the sweep"),
        (["--config-name", "no_such"], {}, "no_such"),
        (["run.nmae=x"], {"RANK": "0"}, "did you mean run.name?"),
    ],
)
def test_a_command_that_cannot_work_is_refused_once(
    tmp_path: Path, words: list[str], environment: dict[str, str], message: str
) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "megatron_dllm.train", "experiment=tiny_base", f"run.root={tmp_path}/runs", *words],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.stderr
    assert done.stderr.startswith("error: ") and message in done.stderr
    assert not list(tmp_path.iterdir()), "nothing is written"

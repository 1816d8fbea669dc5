"""A start that cannot work ends all its ranks with one sentence, before a process group exists."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

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

"""Hydra multirun through submitit: two short runs, two ranks each, on a real SLURM."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

from benchmarks.tiny_run import write_corpus
from launch import record
from tests.slurm.conftest import Cluster, missing_programs
from tests.slurm.test_training import Training

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.skipif(
        importlib.util.find_spec("hydra_plugins.hydra_submitit_launcher") is None
        if importlib.util.find_spec("hydra_plugins")
        else True,
        reason="needs hydra-submitit-launcher: pip install 'megatron_dllm[slurm]'",
    ),
]


def test_each_value_is_a_run_of_its_own(cluster: Cluster, tmp_path: Path) -> None:
    assert not missing_programs()
    write_corpus(tmp_path / "corpus")
    words = [word for word in Training(tmp_path, "sweep", scale=1).words if not word.startswith("run.")]
    done = cluster.run(
        sys.executable,
        "-m",
        "megatron_dllm.train",
        "--multirun",
        *words,
        "+sweep=slurm",
        f"run.root={tmp_path}/sweep",
        "optimizer.weight_decay=0.0,0.1",
        "hydra.launcher.tasks_per_node=2",
        "hydra.launcher.gpus_per_node=null",
        "hydra.launcher.partition=batch",
        "hydra.launcher.timeout_min=20",
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    states = []
    for number in ("0", "1"):
        folder = tmp_path / "sweep" / number
        latest = folder / "checkpoints" / str(record.latest_checkpoint(folder))
        contract = record.read_json(latest / "contract.json")
        assert contract["world_size"] == 2
        states.append(record.read_lines(folder / "metrics.jsonl")[-1]["loss"])
    assert states[0] != states[1]

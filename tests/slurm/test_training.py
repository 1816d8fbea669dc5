"""The trainer itself on a real SLURM: two nodes of two ranks, started by the documented command.

Every way of being interrupted ends with the bytes of the run that was not.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.tiny_run import read_tensors, write_corpus
from launch import record
from megatron_dllm.config.recipe_source import RECIPES
from megatron_dllm.training.observers.metrics_file import depends_on_machine
from tests.slurm.conftest import ROOT, Cluster, first_step_after, wait_for

pytestmark = pytest.mark.slurm

MODEL = [
    "num_layers=2",
    "hidden_size=32",
    "ffn_hidden_size=64",
    "num_attention_heads=4",
    "num_query_groups=2",
    "kv_channels=8",
    "vocab_size=128",
    "num_moe_experts=8",
    "moe_ffn_hidden_size=16",
    "moe_shared_expert_intermediate_size=16",
]
TOKENS = {
    "warmup_1": 2000,
    "warmup_4": 2000,
    "warmup_32": 2000,
    "warmup_64": 2000,
    "stable": 4000,
    "decay_128": 2000,
    "decay_32": 4000,
}
# Waits where a test asks it to; otherwise training itself.
PACED = "train_module=tests.slurm.paced_train"


class Training:
    """A conversion of a tiny model, by SLURM or by torchrun alone."""

    def __init__(self, root: Path, name: str, scale: float = 3.0) -> None:
        self.folder = root / name
        self.job_folder = self.folder / "launch" / "train"
        self.words = [
            "experiment=tiny_convert",
            f"run.root={root}",
            f"run.name={name}",
            f"data.train={root}/corpus",
            "data.validation=null",
            "data.tokenizer=null",
            "evaluation.num_tokens=0",
            "evaluation.block_sizes=[32]",
            "logging.interval_steps=1",
            "logging.tensorboard=false",
            "checkpoint.save_interval_tokens=1000",
            "schedule.context_length=128",
            "schedule.row_length=256",
            "schedule.stages.stable.block_size=128",
            "checkpoint.keep_last=2",
            *(f"model.{word}" for word in MODEL),
            *(f"schedule.stages.{stage}.num_tokens={int(scale * tokens)}" for stage, tokens in TOKENS.items()),
            *(f"schedule.stages.{stage}.global_batch_size=4" for stage in TOKENS),
            *(f"schedule.stages.{stage}.micro_batch_size=1" for stage in TOKENS),
            *(f"schedule.stages.{stage}.lr_warmup_tokens=0" for stage in TOKENS),
        ]

    def submit(self, cluster: Cluster, *words: str) -> str:
        """Submit on two nodes of two ranks; the job's number."""
        done = cluster.submit(
            *self.words,
            "cluster=laptop",
            "cluster.ranks_per_node=2",
            "nodes=2",
            "cluster.environment.OMP_NUM_THREADS='1'",
            *words,
        )
        assert done.returncode == 0, done.stderr
        return record.read_json(self.folder / "chain.json")["jobs"]["train"]["job_id"]

    def run_by_torchrun(self) -> None:
        """The same run on four ranks without SLURM or launcher."""
        done = subprocess.run(
            [
                sys.executable,
                "-m",
                "torch.distributed.run",
                "--standalone",
                "--nproc-per-node=4",
                "-m",
                "megatron_dllm.train",
                *self.words,
            ],
            cwd=ROOT,
            capture_output=True,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            check=False,
        )
        assert done.returncode == 0, done.stderr[-3000:]

    def events(self, kind: str) -> list[dict[str, Any]]:
        """Events of one kind."""
        return [event for event in record.events(self.job_folder) if event["event"] == kind]

    def log(self) -> str:
        """What the supervisor and the failing rank said."""
        texts = [path.read_text() for path in sorted(self.job_folder.glob("attempt_*/failure.txt"))]
        return "\n".join([(self.job_folder / "slurm.log").read_text(), *texts])

    def is_done(self) -> bool:
        """Whether the job has finished; fails as soon as it cannot."""
        assert not self.events("gave_up"), self.log()
        return record.done_digest(self.job_folder) is not None

    def step(self) -> int:
        """Newest step in the metrics."""
        lines = record.read_lines(self.folder / "metrics.jsonl")
        return max((line.get("step", 0) for line in lines), default=0)

    def curve(self) -> list[dict[str, Any]]:
        """Every logged step, without what depends on the clock."""
        lines = [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]
        return [{key: value for key, value in line.items() if not depends_on_machine(key)} for line in lines]

    def tensors(self) -> dict[str, torch.Tensor]:
        """Weights and optimizer state at the end."""
        return read_tensors(self.folder / "checkpoints" / str(record.latest_checkpoint(self.folder)))


def assert_same(found: Training, expected: Training) -> None:
    assert found.curve() == expected.curve()
    tensors, expected_tensors = found.tensors(), expected.tensors()
    assert tensors.keys() == expected_tensors.keys()
    assert not [key for key, tensor in tensors.items() if not torch.equal(tensor, expected_tensors[key])]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("training")
    write_corpus(path / "corpus")
    return path


@pytest.fixture(scope="module")
def unbroken(root: Path, running_cluster: Cluster) -> Iterator[Training]:
    run = Training(root, "unbroken")
    run.run_by_torchrun()
    yield run


def test_a_submitted_run_equals_torchrun(cluster: Cluster, unbroken: Training, root: Path) -> None:
    run = Training(root, "submitted")
    run.submit(cluster, "cluster.is_preflight_on=true")
    wait_for(run.is_done, 1500, "the run to finish")
    assert_same(run, unbroken)
    assert sorted(path.name for path in (run.job_folder / "attempt_0001").glob("rank_*.log")) == [
        f"rank_0000{rank}.log" for rank in range(4)
    ]
    status = cluster.run("python3", "launch/status.py", str(run.folder)).stdout
    assert "finished" in status and str(run.step()) in status


@pytest.mark.slow
def test_preemption_changes_nothing(
    cluster: Cluster, unbroken: Training, root: Path, record_property: Callable[[str, object], None]
) -> None:
    run = Training(root, "preempted")
    run.submit(cluster)
    wait_for(lambda: run.step() >= 5, 600, "the first steps")
    preempted = time.time()
    cluster.run("sbatch", "--partition=urgent", "--nodes=4", "--exclusive", "--output=/dev/null", "--wrap=sleep 1")
    record_property("preempted by a job of 1 s, training", first_step_after(run.job_folder, preempted))
    wait_for(run.is_done, 1500, "the run to finish")
    assert len(run.events("start")) >= 2, run.log()
    assert_same(run, unbroken)


def test_lost_nodes_and_daemons_change_nothing(
    cluster: Cluster, unbroken: Training, root: Path, record_property: Callable[[str, object], None]
) -> None:
    """First the node of rank 0 in the middle of a save, then the daemon of a node whose ranks live on."""
    run = Training(root, "lost")
    run.submit(cluster, PACED)
    wait_for(lambda: record.latest_checkpoint(run.folder), 600, "the first checkpoint")
    (run.folder / "hold_save").touch()
    wait_for(lambda: list((run.folder / "checkpoints").glob(".*step_*/manifest.json")), 600, "a save in progress")
    saved = record.latest_checkpoint(run.folder)
    cluster.host("crash", run.events("start")[0]["nodes"][0])
    crashed = time.time()
    (run.folder / "hold_save").unlink()
    (run.folder / "slow_steps").touch()
    record_property("node lost in mid-save, training", first_step_after(run.job_folder, crashed))
    assert run.events("start")[1]["checkpoint"] == saved

    cluster.host("kill-daemon", run.events("start")[1]["nodes"][0])
    killed = time.time()
    wait_for(lambda: len(run.events("start")) > 2, 600, "the third attempt")
    (run.folder / "slow_steps").unlink()
    record_property("daemon lost, training", first_step_after(run.job_folder, killed))
    wait_for(run.is_done, 1500, "the run to finish")
    assert_same(run, unbroken)


@pytest.mark.slow
def test_time_limits_change_nothing(cluster: Cluster, unbroken: Training, root: Path) -> None:
    run = Training(root, "limited")
    run.submit(cluster, PACED, "cluster.time_limit='00:02:00'", "cluster.stop_seconds=75")
    wait_for(run.folder.exists, 60, "the run's folder")
    (run.folder / "slow_steps").touch()
    wait_for(lambda: sum(event["how"] == "stopped" for event in run.events("end")) >= 3, 600, "three stops")
    (run.folder / "slow_steps").unlink()
    wait_for(run.is_done, 600, "the run to finish")
    assert_same(run, unbroken)


CHAIN = """# @package _global_
name: chain
inputs: {start: "???"}
jobs:
  to_hf:
    module: checkpoints_tools.mcore_to_hf
    arguments: [--checkpoint, "${inputs.start}", --output, "${root}/${name}/start_hf", --dtype, fp32]
    output: "${root}/${name}/start_hf"
  to_mcore:
    module: checkpoints_tools.hf_to_mcore
    arguments: [--hf, "${root}/${name}/start_hf", --output, "${root}/${name}/start"]
    output: "${root}/${name}/start"
  convert: {experiment: tiny_convert, nodes: 2, overrides: ["checkpoint.load=${root}/${name}/start", %WORDS%]}
  merge:
    module: checkpoints_tools.merge_topk
    arguments: [--run, "${root}/${name}/convert", --last_n, "2", --output, "${root}/${name}/merged"]
    output: "${root}/${name}/merged"
  export:
    module: checkpoints_tools.mcore_to_hf
    arguments: [--checkpoint, "${root}/${name}/merged", --output, "${root}/${name}/hf", --dtype, fp32]
    output: "${root}/${name}/hf"
"""


def test_a_chain_of_real_jobs_survives_a_cancelled_one(cluster: Cluster, unbroken: Training, root: Path) -> None:
    """Weights out, in, conversion, merge, weights out: the end is to the byte what the chain gives on this machine."""
    recipes = root / "recipes"
    shutil.copytree(RECIPES, recipes)
    words = [word for word in unbroken.words if not word.startswith(("experiment=", "run."))]
    (recipes / "chain" / "real.yaml").write_text(CHAIN.replace("%WORDS%", json.dumps(words)[1:-1]))
    words = [
        "experiment=real",
        f"inputs.start={unbroken.folder}",
        "cluster=laptop",
        "cluster.ranks_per_node=2",
        PACED,
        "cluster.environment.OMP_NUM_THREADS='1'",
        "--config-dir",
        str(recipes),
    ]
    here = subprocess.Popen(
        [sys.executable, "launch/local.py", *words, f"root={root}/here"],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    folder = root / "slurm" / "chain"
    (folder / "convert").mkdir(parents=True)
    (folder / "convert" / "slow_steps").touch()
    done = cluster.submit(*words, f"root={root}/slurm")
    assert done.returncode == 0, done.stderr
    job_ids = {name: entry["job_id"] for name, entry in record.read_json(folder / "chain.json")["jobs"].items()}
    wait_for(lambda: record.latest_checkpoint(folder / "convert"), 600, "a checkpoint of the conversion")
    cluster.run("scancel", job_ids["convert"])
    wait_for(lambda: cluster.state(job_ids["export"]) == "CANCELLED", 120, "the jobs after it to be cancelled")
    (folder / "convert" / "slow_steps").unlink()
    again = cluster.submit(*words, f"root={root}/slurm")
    assert again.returncode == 0, again.stderr
    for name in ("to_hf", "to_mcore"):
        assert f"{name:<20} finished before" in again.stderr
    wait_for((folder / "launch" / "export" / "done.json").exists, 900, "the chain to finish")
    attempts = {
        name: [event["event"] for event in record.events(folder / "launch" / name)].count("start") for name in job_ids
    }
    assert attempts == {"to_hf": 1, "to_mcore": 1, "convert": 2, "merge": 1, "export": 1}
    assert here.wait(600) == 0
    expected = {path.name: path.read_bytes() for path in (root / "here" / "chain" / "hf").glob("*.safetensors")}
    found = {path.name: path.read_bytes() for path in (folder / "hf").glob("*.safetensors")}
    assert expected and found == expected

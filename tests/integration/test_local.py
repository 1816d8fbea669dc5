"""Chains on this machine, with the stand-in trainer and tool."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from launch import record
from launch.chain import compose_chain
from launch.failure import exit_records
from launch.local import run_attempts
from launch.progress import Progress, progress_of
from launch.status import rows, total_tokens
from launch.world import spread, wanted_ranks
from megatron_dllm.config.recipe_source import RECIPES
from megatron_dllm.run.exit_codes import EXIT_LAYOUT, EXIT_PREEMPTED
from tests.integration.stage_train import write_checkpoint
from tests.slurm.test_attempts import expected_state

ROOT = Path(__file__).resolve().parents[2]
CHAIN = """# @package _global_
name: small
train_module: tests.slurm.fake_train
jobs:
  corpus:
    module: tests.slurm.fake_tool
    arguments: [--output, "${root}/small/text.bin", --text, words]
    output: "${root}/small/text.bin"
  base:
    experiment: tiny_base
    overrides: ["data.train=${root}/small/text", data.validation=null, data.tokenizer=null, evaluation.num_tokens=0]
"""


@pytest.fixture
def recipes(tmp_path: Path) -> Path:
    folder = tmp_path / "recipes"
    shutil.copytree(RECIPES, folder)
    (folder / "chain").mkdir(exist_ok=True)
    (folder / "chain" / "small.yaml").write_text(CHAIN)
    return folder


def command(recipes: Path, *words: str) -> list[str]:
    return [
        sys.executable,
        "launch/local.py",
        "experiment=small",
        f"root={recipes.parent}",
        "--config-dir",
        str(recipes),
        *words,
    ]


def run(recipes: Path, *words: str, **settings: Any) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, **{f"FAKE_{key.upper()}": str(value) for key, value in settings.items()}}
    return subprocess.run(
        command(recipes, *words), cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )


def final_state(recipes: Path) -> Any:
    folder = recipes.parent / "small" / "base"
    return record.read_json(folder / "checkpoints" / str(record.latest_checkpoint(folder)) / "state.json")


def test_a_chain_runs_once_and_is_skipped_after(recipes: Path) -> None:
    done = run(recipes, steps=6)
    assert done.returncode == 0, done.stderr
    assert "starts at step 0" in done.stdout, "the rank's output is passed through"
    assert final_state(recipes) == expected_state(6)
    book = record.read_json(recipes.parent / "small" / "chain.json")
    assert list(book["jobs"]) == ["corpus", "base"] and book["jobs"]["base"]["seconds"] > 0
    again = run(recipes, steps=6)
    assert again.returncode == 0 and again.stderr.count("finished before, skipped") == 2
    changed = run(recipes, "run.seed=4")
    assert changed.returncode == 2 and "has finished with another command or configuration" in changed.stderr
    states = {row.job: row.state for row in rows(recipes.parent / "small")}
    assert states == {"corpus": "finished", "base": "finished"}


def wait_for(metrics: Path, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not metrics.exists():
        assert time.monotonic() < deadline and process.poll() is None, "training never began"
        time.sleep(0.1)


def test_ctrl_c_saves_and_the_same_command_continues(recipes: Path) -> None:
    process = subprocess.Popen(
        command(recipes),
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "FAKE_STEPS": "100000", "FAKE_STEP_SECONDS": "0.05"},
    )
    metrics = recipes.parent / "small" / "base" / "metrics.jsonl"
    wait_for(metrics, process)
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(60) == EXIT_PREEMPTED
    assert process.stderr is not None and "the same command continues it" in process.stderr.read()
    stopped = final_state(recipes)["step"]
    assert run(recipes, steps=stopped + 4, step_seconds=0.01).returncode == 0
    assert final_state(recipes) == expected_state(stopped + 4)


def test_a_failure_shows_the_failing_rank_s_words(recipes: Path) -> None:
    done = run(recipes, steps=6, **{"raise": "0:3"})
    assert done.returncode == 1
    assert "deliberate failure of rank 0 at step 3" in done.stderr and "rank 0 on" in done.stderr
    assert run(recipes, steps=6).returncode == 0


def rank_process(rank: int, folder: Path) -> int | None:
    """Process number of a running rank (not of its wrapper) of a chain below `folder`."""
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            words = (process / "cmdline").read_text()
            if (
                str(folder) in words
                and "fake_train" in words
                and "rank.py" not in words
                and f"\0RANK={rank}\0" in (process / "environ").read_text()
            ):
                return int(process.name)
    return None


def test_a_killed_rank_is_named_before_the_one_that_lost_it(recipes: Path) -> None:
    process = subprocess.Popen(
        command(recipes, "cluster.ranks_per_node=2"),
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "FAKE_STEPS": "100000"},
        start_new_session=True,
    )
    try:
        wait_for(recipes.parent / "small" / "base" / "metrics.jsonl", process)
        killed = rank_process(1, recipes.parent)
        assert killed is not None
        os.kill(killed, signal.SIGKILL)
        _, said = process.communicate(timeout=60)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert re.search(r"rank 1 on \S+: killed by SIGKILL", said), said
    assert process.returncode == 1 and "rank 0 on" not in said


def test_a_job_that_was_killed_after_its_rename_counts_as_finished(recipes: Path) -> None:
    assert run(recipes, steps=2).returncode == 0
    chain = compose_chain(["experiment=small", f"root={recipes.parent}"], recipes)
    corpus = chain.jobs[0]
    marker = chain.job_folder(corpus) / "done.json"
    marker.unlink()
    assert progress_of(chain, corpus) is Progress.FINISHED and marker.exists()
    marker.unlink()
    (chain.job_folder(corpus) / "events.jsonl").unlink()
    with pytest.raises(ValueError, match="was not written by this command"):
        progress_of(chain, corpus)


def test_the_next_stage_of_a_schedule_chooses_the_ranks(tmp_path: Path) -> None:
    stages = [{"name": "a", "num_tokens": 100, "world_size": 4}, {"name": "b", "num_tokens": 100, "world_size": None}]
    assert wanted_ranks(stages, tmp_path) == 4
    for step, (consumed, expected) in enumerate(((99, 4), (100, None), (200, None))):
        folder = tmp_path / "checkpoints" / f"step_{step}"
        folder.mkdir(parents=True)
        write_checkpoint(folder, {"consumed_tokens": consumed})
        assert wanted_ranks(stages, tmp_path) == expected
    # One that training will pass over does not count, whatever `latest` says.
    (tmp_path / "checkpoints" / "latest").write_text("step_2\n")
    for step in (1, 2):
        (tmp_path / "checkpoints" / f"step_{step}" / "manifest.json").unlink()
    assert wanted_ranks(stages, tmp_path) == 4
    assert spread(3, 4) == (1, 3) and spread(8, 4) == (2, 4)
    with pytest.raises(ValueError, match="must be a multiple"):
        spread(6, 4)


STAGES = """context_length: 32
stages:
  warmup: {num_tokens: 600, global_batch_size: 4, learning_rate: 1.0e-3, world_size: 1}
  stable: {num_tokens: 600, global_batch_size: 4, learning_rate: 1.0e-3, world_size: 2,
           parallel: {pipeline_model_parallel_size: 2}}
  decay: {num_tokens: 600, global_batch_size: 4, learning_rate: 1.0e-3, world_size: 1}
"""


def test_a_chain_goes_on_with_the_ranks_of_each_stage(recipes: Path) -> None:
    (recipes / "schedule" / "stages.yaml").write_text(STAGES)
    (recipes / "chain" / "small.yaml").write_text(
        CHAIN.replace("slurm.fake_train", "integration.stage_train").replace(
            "overrides: [", "nodes: 2\n    overrides: [schedule=stages, "
        )
    )
    done = run(recipes)
    assert done.returncode == 0, done.stderr
    folder = recipes.parent / "small"
    attempts = [
        [entry["code"] for entry in exit_records(attempt)]
        for attempt in sorted((folder / "launch" / "base").glob("attempt_*"))
    ]
    assert attempts == [[EXIT_LAYOUT], [EXIT_LAYOUT] * 2, [0]]
    assert record.read_json(folder / "base" / "checkpoints" / "step_3" / "state.json") == {
        "done": ["warmup", "stable", "decay"],
        "consumed_tokens": 1800,
    }


@pytest.mark.parametrize("moves", [0, 2])
def test_a_run_that_asks_for_another_layout_must_have_moved_on(tmp_path: Path, moves: int) -> None:
    checkpoints = tmp_path / "checkpoints"
    checkpoints.mkdir()
    starts: list[int] = []

    def attempt() -> int:
        starts.append(len(starts))
        if len(starts) <= moves:
            (checkpoints / "latest").write_text(f"step_{len(starts)}\n")
        return EXIT_LAYOUT

    assert run_attempts(attempt, tmp_path) == EXIT_LAYOUT
    assert len(starts) == moves + 1


def test_the_frozen_schedule_gives_the_tokens_to_come(recipes: Path) -> None:
    job = compose_chain(["experiment=tiny_convert"], recipes).jobs[0]
    (recipes / "config.yaml").write_text(job.config_text)
    assert job.config is not None
    expected = sum(stage.num_tokens for stage in job.config.schedule.stages.values())
    assert total_tokens(recipes) == expected

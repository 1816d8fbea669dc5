"""Time limits, preemption, crashes, lost nodes and lost daemons, with the stand-in trainer on a real SLURM.

The stand-in's state is a hash chained over the steps: an equal end means that no step was lost, repeated or foreign.
"""

from __future__ import annotations

import hashlib
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_dllm.config.recipe_source import RECIPES
from tests.slurm.conftest import FakeRun, wait_for

pytestmark = pytest.mark.slurm


def expected_state(steps: int, seed: int = 1234) -> dict[str, object]:
    state = str(seed)
    for step in range(1, steps + 1):
        state = hashlib.sha256(f"{state}:{step}".encode()).hexdigest()
    return {"step": steps, "state": state}


def test_a_run_longer_than_the_time_limit_continues_by_itself(fake_run: FakeRun) -> None:
    job_id = fake_run.submit(
        "cluster.time_limit='00:01:00'", "cluster.stop_seconds=45", steps=450, step_seconds=0.2, save_every=10000
    )
    wait_for(fake_run.is_done, 480, "the run to finish")
    stops = [event for event in fake_run.events("end") if event["how"] == "stopped"]
    assert len(stops) >= 3, fake_run.log()
    assert {event["job_id"] for event in fake_run.events("start")} == {job_id}
    assert fake_run.final_state() == expected_state(450)


def test_preemption_saves_and_continues_what_was_submitted(
    fake_run: FakeRun, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    recipes = tmp_path / "recipes"
    shutil.copytree(RECIPES, recipes)
    fake_run.submit("--config-dir", str(recipes), steps=60, step_seconds=0.2, save_every=10000)
    wait_for(lambda: fake_run.step() > 5, 60, "the first steps")
    # What the job runs is frozen: neither the recipe's new seed nor this checkout reaches its next attempt.
    recipe = recipes / "experiment" / "tiny_base.yaml"
    recipe.write_text(recipe.read_text().replace("run: {", "run: {seed: 99, "))
    preempted = time.time()
    fake_run.cluster.run(
        "sbatch", "--partition=urgent", "--nodes=4", "--exclusive", "--output=/dev/null", "--wrap=sleep 2"
    )
    wait_for(fake_run.is_done, 180, "the preempted run to finish")
    ends = fake_run.events("end")
    assert [event["how"] for event in ends] == ["stopped", "finished"], fake_run.log()
    record_property("preempted by a job of 2 s, stand-in", fake_run.seconds_to_step(preempted))
    last = sorted(fake_run.job_folder.glob("attempt_*"))[-1]
    assert f"from {fake_run.folder}/launch/code_" in (last / "rank_00000.log").read_text()
    assert ends[0]["checkpoint"] is not None
    assert fake_run.final_state() == expected_state(60)


def test_a_crash_is_named_and_ends_the_job_soon(fake_run: FakeRun) -> None:
    job_id = fake_run.submit(steps=50, step_seconds=0.1, save_every=5, **{"raise": "3:7"})
    first = wait_for(lambda: fake_run.events("end"), 120, "the crash")[0]
    assert first["how"] == "crashed"
    assert first["time"] - fake_run.events("start")[0]["time"] < 60
    assert "rank 3 on node2" in first["reason"]
    failure = (fake_run.job_folder / "attempt_0001" / "failure.txt").read_text()
    assert "deliberate failure of rank 3 at step 7" in failure
    given_up = wait_for(lambda: fake_run.events("gave_up"), 180, "the end of restarts")[0]
    assert "3 crashes without a new checkpoint" in given_up["reason"]
    # The first crash had made progress (step 5); three more had not.
    assert len(fake_run.events("start")) == 4
    wait_for(lambda: fake_run.cluster.state(job_id) == "FAILED", 30, "the job to fail")
    status = fake_run.cluster.run("python3", "launch/status.py", str(fake_run.folder)).stdout
    assert "failed" in status and "deliberate failure of rank 3 at step 7" in status


def test_a_crash_that_happens_once_is_survived(
    fake_run: FakeRun, record_property: Callable[[str, object], None]
) -> None:
    fake_run.submit(steps=20, step_seconds=0.1, save_every=5, **{"raise": "1:12:once"})
    wait_for(fake_run.is_done, 120, "the run to finish")
    assert [event["how"] for event in fake_run.events("end")] == ["crashed", "finished"]
    pause = fake_run.events("training")[1]["pause"]
    assert pause > 1
    record_property("rank crashed, stand-in", f"{pause:.0f} s")
    assert fake_run.final_state() == expected_state(20)


@pytest.mark.parametrize("moment", ["step", pytest.param("save", marks=pytest.mark.slow)])
def test_a_lost_node_costs_only_the_steps_since_the_checkpoint(
    fake_run: FakeRun, moment: str, record_property: Callable[[str, object], None]
) -> None:
    saving = moment == "save"
    fake_run.submit(steps=200, step_seconds=0.1, save_every=40, save_seconds=4 if saving else 0.1)
    # Rank 0 saves, on the first node: that one is lost in mid-save, taking the supervisor with it.
    node = wait_for(lambda: fake_run.events("start"), 60, "the start")[0]["nodes"][0 if saving else 1]
    latest = fake_run.folder / "checkpoints" / "latest"
    wait_for(latest.exists, 60, "the first checkpoint")
    if saving:
        wait_for(lambda: list((fake_run.folder / "checkpoints").glob(".step_0000080.*")), 60, "the second save")
    else:
        wait_for(lambda: fake_run.step() >= 50, 60, "steps after it")
    fake_run.cluster.host("crash", node)
    crashed = time.time()
    wait_for(lambda: len(fake_run.events("start")) > 1, 120, "the second attempt")
    began = fake_run.events("start")[1]
    if saving:
        assert list((fake_run.folder / "checkpoints").glob(".step_0000080.*")), "it was not lost in mid-save"
    assert node not in began["nodes"]
    assert began["checkpoint"] == "step_0000040"
    record_property(f"node lost in mid-{moment}, stand-in", fake_run.seconds_to_step(crashed))
    wait_for(fake_run.is_done, 120, "the run to finish")
    first = fake_run.events("end")[0]
    assert node in first["reason"], fake_run.log()
    assert fake_run.final_state() == expected_state(200)


@pytest.mark.slow
def test_a_lost_daemon_leaves_no_second_writer(fake_run: FakeRun) -> None:
    """slurmd of a node dies while its ranks live on: SLURM starts the job a second time beside them."""
    fake_run.submit("nodes=1", steps=400, step_seconds=0.2, save_every=10)
    node = wait_for(lambda: fake_run.events("start"), 60, "the start")[0]["nodes"][0]
    wait_for(lambda: fake_run.step() > 15, 60, "steps after the first checkpoint")
    fake_run.cluster.host("kill-daemon", node)
    wait_for(lambda: len(fake_run.events("start")) > 1, 120, "the second attempt")
    second = fake_run.events("start")[1]
    assert second["nodes"] != [node]
    processes = fake_run.cluster.host("exec", node, "ps", "ax", "-o", "args")
    assert "fake_train" not in processes, "the old ranks still run although the new attempt has started"
    fake_run.cluster.host("boot", node)
    wait_for(fake_run.is_done, 180, "the run to finish")
    assert fake_run.final_state() == expected_state(400)
    assert [event["how"] for event in fake_run.events("end")].count("finished") == 1, fake_run.log()


def test_a_cancelled_job_stays_cancelled(fake_run: FakeRun) -> None:
    job_id = fake_run.submit(steps=1000, step_seconds=0.1, save_every=10)
    wait_for(lambda: fake_run.step() > 5, 60, "the first steps")
    fake_run.cluster.run("scancel", job_id)
    wait_for(lambda: fake_run.cluster.state(job_id) == "CANCELLED", 60, "the cancellation")
    time.sleep(8)
    assert fake_run.cluster.state(job_id) == "CANCELLED"
    assert len(fake_run.events("start")) == 1


def test_a_restart_takes_fewer_nodes_when_the_recipe_allows(fake_run: FakeRun) -> None:
    """Four nodes of two ranks; after one is lost three are left, and the batch of 8 rows divides over two."""
    fake_run.submit("nodes=4", "min_nodes=1", steps=100, step_seconds=0.1, save_every=20)
    wait_for(lambda: fake_run.step() > 25, 120, "steps after the first checkpoint")
    assert len(fake_run.events("start")[0]["nodes"]) == 4
    fake_run.cluster.host("crash", "node3")
    wait_for(fake_run.is_done, 300, "the run to finish on what is left")
    last = fake_run.events("start")[-1]
    assert "node3" not in last["nodes"] and (len(last["nodes"]), last["ranks"]) == (2, 4)
    assert fake_run.final_state() == expected_state(100)


def test_the_preflight_refuses_and_names_bad_nodes(fake_run: FakeRun) -> None:
    fake_run.submit("cluster.is_preflight_on=true", "cluster.min_free_disk_gib=1e9", steps=5)
    end = wait_for(lambda: fake_run.events("end"), 200, "the preflight's verdict")[0]
    assert end["how"] == "crashed"
    assert "preflight: node1: has" in end["reason"] and "node2: has" in end["reason"]
    assert "cluster.min_free_disk_gib" in end["reason"]
    assert not (fake_run.folder / "metrics.jsonl").exists()


@pytest.mark.slow
def test_ranks_that_do_not_stop_in_time_are_requeued_before_the_limit(fake_run: FakeRun) -> None:
    """A step outlasts the time between the request and the limit; saved steps are not lost."""
    job_id = fake_run.submit(
        "cluster.time_limit='00:02:00'", "cluster.stop_seconds=80", steps=2, slow="2:200", save_every=1
    )
    wait_for(lambda: fake_run.events("end"), 240, "the end of the first attempt")
    assert fake_run.events("end")[0]["how"] == "overran", fake_run.log()
    wait_for(lambda: len(fake_run.events("start")) > 1, 60, "the second attempt")
    assert fake_run.cluster.state(job_id) == "RUNNING"
    assert fake_run.events("start")[1]["checkpoint"] == "step_0000001"


STAGES = """context_length: 32
stages:
  ar: {objective: ar, num_tokens: 600, learning_rate: 1.0e-3, world_size: 4}
  stable: {num_tokens: 600, global_batch_size: 8, learning_rate: 1.0e-3, world_size: 1}
  decay: {num_tokens: 600, global_batch_size: 8, learning_rate: 1.0e-3, world_size: 2}
"""


def test_stages_of_a_schedule_follow_each_other_on_their_own_ranks_in_one_job(
    fake_run: FakeRun, tmp_path: Path
) -> None:
    recipes = tmp_path / "recipes"
    shutil.copytree(RECIPES, recipes)
    (recipes / "schedule" / "stages.yaml").write_text(STAGES)
    job_id = fake_run.submit(
        "--config-dir", str(recipes), "train_module=tests.integration.stage_train", "schedule=stages"
    )
    wait_for(fake_run.is_done, 180, "the three stages to finish")
    attempts = fake_run.events("start")
    assert [(event["ranks"], len(event["nodes"])) for event in attempts] == [(4, 2), (1, 1), (2, 1)], fake_run.log()
    assert {event["job_id"] for event in attempts} == {job_id}
    assert [event["how"] for event in fake_run.events("end")] == ["layout", "layout", "finished"]
    assert fake_run.final_state() == {"done": ["ar", "stable", "decay"], "consumed_tokens": 1800}

"""What submit.py refuses, how it submits chains, and what a resubmission skips, on a real SLURM."""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from launch import record
from megatron_dllm.config.recipe_source import RECIPES
from tests.slurm.conftest import ROOT, Cluster, FakeRun, wait_for
from tests.slurm.test_attempts import expected_state

pytestmark = pytest.mark.slurm

CHAIN = """# @package _global_
name: chain
jobs:
  corpus:
    module: tests.slurm.fake_tool
    arguments: [--output, "${root}/${name}/corpus.txt", --text, corpus]
    output: "${root}/${name}/corpus.txt"
  base: {experiment: tiny_base, nodes: 2}
  merge:
    module: tests.slurm.fake_tool
    arguments: [--output, "${root}/${name}/merged.txt", --text, merged, --seconds, "%SECONDS%"]
    output: "${root}/${name}/merged.txt"
  side:
    module: tests.slurm.fake_tool
    arguments: [--output, "${root}/${name}/side.txt", --text, side of RANKS]
    output: "${root}/${name}/side.txt"
    nodes: 2
    ranks_per_node: 2
    after: [corpus]
  tune: {experiment: tiny_base, after: [merge, side]}
"""


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["nodes=3"], "must be a multiple of data parallel size x micro_batch_size"),
        (["parallel.pipeline_model_parallel_size=3"], "must divide the number of ranks"),
        (["data.train=/nowhere/text"], "data.train (/nowhere/text) has no /nowhere/text.bin"),
        (["data.tokenizer=/nowhere/tokenizer"], "data.tokenizer (/nowhere/tokenizer) is not a folder"),
        (["checkpoint.load=/nowhere/weights"], "holds no complete checkpoint"),
        (["cluster.partion=x"], "did you mean cluster.partition?"),
        (["cluster=moon"], "cluster (moon) is not a recipe"),
        (["schedule.context_lenght=64"], "did you mean schedule.context_length?"),
        (
            ["cluster.container.kind=apptainer", "cluster.container.image=/nowhere/x.sif"],
            "cluster.container.image (/nowhere/x.sif) does not exist",
        ),
        (["run.root=/proc/nowhere"], "cannot be written"),
        (["run.name='a b'"], "it names a folder and a job"),
        (["run.name='$(touch /tmp/pwned)'"], "it names a folder and a job"),
        (['run.name="it\'s"'], "it names a folder and a job"),
        (["nodes=8", "schedule.stages.ar.global_batch_size=16"], "Requested node configuration is not available"),
        (["cluster.partition=nosuch"], "SLURM would refuse the job"),
        (["cluster.gpus_per_node=64"], "SLURM would refuse the job"),
        (["cluster.constraint=moon"], "SLURM would refuse the job"),
    ],
)
def test_the_impossible_is_refused_before_anything_is_queued(
    fake_run: FakeRun, words: list[str], sentence: str
) -> None:
    done = fake_run.cluster.submit(*fake_run.words, *words)
    assert done.returncode == 2 and sentence in done.stderr, done.stderr
    assert "Traceback" not in done.stderr
    assert not fake_run.cluster.run("squeue", "--noheader").stdout
    assert not Path("/tmp/pwned").exists()


def test_a_dry_run_shows_everything_and_leaves_nothing(fake_run: FakeRun) -> None:
    done = fake_run.cluster.submit(*fake_run.words, "--dry_run")
    assert done.returncode == 0
    assert "#!/bin/bash" in done.stdout and "sbatch --parsable --job-name=run.train" in done.stdout
    assert not fake_run.folder.exists()


def test_a_run_in_the_queue_is_not_submitted_twice(fake_run: FakeRun) -> None:
    fake_run.submit(steps=200, step_seconds=0.1)
    again = fake_run.cluster.submit(*fake_run.words)
    assert again.returncode == 2 and "is in the queue already" in again.stderr


def test_a_user_s_strings_stay_strings_in_a_job(fake_run: FakeRun) -> None:
    fake_run.cluster.environment["NOTE"] = "x"
    nasty = 'a b"c$(touch /tmp/pwned)`id`;&'
    fake_run.submit(f"cluster.environment.NOTE='{nasty}'", steps=2, print="NOTE")
    wait_for(fake_run.is_done, 60, "the run to finish")
    assert nasty in (fake_run.job_folder / "attempt_0001" / "rank_00000.log").read_text()
    assert not Path("/tmp/pwned").exists()


def test_every_rank_sees_all_gpus_of_its_node(fake_run: FakeRun) -> None:
    fake_run.submit("cluster.gpus_per_node=2", steps=2, print="CUDA_VISIBLE_DEVICES")
    wait_for(fake_run.is_done, 60, "the run to finish")
    logs = sorted((fake_run.job_folder / "attempt_0001").glob("rank_*.log"))
    assert ["0,1" in log.read_text().split() for log in logs] == [True] * 4


@pytest.fixture
def scratch() -> Iterator[str]:
    """A folder with a short name, whoever runs the tests: sockets lie below it, whose paths the kernel limits."""
    with tempfile.TemporaryDirectory(prefix="s", dir="/tmp") as folder:
        yield folder


def test_modules_and_a_container_surround_the_ranks(fake_run: FakeRun, tmp_path: Path, scratch: str) -> None:
    """Stand-ins on PATH: `module` notes what it is to load, `apptainer` its options, and runs the rest."""
    stubs = {
        "module": 'echo "module $*" >>"$STUBS/calls"',
        "apptainer": 'echo "apptainer $*" >>"$STUBS/calls"\nuntil [ "$1" = "$STUBS/x.sif" ]; do shift; done\n'
        'shift\nINSIDE=yes exec "$@"',
    }
    folder = tmp_path / "stubs"
    folder.mkdir()
    for name, text in stubs.items():
        (folder / name).write_text(f"#!/bin/bash\n{text}\n")
        (folder / name).chmod(0o755)
    (folder / "x.sif").touch()
    environment = fake_run.cluster.environment
    fake_run.cluster.environment = {**environment, "PATH": f"{folder}:{environment['PATH']}", "STUBS": str(folder)}
    fake_run.submit(
        "cluster.modules=[tools/1.0]",
        "cluster.container.kind=apptainer",
        f"cluster.container.image={folder}/x.sif",
        f"cluster.container.python={sys.executable}",
        f"cluster.container.mounts=['{tmp_path}:{tmp_path}']",
        f"cluster.scratch={scratch}",
        steps=2,
        print="INSIDE",
    )
    fake_run.cluster.environment = environment
    wait_for(fake_run.is_done, 60, "the run to finish")
    assert "yes" in (fake_run.job_folder / "attempt_0001" / "rank_00003.log").read_text().split()
    calls = (folder / "calls").read_text().splitlines()
    assert calls[0] == "module load tools/1.0" and len(calls) == 5
    for mount in (tmp_path, ROOT, fake_run.folder):
        assert f"--bind {mount}:{mount}" in calls[1]


def chain_words(cluster: Cluster, root: Path, seconds: float) -> list[str]:
    """Recipes with the chain, and the words that submit it."""
    run = FakeRun(cluster, root)
    recipes = root / "recipes"
    shutil.copytree(RECIPES, recipes, dirs_exist_ok=True)
    (recipes / "chain").mkdir(exist_ok=True)
    (recipes / "chain" / "chain.yaml").write_text(CHAIN.replace("%SECONDS%", str(seconds)))
    words = [word for word in run.words if not word.startswith(("experiment=", "run.", "nodes="))]
    return [
        "experiment=chain",
        f"root={root}",
        *words,
        "--config-dir",
        str(recipes),
        "cluster.environment.FAKE_STEPS='12'",
        "cluster.environment.FAKE_STEP_SECONDS='0.1'",
    ]


@pytest.mark.slow
def test_a_chain_with_a_killed_job_is_finished_by_a_second_submission(cluster: Cluster, tmp_path: Path) -> None:
    words = chain_words(cluster, tmp_path, 20)
    folder = tmp_path / "chain"
    done = cluster.submit(*words)
    assert done.returncode == 0, done.stderr
    job_ids = {name: entry["job_id"] for name, entry in record.read_json(folder / "chain.json")["jobs"].items()}
    assert len(job_ids) == 5
    begun = folder / "merged.txt.begun"
    wait_for(begun.exists, 180, "the merge to begin")
    cluster.run("scancel", job_ids["merge"])
    wait_for(lambda: cluster.state(job_ids["tune"]) == "CANCELLED", 60, "the job after it to be cancelled")
    assert cluster.state(job_ids["side"]) == "COMPLETED"
    begun.unlink()

    again = cluster.submit(*words)
    assert again.returncode == 0, again.stderr
    for name in ("corpus", "base", "side"):
        assert f"{name:<20} finished before" in again.stderr
    wait_for((folder / "launch" / "tune" / "done.json").exists, 180, "the chain to finish")
    assert (folder / "merged.txt").read_text() == "merged"
    assert (folder / "side.txt").read_text() == "side of 4"
    for name in ("base", "tune"):
        latest = record.latest_checkpoint(folder / name)
        assert record.read_json(folder / name / "checkpoints" / str(latest) / "state.json") == expected_state(12)
    assert len([e for e in record.events(folder / "launch" / "base") if e["event"] == "start"]) == 1

    third = cluster.submit(*words)
    assert third.returncode == 0 and "job" not in third.stderr.replace("jobs", "")
    changed = cluster.submit(*words, "run.seed=99")
    assert changed.returncode == 2 and "another command or configuration" in changed.stderr

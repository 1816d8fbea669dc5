"""A throw-away SLURM cluster for the tests of this folder, and words to drive it.

The cluster is real: munge, slurmctld and one slurmd a virtual node, all on this machine
(apt-get install slurm-wlm slurmctld slurmd munge). Without those packages every test here is skipped, in red.
"""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from launch import record
from tests.conftest import NOT_RUN

ROOT = Path(__file__).resolve().parents[2]
FIXTURE = ROOT / "tests" / "slurm" / "fixture"
NEEDED = ("munged", "slurmctld", "slurmd", "sbatch")
REMEDY = "apt-get install -y slurm-wlm slurmctld slurmd munge"
# Clusters that run side by side at the most: each has its range of ports and of job numbers.
MOST_CLUSTERS = 4


def missing_programs() -> list[str]:
    """Programs of SLURM that are not installed; Debian keeps the daemons in /usr/sbin."""
    path = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])
    return [name for name in NEEDED if shutil.which(name, path=path) is None]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs the cluster, loudly, where there is none."""
    missing = missing_programs()
    for item in items if missing else []:
        if "running_cluster" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.skip(reason=f"{NOT_RUN}no SLURM here ({', '.join(missing)} missing); {REMEDY}"))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Show what the tests have measured (record_property)."""
    measured = [found for report in terminalreporter.stats.get("passed", []) for found in report.user_properties]
    if measured:
        terminalreporter.section("from an interruption to the first step after it")
        for name, value in measured:
            terminalreporter.write_line(f"{value:>8}  {name}")


class Cluster:
    """The running fixture: SLURM's commands, its nodes' fates, and the launcher."""

    def __init__(self, folder: Path) -> None:
        self.environment = {
            **os.environ,
            "SLURM_CONF": str(folder / "slurm.conf"),
            "OMP_NUM_THREADS": "1",
            "SLURM_FIXTURE_DIR": str(folder),
            "PYTHONDONTWRITEBYTECODE": "1",
        }

    def run(self, *words: str, check: bool = True, **settings: str) -> subprocess.CompletedProcess[str]:
        """Run a command with the cluster's environment."""
        return subprocess.run(
            words, env={**self.environment, **settings}, capture_output=True, text=True, check=check, cwd=ROOT
        )

    def submit(self, *words: str, **settings: str) -> subprocess.CompletedProcess[str]:
        """Call launch/submit.py."""
        return self.run(sys.executable, "launch/submit.py", *words, check=False, **settings)

    def host(self, action: str, node: str, *words: str) -> str:
        """Crash a node, kill its daemon, boot it, or run something on it."""
        return self.run(str(FIXTURE / "host.sh"), action, node, *words).stdout

    def state(self, job: str) -> str:
        """SLURM's state of a job."""
        text = self.run("scontrol", "show", "job", job).stdout
        return next(word.split("=")[1] for word in text.split() if word.startswith("JobState="))

    def is_idle(self) -> bool:
        """Whether nothing runs and every node answers."""
        states = self.run("sinfo", "--noheader", "--format=%T").stdout.split()
        return not self.run("squeue", "--noheader").stdout and set(states) == {"idle"}

    def restore(self) -> None:
        """Cancel what is left and bring every node back."""
        jobs = self.run("squeue", "--noheader", "--format=%A").stdout.split()
        if jobs:
            self.run("scancel", *jobs, check=False)
        listed = self.run("sinfo", "--noheader", "--Node", "--partition=batch", "--format=%N %T").stdout
        for node, state in map(str.split, listed.splitlines()):
            if state.startswith("down") or state.endswith("*"):
                self.host("boot", node)
        wait_for(self.is_idle, 60, "the cluster to be idle again")


def wait_for(condition: Callable[[], Any], seconds: float, what: str) -> Any:
    """Wait until `condition()` is true and return it; fail with `what` otherwise."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        found = condition()
        if found:
            return found
        time.sleep(0.2)
    raise AssertionError(f"waited {seconds:g} s in vain for {what}")


def first_step_after(job: Path, moment: float) -> str:
    """How long it took from a moment to the first logged step of an attempt after it, as told by the job's events."""
    begun = wait_for(
        lambda: [event for event in record.events(job) if event["event"] == "training" and event["time"] > moment],
        180,
        "the first step",
    )
    return f"{begun[0]['time'] - moment:.0f} s"


@pytest.fixture(scope="session")
def running_cluster(worker_id: str) -> Iterator[Cluster]:
    """One cluster of four nodes for the whole session, or one for each process of pytest-xdist."""
    number = int(worker_id.removeprefix("gw")) if worker_id != "master" else 0
    assert number < MOST_CLUSTERS, f"give pytest-xdist at most {MOST_CLUSTERS} processes (-n {MOST_CLUSTERS})"
    cluster = Cluster(Path(f"/tmp/slurm-tests-{os.getpid()}"))
    # All listen on this machine: ports of their own, those of the ranks too, which follow the job's number.
    cluster.environment["SLURM_FIXTURE_PORT"] = str(17100 + (os.getppid() % 20 * MOST_CLUSTERS + number) * 10)
    cluster.environment["SLURM_FIXTURE_EXTRA"] = f"FirstJobId={1 + 80 * number}"
    cluster.run(str(FIXTURE / "start.sh"))
    yield cluster
    cluster.run(str(FIXTURE / "stop.sh"), check=False)


@pytest.fixture
def cluster(running_cluster: Cluster) -> Iterator[Cluster]:
    """The cluster, idle before and after every test."""
    yield running_cluster
    running_cluster.restore()


class FakeRun:
    """A run of the stand-in trainer under a folder of its own, and what can be read of it."""

    def __init__(self, cluster: Cluster, root: Path, name: str = "run") -> None:
        self.cluster, self.root, self.folder = cluster, root, root / name
        self.job_folder = self.folder / "launch" / "train"
        for part in ("train", "validation"):
            (root / f"{part}.bin").write_bytes(b"tokens")
            (root / f"{part}.idx").write_bytes(struct.pack("<9sQB", b"MMIDIDX\x00\x00", 1, 4))
        (root / "tokenizer").mkdir(exist_ok=True)
        self.words = [
            "experiment=tiny_base",
            "cluster=laptop",
            "schedule.stages.ar.global_batch_size=8",
            "schedule.stages.ar.micro_batch_size=1",
            f"run.root={root}",
            f"run.name={name}",
            f"data.train={root}/train",
            f"data.validation={root}/validation",
            f"data.tokenizer={root}/tokenizer",
            "train_module=tests.slurm.fake_train",
            "cluster.ranks_per_node=2",
            "nodes=2",
        ]

    def submit(self, *words: str, **settings: Any) -> str:
        """Submit with FAKE_* settings; the job's number."""
        environment = [f"cluster.environment.FAKE_{k.upper()}='{v}'" for k, v in settings.items()]
        done = self.cluster.submit(*self.words, *environment, *words)
        assert done.returncode == 0, done.stderr
        return record.read_json(self.folder / "chain.json")["jobs"]["train"]["job_id"]

    def events(self, kind: str) -> list[dict[str, Any]]:
        """Events of one kind."""
        return [event for event in record.events(self.job_folder) if event["event"] == kind]

    def is_done(self) -> bool:
        """Whether the job has finished."""
        return record.done_digest(self.job_folder) is not None

    def step(self) -> int:
        """Newest step in the metrics."""
        lines = record.read_lines(self.folder / "metrics.jsonl")
        return lines[-1]["step"] if lines else 0

    def final_state(self) -> Any:
        """Content of the newest checkpoint."""
        latest = record.latest_checkpoint(self.folder)
        assert latest is not None, f"{self.folder} has no checkpoint"
        return record.read_json(self.folder / "checkpoints" / latest / "state.json")

    def log(self) -> str:
        """The job's log."""
        return (self.job_folder / "slurm.log").read_text()

    def seconds_to_step(self, moment: float) -> str:
        """From a moment to the first logged step of the next attempt."""
        return first_step_after(self.job_folder, moment)


@pytest.fixture
def fake_run(cluster: Cluster, tmp_path: Path) -> FakeRun:
    """A run of the stand-in trainer on two nodes with two ranks each."""
    return FakeRun(cluster, tmp_path)

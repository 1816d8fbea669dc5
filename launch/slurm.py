"""SLURM's commands as the job's supervisor uses them. Standard library only."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Sequence

# A controller that restarts is silent for a while; it knows every job whose processes still run.
ANSWER_SECONDS = 300.0
POLL_SECONDS = 5.0


def query(*command: str) -> str:
    """Output of one of SLURM's commands; empty if it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    except subprocess.TimeoutExpired:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def hostnames(node_list: str) -> list[str]:
    """Names of the nodes in SLURM's short form, `node[1-4]`, in order."""
    return query("scontrol", "show", "hostnames", node_list).split()


def state_of(job_id: str) -> str:
    """The job's state, or nothing where SLURM does not answer."""
    return query("squeue", "--noheader", f"--jobs={job_id}", "--format=%T")


def lost_nodes(nodes: Sequence[str]) -> list[str]:
    """Those of `nodes` that SLURM holds for down, with its reason."""
    if not nodes:
        return []
    listed = query("sinfo", "--noheader", "--Node", f"--nodes={','.join(nodes)}", "--format=%N|%T|%E")
    rows = sorted({tuple(line.split("|", 2)) for line in listed.splitlines() if line.count("|") >= 2})
    return [
        f"{row[0]} is {row[1]} ({row[2]})"
        for row in rows
        if row[1].startswith(("down", "fail")) or row[1].endswith("*")
    ]


def kill_steps(job_id: str) -> None:
    """End the job's steps on all nodes at once, but not the job.

    By the steps' own numbers: a KILL sent to the job's number would cancel the job.
    """
    listed = query("squeue", "--noheader", "--steps", f"--jobs={job_id}", "--format=%i").split()
    steps = [name for name in listed if name.rpartition(".")[2].isdigit()]
    if steps:
        query("scancel", "--signal=KILL", *steps)


def requeue(job_id: str, answer_seconds: float = ANSWER_SECONDS, poll_seconds: float = POLL_SECONDS) -> str | None:
    """Put a running job back into the queue, which ends it.

    Args:
        job_id: the job's number.
        answer_seconds: how long SLURM may be silent.
        poll_seconds: between two questions.

    Returns:
        Why not, or None. A job that is not running any more is left alone: its owner has cancelled it, or SLURM has
        requeued it itself; a requeue would revive the one and disturb the other.

    Raises:
        RuntimeError: SLURM has refused, or has not answered for `answer_seconds`.
    """
    deadline = time.monotonic() + answer_seconds
    while True:
        while not (state := state_of(job_id)):
            if time.monotonic() > deadline:
                raise RuntimeError(
                    f"squeue has not told the state of job {job_id} for {answer_seconds:g} s; submit again"
                )
            time.sleep(poll_seconds)
        if state != "RUNNING":
            return f"SLURM is ending the job itself ({state.lower()})"
        done = subprocess.run(["scontrol", "requeue", job_id], capture_output=True, text=True, check=False)
        if done.returncode == 0:
            return None
        if "pending" in done.stderr.lower():
            return "SLURM has requeued the job already"
        # A signal: SLURM may have ended the job, and scontrol with it, before scontrol could say that all is well.
        if done.returncode > 0 or time.monotonic() > deadline:
            raise RuntimeError(f"scontrol requeue failed: {done.stderr.strip() or done.returncode}")

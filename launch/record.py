"""The books of a job: events, markers and exit records, as small files written atomically.

Standard library only: the job's supervisor runs under the node's own Python.

    JOB/job.json          what is frozen: command, hash, nodes, container
    JOB/events.jsonl      starts and ends of its attempts, one JSON object a line
    JOB/done.json         written when the job has finished, with the hash of what ran
    JOB/attempt_0001/     logs, exit records and the collected failure of one attempt
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

from megatron_dllm.run import files
from megatron_dllm.run.names import CHECKPOINTS, LATEST


def read_json(path: Path) -> Any:
    """The content of a JSON file; None where there is no file.

    Raises:
        ValueError: it is no JSON.
    """
    try:
        return files.read_json(path, "restore it, or remove it and what it describes")
    except FileNotFoundError:
        return None


def append_event(job_folder: Path, kind: str, **details: Any) -> None:
    """Add one line to the job's events, in a single write."""
    line = json.dumps({"time": round(time.time(), 3), "event": kind, **details})
    files.append_line(job_folder / "events.jsonl", line)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """All complete JSON lines of a file; a torn last line (its writer died) is left out."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return []
    found = []
    for line in lines:
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return [entry for entry in found if isinstance(entry, dict)]


def events(job_folder: Path) -> list[dict[str, Any]]:
    """The job's events in order."""
    return read_lines(job_folder / "events.jsonl")


def mark_done(job_folder: Path, digest: str, **details: Any) -> None:
    """Write the marker that lets a later submission skip the job."""
    files.write_json(job_folder / "done.json", {"digest": digest, "time": time.time(), **details})


def done_digest(job_folder: Path) -> str | None:
    """Hash of what a finished job ran, or None if it has not finished."""
    marker = read_json(job_folder / "done.json")
    return None if marker is None else marker["digest"]


def next_attempt(job_folder: Path) -> Path:
    """A new folder for the logs of one attempt at a job."""
    number = len(list(job_folder.glob("attempt_*"))) + 1
    while True:
        attempt = job_folder / f"attempt_{number:04d}"
        try:
            attempt.mkdir()
        except FileExistsError:
            number += 1
            continue
        return attempt


def output_exists(output: str | None) -> bool:
    """Whether a tool's output is there: a file, a folder, or a corpus prefix with its .idx."""
    return output is not None and (os.path.exists(output) or os.path.exists(output + ".idx"))


def latest_checkpoint(run_folder: Path) -> str | None:
    """Name of the run's newest complete checkpoint, or None."""
    try:
        return (run_folder / CHECKPOINTS / LATEST).read_text(encoding="utf-8").strip() or None
    except FileNotFoundError:
        return None


def last_lines(path: Path, count: int = 40) -> list[str]:
    """The last lines of a log, reading only its end."""
    try:
        with open(path, "rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - 65536))
            return file.read().decode("utf-8", "replace").splitlines()[-count:]
    except FileNotFoundError:
        return []

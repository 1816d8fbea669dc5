"""How far a chain is: state, step, loss, ELBO, speed, time left and last error of every job.

    python launch/status.py runs/NAME

Told from the chain's files and squeue; nothing runs in the background.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from megatron_dllm.run.command import listen, run_command

if __name__ == "__main__":
    listen()

from launch import record

_COLUMNS = ("job", "state", "id", "step", "loss", "ELBO", "tokens/s", "time left", "attempts", "last")


@dataclass
class Row:
    """One job as shown; empty strings where nothing is known."""

    job: str
    state: str
    job_id: str = ""
    step: str = ""
    loss: str = ""
    elbo: str = ""
    speed: str = ""
    left: str = ""
    attempts: str = ""
    last: str = ""

    def words(self) -> list[str]:
        """The row's cells in the order of the columns."""
        return [
            self.job,
            self.state,
            self.job_id,
            self.step,
            self.loss,
            self.elbo,
            self.speed,
            self.left,
            self.attempts,
            self.last,
        ]


def queue_states(job_ids: list[str]) -> dict[str, str]:
    """State and reason of the jobs that SLURM still knows."""
    if not job_ids:
        return {}
    try:
        done = subprocess.run(
            ["squeue", "--noheader", "--format=%A|%T|%r", f"--jobs={','.join(job_ids)}"],
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
    except (OSError, subprocess.TimeoutExpired):
        return {}
    states = {}
    for line in done.stdout.splitlines():
        job_id, state, reason = line.split("|", 2)
        states[job_id] = state.lower() + (f" ({reason})" if reason not in ("None", "") else "")
    return states


def total_tokens(job_folder: Path) -> int:
    """Document tokens a training job is to see, from its frozen configuration; 0 for a tool."""
    path = job_folder / "config.yaml"
    if not path.is_file():
        return 0
    # The schedule's own lines; a YAML parser would be the only package this command needs.
    schedule = re.search(r"^schedule:\n((?: .*\n)+)", path.read_text(encoding="utf-8"), re.MULTILINE)
    return sum(int(n) for n in re.findall(r"^\s+num_tokens: (\d+)$", schedule[1], re.MULTILINE)) if schedule else 0


def _duration(seconds: float) -> str:
    days, rest = divmod(int(seconds), 86400)
    hours, rest = divmod(rest, 3600)
    return (f"{days}d " if days else "") + f"{hours:02d}:{rest // 60:02d}:{rest % 60:02d}"


def training_cells(row: Row, run_folder: Path, total: int) -> None:
    """Fill in what the run's metrics say."""
    lines = record.read_lines(run_folder / "metrics.jsonl")
    steps = [line for line in lines if "loss" in line and "tokens_per_second" in line]
    if steps:
        newest = steps[-1]
        row.step, row.loss = str(newest["step"]), f"{newest['loss']:.4f}"
        row.speed = f"{newest['tokens_per_second']:,.0f}"
        recent = [line["tokens_per_second"] for line in steps[-20:]]
        left = total - newest.get("consumed_tokens", 0)
        if total and left > 0 and not row.state.startswith("finished"):
            row.left = _duration(left * len(recent) / max(sum(recent), 1e-9))
    for line in reversed(lines):
        values = [value for key, value in line.items() if key.startswith("validation_elbo/")]
        if line.get("validation") and values:
            row.elbo = f"{values[0]:.4f}"
            return


def state_of(entry: dict[str, Any], job_folder: Path, queued: dict[str, str]) -> tuple[str, str]:
    """State of a job and the reason of its last end."""
    seen = record.events(job_folder)
    told = [event for event in seen if event["event"] in ("end", "gave_up")]
    last = f"{told[-1].get('how', 'gave up')}: {told[-1].get('reason', '')}" if told and "reason" in told[-1] else ""
    if record.done_digest(job_folder):
        return "finished", ""
    job_id = str(entry.get("job_id") or "")
    if job_id in queued:
        return queued[job_id], last
    if not seen:
        return "not started", ""
    if seen[-1]["event"] == "gave_up":
        return "failed", last
    if job_id:
        return "not in the queue", last
    return ("running" if seen[-1]["event"] == "start" else "unfinished"), last


def attempts_cell(events: list[dict[str, Any]]) -> str:
    """How often a job was started, and how long the last interruption kept it from training."""
    attempts = sum(event["event"] == "start" for event in events)
    pauses = [event["pause"] for event in events if event["event"] == "training" and event.get("pause")]
    return (str(attempts) if attempts else "") + (f" (pause {pauses[-1]:.0f} s)" if pauses else "")


def rows(chain_folder: Path) -> list[Row]:
    """One row a job, in the chain's order.

    Raises:
        ValueError: the folder is no chain's.
    """
    book = record.read_json(chain_folder / "chain.json")
    if book is None or "jobs" not in book:
        raise ValueError(
            f"{chain_folder} holds no chain.json with jobs; give the folder of a chain or run that was submitted."
        )
    jobs = book["jobs"]
    queued = queue_states([str(e["job_id"]) for e in jobs.values() if e.get("job_id")])
    found = []
    for name, entry in jobs.items():
        folder = chain_folder / "launch" / name
        frozen = record.read_json(folder / "job.json") or {}
        state, last = state_of(entry, folder, queued)
        row = Row(name, state, str(entry.get("job_id") or ""), attempts=attempts_cell(record.events(folder)), last=last)
        if frozen.get("run_folder"):
            training_cells(row, Path(frozen["run_folder"]), total_tokens(folder))
        found.append(row)
    return found


def show(chain_folder: Path) -> str:
    """The table, and below it the last error in full."""
    found = rows(chain_folder)
    table = [list(_COLUMNS), *(row.words() for row in found)]
    widths = [max(len(line[column]) for line in table) for column in range(len(_COLUMNS) - 1)]
    lines = [
        "  ".join([*(cell.ljust(width) for cell, width in zip(line, widths, strict=False)), line[-1]]).rstrip()
        for line in table
    ]
    for row in found:
        failures = sorted((chain_folder / "launch" / row.job).glob("attempt_*/failure.txt"))
        if failures and row.state in ("failed", "not in the queue"):
            lines += ["", f"{row.job}: {failures[-1].read_text(encoding='utf-8', errors='replace').rstrip()}"]
    return "\n".join(lines)


def main(words: list[str] | None = None) -> int:
    """Print the table of one chain."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder of a chain or a run, runs/NAME")
    print(show(parser.parse_args(words).folder))
    return 0


if __name__ == "__main__":
    run_command(main)

"""Run a chain on this machine, job after job: the same jobs that launch/submit.py gives to SLURM.

    python launch/local.py experiment=NAME key=value ...

Finished jobs are skipped; Ctrl-C finishes the training step, saves and stops (twice: stops at once), and the same
command continues. Times lie in CHAIN/chain.json.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from megatron_dllm.run.command import listen, run_command

if __name__ == "__main__":
    listen()

from launch import record
from launch.chain import compose_chain
from launch.failure import collect_failure, exit_records, overall_code
from launch.freeze import freeze_environment, freeze_job, rank_arguments
from launch.jobs import Chain, Job
from launch.local_ranks import run_ranks, run_tool
from launch.progress import Progress, progress_of
from launch.rank import RUN_VARIABLE, SHOW_VARIABLE
from launch.validate import check_chain
from launch.world import schedule_stages, wanted_ranks
from megatron_dllm.config.recipe_source import CONFIG_DIR, RECIPES, user_folder
from megatron_dllm.run.exit_codes import EXIT_FENCED, EXIT_LAYOUT, EXIT_NON_FINITE, EXIT_PREEMPTED
from megatron_dllm.run.files import write_json
from megatron_dllm.run.lease import LEASE_VARIABLE, Lease

log = logging.getLogger("launch")


def world_size(chain: Chain, job: Job) -> int:
    """Ranks of a job: as many as on the cluster, so that the layout and the numbers are the same."""
    return job.spec.nodes * job.ranks_per_node(chain.config.cluster)


def _environment(chain: Chain) -> dict[str, str]:
    path = os.pathsep.join(filter(None, [str(Path(__file__).resolve().parents[1]), os.environ.get("PYTHONPATH")]))
    # One thread a rank: several ranks share this machine's cores.
    return {"OMP_NUM_THREADS": "1", **os.environ, **chain.config.cluster.environment, "PYTHONPATH": path}


def run_job(chain: Chain, job: Job) -> int:
    """Run one job in the foreground; its exit code, EXIT_PREEMPTED where it stopped in order."""
    folder = freeze_job(chain, job)
    record.append_event(folder, "start", digest=job.digest, host=os.uname().nodename)
    environment = _environment(chain)
    arguments = rank_arguments(chain, job)
    if not job.is_parallel:
        return run_tool([sys.executable, "-u", *arguments], environment)
    if job.run_folder is None:
        return run_attempt(chain, job, environment)
    return run_attempts(lambda: run_attempt(chain, job, environment), job.run_folder)


def run_attempts(attempt: Callable[[], int], run_folder: Path) -> int:
    """Call `attempt` again as long as it asks for another layout and has moved on; the last one's exit code."""
    while True:
        before = record.latest_checkpoint(run_folder)
        code = attempt()
        if code != EXIT_LAYOUT or record.latest_checkpoint(run_folder) == before:
            return code


def run_attempt(chain: Chain, job: Job, environment: dict[str, str]) -> int:
    """One attempt at a job; its exit code."""
    folder = chain.job_folder(job)
    attempt = record.next_attempt(folder)
    stages = schedule_stages(job.config) if job.config else []
    guarded = job.run_folder or folder
    ranks = wanted_ranks(stages, guarded) or world_size(chain, job)
    lease = Lease.take_next(guarded)
    environment = {**environment, SHOW_VARIABLE: "1", RUN_VARIABLE: str(guarded), LEASE_VARIABLE: str(lease.generation)}
    return_code = run_ranks([sys.executable, "-u", *rank_arguments(chain, job)], ranks, attempt, environment)
    code = overall_code(exit_records(attempt), ranks)
    failure = collect_failure(attempt)
    if failure:
        log.error("%s", failure)
    return code if code is not None else (return_code or 1)


_MEANING = {
    EXIT_PREEMPTED: "stopped in order; the same command continues it",
    EXIT_NON_FINITE: "stopped at a loss or gradient norm that is not finite; starting it again repeats that",
    EXIT_LAYOUT: "asked for another layout without having moved on",
    EXIT_FENCED: "was superseded by another attempt at the same run and stopped without writing",
}


def run_chain(chain: Chain, allow_changes: bool) -> int:
    """Run every unfinished job in order; 0 if all have finished, else the first failure's exit code."""
    chain.folder.mkdir(parents=True, exist_ok=True)
    (chain.folder / "launch").mkdir(exist_ok=True)
    freeze_environment(chain.folder / "launch")
    book: dict[str, Any] = record.read_json(chain.folder / "chain.json") or {}
    book = {**book, "name": chain.config.name, "jobs": book.get("jobs", {})}
    total = len(chain.jobs)
    for number, job in enumerate(chain.jobs, 1):
        folder = chain.job_folder(job)
        state = progress_of(chain, job, allow_changes)
        if state is Progress.FINISHED:
            log.info("[%d/%d] %s: finished before, skipped", number, total, job.name)
            continue
        what = job.spec.experiment or job.spec.module
        log.info("[%d/%d] %s: %s (%s)", number, total, job.name, what, state.value)
        began = time.time()
        code = run_job(chain, job)
        seconds = time.time() - began
        entry = book["jobs"].setdefault(job.name, {"seconds": 0.0})
        entry |= {
            "seconds": round(entry["seconds"] + seconds, 2),
            "ended": time.time(),
            "exit_code": code,
            "digest": job.digest,
        }
        record.append_event(folder, "end", code=code, seconds=round(seconds, 2))
        if code == 0:
            record.mark_done(folder, job.digest, seconds=entry["seconds"])
        write_json(chain.folder / "chain.json", book)
        if code != 0:
            meaning = _MEANING.get(code, f"failed with exit code {code}; its logs are in {folder}")
            log.error("[%d/%d] %s %s", number, total, job.name, meaning)
            return code if 0 < code < 256 else 1
        log.info("[%d/%d] %s: done in %.1f s", number, total, job.name, entry["seconds"])
    log.info("all %d jobs of %s have finished; the books are in %s", total, chain.config.name, chain.folder)
    return 0


def main(words: list[str] | None = None) -> int:
    """Parse the command line and run the chain."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="+", metavar="key=value", help="experiment=NAME, then what differs")
    parser.add_argument(
        "--allow_changes",
        action="store_true",
        help="continue an unfinished job although its configuration has changed since it started",
    )
    parser.add_argument(
        *CONFIG_DIR, metavar="DIR", default=RECIPES, help="folder of recipes that add to the shipped ones"
    )
    arguments = parser.parse_intermixed_args(words)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    chain = compose_chain(arguments.overrides, user_folder(arguments.config_dir))
    problems = check_chain(chain, arguments.allow_changes)
    if problems:
        raise ValueError("\n".join(problems))
    return run_chain(chain, arguments.allow_changes)


if __name__ == "__main__":
    run_command(main)

"""Submit an experiment or a chain to SLURM.

    python launch/submit.py experiment=NAME cluster=NAME key=value ...     submit
    python launch/submit.py experiment=NAME cluster=NAME ... --dry_run     show the scripts and commands
    python launch/submit.py experiment=NAME cluster=NAME ... --status      how far it is

Everything is checked first; then code, configuration and packages are frozen beside the run, and every unfinished
job is queued behind the ones it waits for. A job requeues itself until it has finished.
"""

from __future__ import annotations

import argparse
import logging
import os
import re
import shlex
import shutil
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
from launch.chain import compose_chain
from launch.freeze import freeze_code, freeze_environment, freeze_job
from launch.job import job_script, sbatch_options, supervisor_details
from launch.jobs import Chain, Job
from launch.progress import Progress, progress_of
from launch.status import show
from launch.validate import check_chain
from megatron_dllm.config.recipe_source import CONFIG_DIR, RECIPES, user_folder
from megatron_dllm.run.files import write_json, write_text

log = logging.getLogger("launch")


@dataclass(frozen=True)
class Submission:
    """One job ready to be submitted: sbatch's words without the dependency, and the script's text."""

    job: Job
    options: list[str]
    script: str

    def command(self, path: str, dependencies: list[str]) -> list[str]:
        """The words of the sbatch call; `dependencies` are job numbers."""
        waits = [f"--dependency=afterok:{':'.join(dependencies)}", "--kill-on-invalid-dep=yes"] if dependencies else []
        return ["sbatch", "--parsable", *self.options, *waits, path]


def slurm_environment() -> dict[str, str]:
    """This process's environment without a surrounding job's variables, which sbatch would take for settings."""
    return {name: value for name, value in os.environ.items() if not name.startswith("SLURM_") or name == "SLURM_CONF"}


def readable_refusal(text: str) -> str:
    """What sbatch said, without its prefixes."""
    lines = [re.sub(r"^(sbatch: )?(error: |allocation failure: )?", "", line).strip() for line in text.splitlines()]
    return " ".join(line for line in lines if line) or "no reason was given"


def sbatch(words: list[str]) -> str:
    """Call sbatch; the job's number.

    Raises:
        ValueError: with what SLURM said.
    """
    done = subprocess.run(words, capture_output=True, text=True, check=False, env=slurm_environment())
    if done.returncode != 0:
        raise ValueError(f"SLURM refused the job: {readable_refusal(done.stderr)}")
    return done.stdout.strip().split(";")[0]


def rehearse(submission: Submission, path: Path) -> None:
    """Have SLURM judge a job without queueing it.

    Raises:
        ValueError: it would never run as asked.
    """
    words = ["sbatch", "--test-only", *submission.options, str(path)]
    done = subprocess.run(words, capture_output=True, text=True, check=False, env=slurm_environment())
    if done.returncode != 0:
        raise ValueError(
            f"job {submission.job.name}: SLURM would refuse the job: {readable_refusal(done.stderr)}. "
            f"It was asked for: {shlex.join(submission.options)}"
        )


def queued_jobs(chain: Chain) -> dict[str, str]:
    """Jobs of the chain that are in the queue now, with their numbers.

    Told by the scripts of the jobs in the queue: these also know of a submission that was killed half-way.
    """
    done = subprocess.run(
        ["squeue", "--noheader", "--format=%A %o", "--me"], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise ValueError(f"squeue failed, so it is not known what already runs: {done.stderr.strip()}; try again.")
    scripts = {script: job_id for job_id, _, script in (line.partition(" ") for line in done.stdout.splitlines())}
    paths = {job.name: str(script_of(chain, job)) for job in chain.jobs}
    return {name: scripts[path] for name, path in paths.items() if path in scripts}


def script_of(chain: Chain, job: Job) -> Path:
    """Where a job's script lies; the same path again is the same job."""
    return chain.job_folder(job).absolute() / "job.sh"


def build_submissions(
    chain: Chain, code: Path, project: Path, allow_changes: bool, is_masked: bool = False
) -> list[Submission]:
    """The submissions of all unfinished jobs, in order; `is_masked`: to be shown, without secret values."""
    unfinished = [job for job in chain.jobs if progress_of(chain, job, allow_changes) is not Progress.FINISHED]
    return [
        Submission(job, sbatch_options(chain, job, project), job_script(chain, job, code, project, is_masked))
        for job in unfinished
    ]


def dependencies_of(chain: Chain, job: Job, job_ids: dict[str, str]) -> list[str]:
    """Numbers of the jobs a job waits for: the unfinished ones it comes after, and through finished ones theirs."""
    by_name = {other.name: other for other in chain.jobs}
    found: list[str] = []
    for name in job.after:
        found += [job_ids[name]] if name in job_ids else dependencies_of(chain, by_name[name], job_ids)
    return list(dict.fromkeys(found))


def print_dry_run(submissions: list[Submission], chain: Chain) -> None:
    """Show what would be done, writing nothing."""
    numbers: dict[str, str] = {}
    for submission in submissions:
        path = script_of(chain, submission.job)
        waits = dependencies_of(chain, submission.job, numbers)
        numbers[submission.job.name] = f"JOB_{submission.job.name}"
        print(f"# ---- {path}\n{submission.script}\n# command:\n{shlex.join(submission.command(str(path), waits))}\n")


def submit(submissions: list[Submission], chain: Chain, code: Path, project: Path) -> dict[str, str]:
    """Freeze and submit; all jobs or none.

    Returns:
        The number of every submitted job.

    Raises:
        ValueError: SLURM refused one; those submitted before it have been cancelled, as after any other error.
    """
    for submission in submissions:
        freeze_job(chain, submission.job, **supervisor_details(chain, submission.job, code, project))
        # Only its owner may read it: a cluster's environment may hold tokens.
        write_text(script_of(chain, submission.job), submission.script, mode=0o600)
    for submission in submissions:
        rehearse(submission, script_of(chain, submission.job))
    numbers: dict[str, str] = {}
    book: dict[str, Any] = record.read_json(chain.folder / "chain.json") or {}
    book = {**book, "name": chain.config.name, "jobs": book.get("jobs", {})}
    try:
        for submission in submissions:
            words = submission.command(
                str(script_of(chain, submission.job)), dependencies_of(chain, submission.job, numbers)
            )
            record.append_event(chain.job_folder(submission.job), "submitted", digest=submission.job.digest)
            numbers[submission.job.name] = sbatch(words)
            entry = book["jobs"].setdefault(submission.job.name, {})
            entry |= {
                "job_id": numbers[submission.job.name],
                "command": shlex.join(words),
                "digest": submission.job.digest,
            }
            write_json(chain.folder / "chain.json", book)
    except BaseException as error:
        if numbers:
            subprocess.run(["scancel", *numbers.values()], check=False)
        if isinstance(error, ValueError):
            raise ValueError(
                f"job {submission.job.name}: {error}; no job of this chain is left in the queue."
            ) from error
        raise
    return numbers


def run(arguments: argparse.Namespace) -> int:
    """Do what the command line asks for; 0 if it was done.

    Raises:
        ValueError: nothing has been submitted, and why.
    """
    chain = compose_chain(arguments.overrides, user_folder(arguments.config_dir))
    if arguments.status:
        print(show(chain.folder))
        return 0
    problems = check_chain(chain, arguments.allow_changes)
    if problems:
        for problem in problems:
            log.error("%s", problem)
        log.error("nothing was submitted: %d problem(s)", len(problems))
        return 2
    project = Path.cwd()
    launch_folder = chain.folder / "launch"
    if arguments.dry_run:
        code = launch_folder.absolute() / "code"
        print_dry_run(build_submissions(chain, code, project, arguments.allow_changes, is_masked=True), chain)
        return 0
    if shutil.which("sbatch") is None:
        raise ValueError(
            "sbatch is not on PATH: submit from a machine of the cluster, or run the chain here with launch/local.py."
        )
    queued = queued_jobs(chain)
    if queued:
        listed = ", ".join(f"{name}: job {number}" for name, number in queued.items())
        raise ValueError(f"{chain.config.name} is in the queue already ({listed}); wait for it, or scancel it first.")
    launch_folder.mkdir(parents=True, exist_ok=True)
    freeze_environment(launch_folder)
    code = freeze_code(launch_folder)
    submissions = build_submissions(chain, code, project, arguments.allow_changes)
    numbers = submit(submissions, chain, code, project)
    for job in chain.jobs:
        log.info("%-20s %s", job.name, f"job {numbers[job.name]}" if job.name in numbers else "finished before")
    log.info("follow it with: python launch/status.py %s", shlex.quote(str(chain.folder)))
    return 0


def main(words: list[str] | None = None) -> int:
    """Parse the command line; exit code 2 for what the user has to change."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="+", metavar="key=value", help="experiment=NAME cluster=NAME, then the rest")
    parser.add_argument("--dry_run", "--dry-run", action="store_true", help="print scripts and commands, write nothing")
    parser.add_argument("--status", action="store_true", help="show how far the chain is")
    parser.add_argument(
        "--allow_changes",
        action="store_true",
        help="continue an unfinished job although its configuration has changed since it started",
    )
    parser.add_argument(
        *CONFIG_DIR, metavar="DIR", default=RECIPES, help="folder of recipes that add to the shipped ones"
    )
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    return run(parser.parse_intermixed_args(words))


if __name__ == "__main__":
    run_command(main)

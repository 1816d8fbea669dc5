"""Submit an experiment or a chain to SLURM.

    python launch/submit.py experiment=NAME cluster=NAME key=value ...     submit
    python launch/submit.py experiment=NAME cluster=NAME ... --dry_run     show the scripts and commands
    python launch/submit.py experiment=NAME cluster=NAME ... --status      how far it is

Everything is checked first; then code, configuration and packages are frozen beside the run, and every unfinished
stage becomes a job that waits for the ones before it. A job requeues itself until its stage has finished.
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
from launch import record
from launch.chain import Chain, Stage, compose_chain
from launch.freeze import freeze_code, freeze_environment, freeze_stage
from launch.job import job_script, sbatch_options, supervisor_details
from launch.progress import Progress, progress_of
from launch.status import show
from launch.validate import check_chain
from megatron_dllm.compose import RECIPES
from megatron_dllm.run.files import write_json

log = logging.getLogger("launch")


@dataclass(frozen=True)
class Job:
    """One stage ready to be submitted: sbatch's words without the dependency, and the script's text."""

    stage: Stage
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


def rehearse(job: Job, path: Path) -> None:
    """Have SLURM judge a job without queueing it.

    Raises:
        ValueError: it would never run as asked.
    """
    words = ["sbatch", "--test-only", *job.options, str(path)]
    done = subprocess.run(words, capture_output=True, text=True, check=False, env=slurm_environment())
    if done.returncode != 0:
        raise ValueError(
            f"stage {job.stage.name}: SLURM would refuse the job: {readable_refusal(done.stderr)}. "
            f"It was asked for: {shlex.join(job.options)}"
        )


def queued_jobs(chain: Chain) -> dict[str, str]:
    """Stages of the chain that are in the queue now, with their job's number.

    Told by the scripts of the jobs in the queue: these also know of a submission that was killed half-way.
    """
    done = subprocess.run(
        ["squeue", "--noheader", "--format=%A %o", "--me"], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise ValueError(f"squeue failed, so it is not known what already runs: {done.stderr.strip()}; try again.")
    scripts = {script: job for job, _, script in (line.partition(" ") for line in done.stdout.splitlines())}
    paths = {stage.name: str(script_of(chain, stage)) for stage in chain.stages}
    return {name: scripts[path] for name, path in paths.items() if path in scripts}


def script_of(chain: Chain, stage: Stage) -> Path:
    """Where a stage's job script lies; the same path again is the same stage."""
    return chain.stage_folder(stage).absolute() / "job.sh"


def build_jobs(chain: Chain, code: Path, project: Path, allow_changes: bool) -> list[Job]:
    """Jobs of all unfinished stages, in order."""
    unfinished = [stage for stage in chain.stages if progress_of(chain, stage, allow_changes) is not Progress.FINISHED]
    return [
        Job(stage, sbatch_options(chain, stage, project), job_script(chain, stage, code, project))
        for stage in unfinished
    ]


def dependencies_of(chain: Chain, stage: Stage, jobs: dict[str, str]) -> list[str]:
    """Job numbers a stage waits for: of the unfinished stages it comes after, and through finished ones theirs."""
    by_name = {other.name: other for other in chain.stages}
    found: list[str] = []
    for name in stage.after:
        found += [jobs[name]] if name in jobs else dependencies_of(chain, by_name[name], jobs)
    return list(dict.fromkeys(found))


def print_dry_run(jobs: list[Job], chain: Chain) -> None:
    """Show what would be done, writing nothing."""
    numbers: dict[str, str] = {}
    for job in jobs:
        path = script_of(chain, job.stage)
        waits = dependencies_of(chain, job.stage, numbers)
        numbers[job.stage.name] = f"JOB_{job.stage.name}"
        print(f"# ---- {path}\n{job.script}\n# command:\n{shlex.join(job.command(str(path), waits))}\n")


def submit(jobs: list[Job], chain: Chain, code: Path, project: Path) -> dict[str, str]:
    """Freeze and submit; all stages or none.

    Returns:
        The job number of every submitted stage.

    Raises:
        ValueError: SLURM refused one; those submitted before it have been cancelled, as after any other error.
    """
    for job in jobs:
        freeze_stage(chain, job.stage, **supervisor_details(chain, job.stage, code, project))
        script_of(chain, job.stage).write_text(job.script, encoding="utf-8")
    for job in jobs:
        rehearse(job, script_of(chain, job.stage))
    numbers: dict[str, str] = {}
    book: dict[str, Any] = record.read_json(chain.folder / "chain.json") or {"stages": {}}
    book["name"] = chain.config.name
    try:
        for job in jobs:
            words = job.command(str(script_of(chain, job.stage)), dependencies_of(chain, job.stage, numbers))
            record.append_event(chain.stage_folder(job.stage), "submitted", digest=job.stage.digest)
            numbers[job.stage.name] = sbatch(words)
            entry = book["stages"].setdefault(job.stage.name, {})
            entry |= {"job": numbers[job.stage.name], "command": shlex.join(words), "digest": job.stage.digest}
            write_json(chain.folder / "chain.json", book)
    except BaseException as error:
        if numbers:
            subprocess.run(["scancel", *numbers.values()], check=False)
        if isinstance(error, ValueError):
            raise ValueError(f"stage {job.stage.name}: {error}; no job of this chain is left in the queue.") from error
        raise
    return numbers


def run(arguments: argparse.Namespace) -> int:
    """Do what the command line asks for; 0 if it was done.

    Raises:
        ValueError: nothing has been submitted, and why.
    """
    chain = compose_chain(arguments.overrides, arguments.recipes.absolute())
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
        print_dry_run(build_jobs(chain, launch_folder.absolute() / "code", project, arguments.allow_changes), chain)
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
    jobs = build_jobs(chain, code, project, arguments.allow_changes)
    numbers = submit(jobs, chain, code, project)
    for stage in chain.stages:
        log.info("%-20s %s", stage.name, f"job {numbers[stage.name]}" if stage.name in numbers else "finished before")
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
        help="continue an unfinished stage although its configuration has changed since it started",
    )
    parser.add_argument("--recipes", type=Path, default=RECIPES, help="folder of recipes (default: the project's)")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        return run(parser.parse_intermixed_args(words))
    except ValueError as error:
        log.error("%s", error)
        return 2


if __name__ == "__main__":
    sys.exit(main())

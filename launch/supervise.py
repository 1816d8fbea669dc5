"""The job itself: what the batch script becomes on its first node.

    python launch/supervise.py JOB_FOLDER

Takes the lease, looks the nodes over, starts the ranks, passes stop requests on, watches for the first failing rank,
and at the end decides: finished, start again (`scontrol requeue`), or stay down. Everything it knows it writes into
the job's folder. Standard library only: it runs outside the container, under the node's own Python.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from launch import record, slurm
from launch.ending import Ending, ending_of, ending_of_silent
from launch.failure import FAILURE_GRACE_SECONDS, exit_records, failed_first
from launch.first_step import FirstStep
from launch.policy import Verdict, judge
from launch.preflight import judge as judge_nodes
from launch.preflight import summary, versions
from launch.rank import LEASE_SECONDS, REPEAT_SECONDS, RUN_VARIABLE
from launch.world import spread, wanted_ranks
from megatron_dllm.run.exit_codes import EXIT_FENCED
from megatron_dllm.run.lease import LEASE_VARIABLE, Lease
from megatron_dllm.run.place import without_place

log = logging.getLogger("launch")
CODE = Path(__file__).resolve().parents[1]
POLL_SECONDS = 1.0
PREFLIGHT_SECONDS = 300.0
# Ports below the ephemeral range; each attempt gets its own, since an older one may still hold the last.
_PORTS = range(20000, 32000)
# What srun would take for the step's: the counts are the whole job's, and a rank must see all GPUs of its node, because
# it takes the one of its number.
_NOT_FOR_SRUN = (
    *("SLURM_NTASKS_PER_NODE", "SLURM_TASKS_PER_NODE", "SLURM_NTASKS", "SLURM_NPROCS", "SLURM_NNODES"),
    "SLURM_GPU_BIND",
)


class Supervisor:
    """One start of the batch script: one attempt at its job, or several where the layout changes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.job: dict[str, Any] = record.read_json(folder / "job.json")
        self.run_folder = Path(self.job["run_folder"]) if self.job["run_folder"] else None
        self.job_id = os.environ["SLURM_JOB_ID"]
        self.restarts = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
        self.stop_signal: signal.Signals | None = None
        self.stop_time = 0.0
        self.has_ended = False
        for number in (signal.SIGUSR1, signal.SIGTERM):
            signal.signal(number, self._ask_to_stop)

    # ---- events ------------------------------------------------------------------------------

    def _ask_to_stop(self, number: int, _: object) -> None:
        if self.stop_signal is None and not self.has_ended:
            self.stop_time = time.monotonic()
            record.append_event(self.folder, "stop", signal=signal.Signals(number).name, job_id=self.job_id)
        self.stop_signal = signal.Signals(number)

    def _checkpoint(self) -> str | None:
        return record.latest_checkpoint(self.run_folder) if self.run_folder else None

    def _end(self, ending: Ending, **details: Any) -> None:
        log.info("%s: %s", ending.how, ending.reason)
        self.has_ended = True
        record.append_event(
            self.folder,
            "end",
            how=ending.how,
            reason=ending.reason,
            code=ending.code,
            job_id=self.job_id,
            restarts=self.restarts,
            checkpoint=self._checkpoint(),
            **details,
        )

    def previous_attempt(self) -> list[dict[str, Any]]:
        """Events of the newest attempt before this one, its start first; empty where SLURM has made none."""
        seen = record.events(self.folder)
        starts = [n for n, event in enumerate(seen) if event["event"] == "start" and "attempt" in event]
        return seen[starts[-1] :] if starts else []

    def close_previous(self, seen: list[dict[str, Any]]) -> None:
        """If the attempt before this one left no end, write what can be told about it."""
        if not any(event["event"] == "end" for event in seen):
            self._end(ending_of_silent(seen[0], seen), attempt=seen[0]["attempt"])
            self.has_ended = False

    def await_old_ranks(self, previous: dict[str, Any]) -> None:
        """Wait until no rank of an older attempt can be alive.

        Where only a node's daemon died, its ranks go on; their wrappers see the new lease, kill them and write their
        exit records. Ranks that left a record are gone; for others this is the time their wrappers need.
        """
        deadline = time.monotonic() + 3 * LEASE_SECONDS
        while len(exit_records(self.folder / previous["attempt"])) < previous["ranks"] and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)

    # ---- the ranks ---------------------------------------------------------------------------

    def srun(self, tasks: int, hosts: Sequence[str]) -> list[str]:
        """Words that start one step with `tasks` tasks on each of the hosts."""
        return [
            "srun",
            f"--nodes={len(hosts)}",
            f"--ntasks={len(hosts) * tasks}",
            f"--ntasks-per-node={tasks}",
            f"--nodelist={','.join(hosts)}",
            "--kill-on-bad-exit=1",
            "--wait=0",
            "--mpi=none",
            "--unbuffered",
            *self.job["srun_options"],
        ]

    def rank_command(self, attempt: Path) -> list[str]:
        """What srun starts as each rank."""
        job, python = self.job, self.job["rank_python"]
        wrapper = [*job["command_prefix"], python, str(CODE / "launch" / "rank.py"), str(attempt), "--"]
        return [*wrapper, python, "-u", *job["arguments"]]

    def run_ranks(
        self, command: Sequence[str], environment: dict[str, str], attempt: Path, first_step: FirstStep | None
    ) -> str | None:
        """Run the step to its end; why it had to be ended by force, or None.

        A stop request goes to srun, which forwards it to all tasks, again and again: a task that was not ready has
        ignored it.
        """
        forced: str | None = None
        next_signal = 0.0
        failed_at: float | None = None
        with open(attempt / "srun.log", "ab") as output:
            step = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)
        while step.poll() is None:
            now = time.monotonic()
            if first_step and (found := first_step.look()):
                record.append_event(self.folder, "training", attempt=attempt.name, **found)
            if failed_at is None and failed_first(exit_records(attempt)):
                failed_at = now
            if failed_at is not None and now - failed_at > FAILURE_GRACE_SECONDS:
                self.kill_step(step)
            if self.stop_signal is not None and now >= next_signal:
                next_signal = now + REPEAT_SECONDS
                step.send_signal(signal.SIGUSR1)
            if forced is None and self.stop_signal is not None and now - self.stop_time > self.job["give_up_seconds"]:
                forced = f"its ranks had not stopped {self.job['give_up_seconds']} s after the request"
                self.kill_step(step)
            with contextlib.suppress(subprocess.TimeoutExpired):
                step.wait(POLL_SECONDS)
        return forced

    def kill_step(self, step: subprocess.Popen[bytes]) -> None:
        """End the running step on all nodes at once, not the job."""
        slurm.kill_steps(self.job_id)
        with contextlib.suppress(subprocess.TimeoutExpired):
            step.wait(10)
            return
        step.kill()

    # ---- start and end -----------------------------------------------------------------------

    def placement(self, hosts: Sequence[str]) -> tuple[int, int]:
        """Nodes and ranks on each for the next attempt: what its stage of the schedule asks for, or all that fit."""
        job = self.job
        per_node = job["ranks_per_node"]
        wanted = wanted_ranks(job["stages"], self.run_folder) if self.run_folder else None
        if wanted is not None:
            return spread(wanted, per_node)
        fitting = [count for count in job["valid_nodes"] if count <= len(hosts)]
        return fitting[0] if fitting else len(hosts), per_node

    def environment(self, hosts: Sequence[str], lease: Lease) -> dict[str, str]:
        """Variables of the ranks: rendezvous, lease, and the folder it guards."""
        # An attempt that follows in the same job must not meet the last one's sockets either.
        place = int(self.job_id) * 37 + self.restarts + lease.generation
        guarded = self.run_folder or self.folder
        return {
            **{k: v for k, v in without_place(os.environ).items() if k not in _NOT_FOR_SRUN},
            "MASTER_ADDR": hosts[0],
            "MASTER_PORT": str(_PORTS[place % len(_PORTS)]),
            RUN_VARIABLE: str(guarded),
            LEASE_VARIABLE: str(lease.generation),
        }

    def main(self) -> int:
        """Run the job until it finishes, stops or fails; the job's exit code."""
        job = self.job
        if record.done_digest(self.folder) == job["digest"]:
            log.info("%s has finished before", job["name"])
            return 0
        lease = self.take_lease()
        previous = self.previous_attempt()
        if previous:
            self.close_previous(previous)
            verdict = self.verdict()
            if not verdict.again:
                return self.stay_down(verdict.reason)
            self.await_old_ranks(previous[0])
        if job["rank_python"] == sys.executable and (changed := self.changed_packages()):
            log.warning("packages have changed since the submission: %s", ", ".join(changed))
        is_first = True
        while True:
            ending = self.run_attempt(lease, is_first)
            if ending.how != "layout" or self.stop_signal is not None:
                return self.after_end(ending, lease)
            lease, is_first, self.has_ended = self.take_lease(), False, False

    def take_lease(self) -> Lease:
        """The right to write the run's folder, for the attempt that comes next."""
        return Lease.take_next(self.run_folder or self.folder, f"job {self.job_id}, restart {self.restarts}")

    def run_attempt(self, lease: Lease, has_preflight: bool) -> Ending:
        """Start the ranks and wait for their end."""
        job = self.job
        hosts = slurm.hostnames(os.environ["SLURM_JOB_NODELIST"])
        nodes, per_node = self.placement(hosts)
        hosts = hosts[:nodes]
        attempt, before = record.next_attempt(self.folder), self._checkpoint()
        record.append_event(
            self.folder,
            "start",
            digest=job["digest"],
            job_id=self.job_id,
            restarts=self.restarts,
            nodes=hosts,
            ranks=nodes * per_node,
            attempt=attempt.name,
            checkpoint=before,
        )
        log.info("%s starts on %s with %s", job["name"], " ".join(hosts), before or "no checkpoint yet")
        environment = self.environment(hosts, lease)
        problem = None
        if job["preflight"]["is_on"] and has_preflight:
            problem = self.preflight(hosts, environment, attempt)
        if problem:
            # A step that SLURM has ended leaves no reports either.
            ending = Ending("crashed" if self.stop_signal is None else "terminated", f"preflight: {problem}")
        else:
            first_step = FirstStep(self.run_folder) if self.run_folder else None
            forced = self.run_ranks(
                [*self.srun(per_node, hosts), *self.rank_command(attempt)], environment, attempt, first_step
            )
            ending = ending_of(attempt, hosts, nodes * per_node, forced, self.stop_signal is not None)
        if ending.how == "layout" and self._checkpoint() == before:
            ending = Ending("crashed", "the run asked for another layout without having moved on", ending.code)
        self._end(ending, attempt=attempt.name)
        return ending

    def preflight(self, hosts: Sequence[str], environment: dict[str, str], attempt: Path) -> str | None:
        """Look every node over; sentences that name the bad ones, or None. A node that hangs is one without report."""
        settings = {**self.job["preflight"], "run_folder": str(self.run_folder)}
        folder = attempt / "preflight"
        folder.mkdir()
        command = [
            *self.srun(1, hosts),
            *self.job["command_prefix"],
            self.job["rank_python"],
            str(CODE / "launch" / "preflight.py"),
            str(folder),
            json.dumps(settings),
        ]
        with open(folder / "srun.log", "wb") as output:
            step = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)
            try:
                step.wait(PREFLIGHT_SECONDS)
            except subprocess.TimeoutExpired:
                self.kill_step(step)
        problems = judge_nodes(folder, list(hosts), settings)
        for line in problems:
            log.error("preflight: %s", line)
        if not problems:
            log.info("preflight: %s", summary(folder, len(hosts)))
        return "; ".join(problems) or None

    def changed_packages(self) -> list[str]:
        """Packages of this node's interpreter that differ from those frozen at submission."""
        try:
            frozen = dict(line.split("==", 1) for line in Path(self.job["packages"]).read_text().split())
        except (OSError, ValueError):
            return []
        found = versions()
        return [
            f"{name} {frozen[name]} -> {version}"
            for name, version in found.items()
            if frozen.get(name, version) != version
        ]

    def verdict(self) -> Verdict:
        """Whether to start again after the last end."""
        return judge(record.events(self.folder), self.job["max_crashes_without_progress"], self.job["max_crashes"])

    def after_end(self, ending: Ending, lease: Lease) -> int:
        """Finish, start again, or stay down."""
        if ending.how == "finished":
            record.mark_done(self.folder, self.job["digest"], job_id=self.job_id)
            return 0
        if not lease.is_current():
            # A requeue from here would end the newer attempt.
            log.info("a newer attempt owns the run; this one ends")
            return EXIT_FENCED
        verdict = self.verdict()
        log.info("%s", verdict.reason)
        return self.requeue() if verdict.again else self.stay_down(verdict.reason)

    def stay_down(self, reason: str) -> int:
        """Say why there is no further attempt, and fail the job so that later jobs do not begin."""
        record.append_event(self.folder, "gave_up", reason=reason, job_id=self.job_id)
        log.error("%s", reason)
        return 1

    def requeue(self) -> int:
        """Put this job back into the queue; returns only if that was not to be."""
        try:
            why_not = slurm.requeue(self.job_id)
        except RuntimeError as error:
            return self.stay_down(str(error))
        if why_not:
            log.info("not requeued from here: %s", why_not)
            return 1
        log.info("requeued")
        time.sleep(600)  # SLURM ends this process
        return 1


def main() -> int:
    """Supervise the job whose folder is the only argument."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stdout)
    folder = Path(sys.argv[1])
    try:
        return Supervisor(folder).main()
    except Exception as error:
        # Whatever it was, the run folder must say that the job ended, and why.
        record.append_event(folder, "gave_up", reason=f"the supervisor failed: {type(error).__name__}: {error}")
        raise


if __name__ == "__main__":
    sys.exit(main())

"""The job itself: what the batch script becomes on the first node of a stage.

    python launch/supervise.py STAGE_FOLDER

Takes the lease, looks the nodes over, starts the ranks, passes stop requests on, watches for the first failing rank,
and at the end decides: finished, start again (`scontrol requeue`), or stay down. Everything it knows it writes into
the stage's folder. Standard library only: it runs outside the container, under the node's own Python.
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
from launch import record
from launch.failure import collect_failure, describe_code, exit_records, failed_first, overall_code, root_cause
from launch.policy import judge
from launch.preflight import judge as judge_nodes
from launch.preflight import versions
from launch.rank import LEASE_SECONDS, REPEAT_SECONDS, RUN_VARIABLE
from megatron_dllm.exit_codes import EXIT_FENCED, EXIT_NON_FINITE, EXIT_PREEMPTED
from megatron_dllm.lease import LEASE_VARIABLE, Lease

log = logging.getLogger("launch")
CODE = Path(__file__).resolve().parents[1]
# After one rank has failed the others get this long to end by themselves and write why.
FAILURE_GRACE_SECONDS = 15.0
POLL_SECONDS = 1.0
PREFLIGHT_SECONDS = 300.0
# Ports below the ephemeral range; each start of each job gets its own, since an old life may still hold the last one.
_PORTS = range(20000, 32000)


def _query(*command: str) -> str:
    """Output of one of SLURM's commands; empty if it fails."""
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    return done.stdout.strip() if done.returncode == 0 else ""


class Supervisor:
    """One start of one stage."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.stage: dict[str, Any] = record.read_json(folder / "stage.json")
        self.run_folder = Path(self.stage["run_folder"]) if self.stage["run_folder"] else None
        self.job = os.environ["SLURM_JOB_ID"]
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
            record.append_event(self.folder, "stop", signal=signal.Signals(number).name, job=self.job)
        self.stop_signal = signal.Signals(number)

    def _checkpoint(self) -> str | None:
        return record.latest_checkpoint(self.run_folder) if self.run_folder else None

    def _end(self, how: str, reason: str, **details: Any) -> None:
        log.info("%s: %s", how, reason)
        self.has_ended = "start" in details
        record.append_event(self.folder, "end", how=how, reason=reason, job=self.job, restarts=self.restarts,
                            checkpoint=self._checkpoint(), **details)

    def previous_start(self) -> dict[str, Any] | None:
        """The newest start of this stage before this one."""
        return next((event for event in reversed(record.events(self.folder)) if event["event"] == "start"), None)

    def close_previous(self, previous: dict[str, Any]) -> None:
        """If the start before this one left no end, write what can be told about it."""
        seen = record.events(self.folder)
        seen = seen[max(number for number, event in enumerate(seen) if event["event"] == "start"):]
        if any(event["event"] == "end" for event in seen):
            return
        lost = self.lost_nodes(previous["nodes"])
        stops = [event["signal"] for event in seen if event["event"] == "stop"]
        if lost:
            how, reason = "vanished", "lost its node: " + "; ".join(lost)
        elif stops:
            how, reason = "terminated", f"ended by SLURM ({stops[0]}) before its ranks had stopped"
        else:
            how, reason = "vanished", ("ended without a word: a node or its daemon failed, or the job was killed; "
                                       f"its nodes were {', '.join(previous['nodes'])}")
        self._end(how, reason, start=previous["start"])
        self.has_ended = False

    def await_old_ranks(self, previous: dict[str, Any]) -> None:
        """Wait until no rank of an older start can be alive.

        Where only a node's daemon died, its ranks go on; their wrappers see the new lease, kill them and write their
        exit records. Ranks that left a record are gone; for others this is the time their wrappers need.
        """
        deadline = time.monotonic() + 3 * LEASE_SECONDS
        expected = len(previous["nodes"]) * self.stage["ranks_per_node"]
        while len(exit_records(self.folder / previous["start"])) < expected and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)

    def lost_nodes(self, nodes: Sequence[str]) -> list[str]:
        """Those of `nodes` that SLURM holds for down, with its reason."""
        if not nodes:
            return []
        listed = _query("sinfo", "--noheader", "--Node", f"--nodes={','.join(nodes)}", "--format=%N|%T|%E")
        rows = sorted({tuple(line.split("|", 2)) for line in listed.splitlines() if line.count("|") >= 2})
        return [f"{row[0]} is {row[1]} ({row[2]})" for row in rows if row[1].startswith(("down", "fail"))
                or row[1].endswith("*")]

    # ---- the ranks ---------------------------------------------------------------------------

    def srun(self, nodes: int, tasks_per_node: int, hosts: Sequence[str]) -> list[str]:
        """Words that start one step on the first `nodes` of the job's hosts."""
        stage = self.stage
        return ["srun", f"--nodes={nodes}", f"--ntasks={nodes * tasks_per_node}",
                f"--ntasks-per-node={tasks_per_node}", f"--nodelist={','.join(hosts[:nodes])}",
                "--kill-on-bad-exit=1", "--wait=0", "--cpu-bind=none", "--mpi=none", "--unbuffered",
                *stage["srun_options"]]

    def step_command(self, start: Path) -> list[str]:
        """What srun starts: a torchrun a node, or the rank itself."""
        stage = self.stage
        python = stage["rank_python"]
        if stage["launcher"] == "torchrun":
            words = [python, str(CODE / "launch" / "node.py"), str(self.folder), str(start)]
        else:
            words = [python, str(CODE / "launch" / "rank.py"), str(start), "--", python, "-u", *stage["arguments"]]
        return [*stage["command_prefix"], *words]

    def run_ranks(self, command: Sequence[str], environment: dict[str, str], start: Path) -> str | None:
        """Run the step to its end; why it had to be ended by force, or None.

        A stop request goes to srun, which forwards it to all tasks, again and again: a task that was not ready has
        ignored it.
        """
        forced: str | None = None
        next_signal = 0.0
        failed_at: float | None = None
        with open(start / "srun.log", "ab") as output:
            step = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)
        while step.poll() is None:
            now = time.monotonic()
            if failed_at is None and failed_first(exit_records(start)):
                failed_at = now
            if failed_at is not None and now - failed_at > FAILURE_GRACE_SECONDS:
                self.kill_step(step)
            if self.stop_signal is not None and now >= next_signal:
                next_signal = now + REPEAT_SECONDS
                step.send_signal(signal.SIGUSR1)
            if forced is None and self.stop_signal is not None and now - self.stop_time > self.stage["give_up_seconds"]:
                forced = f"its ranks had not stopped {self.stage['give_up_seconds']} s after the request"
                self.kill_step(step)
            with contextlib.suppress(subprocess.TimeoutExpired):
                step.wait(POLL_SECONDS)
        return forced

    def kill_step(self, step: subprocess.Popen[bytes]) -> None:
        """End the running step on all nodes at once, not the job."""
        # By the steps' own numbers: a KILL sent to the job's would cancel the job.
        listed = _query("squeue", "--noheader", "--steps", f"--jobs={self.job}", "--format=%i").split()
        steps = [name for name in listed if name.rpartition(".")[2].isdigit()]
        if steps:
            _query("scancel", "--signal=KILL", *steps)
        with contextlib.suppress(subprocess.TimeoutExpired):
            step.wait(10)
            return
        step.kill()

    # ---- start and end -----------------------------------------------------------------------

    def hosts(self) -> list[str]:
        """Names of the job's nodes in order."""
        return _query("scontrol", "show", "hostnames", os.environ["SLURM_JOB_NODELIST"]).split()

    def environment(self, hosts: Sequence[str], nodes: int, lease: Lease) -> dict[str, str]:
        """Variables of the ranks: rendezvous, lease, and the folder it guards."""
        port = _PORTS[(int(self.job) * 37 + self.restarts) % len(_PORTS)]
        guarded = self.run_folder or self.folder
        dropped = ("SLURM_NTASKS_PER_NODE", "SLURM_TASKS_PER_NODE")
        return {**{k: v for k, v in os.environ.items() if k not in dropped}, "MASTER_ADDR": hosts[0],
                "MASTER_PORT": str(port), "MEGATRON_DLLM_NODES": str(nodes), RUN_VARIABLE: str(guarded),
                LEASE_VARIABLE: str(lease.generation)}

    def main(self) -> int:
        """Run the stage's start; the job's exit code."""
        stage = self.stage
        if record.done_digest(self.folder) == stage["digest"]:
            log.info("%s has finished before", stage["name"])
            return 0
        lease = Lease.take_next(self.run_folder or self.folder, f"job {self.job}, restart {self.restarts}")
        previous = self.previous_start()
        if previous is not None:
            self.close_previous(previous)
            verdict = self.verdict()
            if not verdict.again:
                return self.stay_down(verdict.reason)
            self.await_old_ranks(previous)
        hosts = self.hosts()
        nodes = next((count for count in stage["valid_nodes"] if count <= len(hosts)), stage["valid_nodes"][-1])
        start = self.folder / f"start_{lease.generation:04d}"
        start.mkdir()
        record.append_event(self.folder, "start", digest=stage["digest"], job=self.job, restarts=self.restarts,
                            nodes=hosts[:nodes], start=start.name, checkpoint=self._checkpoint())
        environment = self.environment(hosts, nodes, lease)
        if self.stage["rank_python"] == sys.executable and (changed := self.changed_packages()):
            log.warning("packages have changed since the submission: %s", ", ".join(changed))
        if stage["preflight"]["is_on"]:
            problem = self.preflight(hosts[:nodes], environment, start)
            if problem:
                self._end("crashed", f"preflight: {problem}", start=start.name)
                return self.after_end(lease)
        log.info("%s starts on %s with %s", stage["name"], " ".join(hosts[:nodes]),
                 self._checkpoint() or "no checkpoint yet")
        command = [*self.srun(nodes, stage["tasks_per_node"], hosts), *self.step_command(start)]
        forced = self.run_ranks(command, environment, start)
        self.judge_end(start, hosts[:nodes], forced)
        return self.after_end(lease)

    def preflight(self, hosts: Sequence[str], environment: dict[str, str], start: Path) -> str | None:
        """Look every node over; sentences that name the bad ones, or None. A node that hangs is one without report."""
        settings = {**self.stage["preflight"], "run_folder": str(self.run_folder)}
        folder = start / "preflight"
        folder.mkdir()
        command = [*self.srun(len(hosts), 1, hosts), *self.stage["command_prefix"], self.stage["rank_python"],
                   str(CODE / "launch" / "preflight.py"), str(folder), json.dumps(settings)]
        with open(folder / "srun.log", "wb") as output:
            step = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)
            try:
                step.wait(PREFLIGHT_SECONDS)
            except subprocess.TimeoutExpired:
                self.kill_step(step)
        problems = judge_nodes(folder, list(hosts), settings)
        for line in problems:
            log.error("preflight: %s", line)
        return "; ".join(problems) or None

    def changed_packages(self) -> list[str]:
        """Packages of this node's interpreter that differ from those frozen at submission."""
        try:
            frozen = dict(line.split("==", 1) for line in Path(self.stage["packages"]).read_text().split())
        except (OSError, ValueError):
            return []
        found = versions()
        return [f"{name} {frozen[name]} -> {version}" for name, version in found.items()
                if frozen.get(name, version) != version]

    def judge_end(self, start: Path, hosts: Sequence[str], forced: str | None) -> None:
        """Write how the ranks on `hosts` ended."""
        per_node = self.stage["ranks_per_node"]
        ranks = len(hosts) * per_node
        records = exit_records(start)
        told = {entry["rank"] // per_node for entry in records}
        silent = [host for number, host in enumerate(hosts) if number not in told]
        code = overall_code(records, ranks)
        failure = collect_failure(start)
        details = {"start": start.name, "code": code}
        if code == 0:
            self._end("finished", "all ranks finished", **details)
        elif code == EXIT_FENCED:
            self._end("fenced", "a newer start of this run holds its folder", **details)
        elif code == EXIT_PREEMPTED:
            asked = self.stop_signal.name if self.stop_signal else "its ranks"
            self._end("stopped", f"saved and stopped on request ({asked})", **details)
        elif forced:
            self._end("overran", forced, **details)
        elif failure:
            worst = root_cause(start, records)
            assert worst is not None, "a collected failure has its record"
            log.error("%s", failure)
            how = "non_finite" if code == EXIT_NON_FINITE else "crashed"
            reason = (f"rank {worst['rank']} on {worst['host']}: {describe_code(worst['code'])}; see "
                      f"{start / 'failure.txt'}")
            if silent:
                reason = f"no sign of {' and '.join(silent)} when the run broke (lost or hanging); {reason}"
            self._end(how, reason, **details)
        else:
            tail = " | ".join(record.last_lines(start / "srun.log", 3))
            where = f"on {' and '.join(silent)}" if silent else "somewhere"
            self._end("terminated" if self.stop_signal else "crashed",
                      f"ranks {where} ended without a record; srun said: {tail or 'nothing'}", **details)

    def verdict(self) -> Any:
        """Whether to start again after the last end."""
        return judge(record.events(self.folder), self.stage["max_crashes_without_progress"], self.stage["max_crashes"])

    def after_end(self, lease: Lease) -> int:
        """Finish, start again, or stay down."""
        last = record.events(self.folder)[-1]
        if last["how"] == "finished":
            record.mark_done(self.folder, self.stage["digest"], job=self.job)
            return 0
        if not lease.is_current():
            # A requeue from here would end the newer life.
            log.info("a newer start owns the run; this one ends")
            return EXIT_FENCED
        verdict = self.verdict()
        log.info("%s", verdict.reason)
        return self.requeue() if verdict.again else self.stay_down(verdict.reason)

    def stay_down(self, reason: str) -> int:
        """Say why there is no further start, and fail the job so that later stages do not begin."""
        record.append_event(self.folder, "gave_up", reason=reason, job=self.job)
        log.error("%s", reason)
        return 1

    def requeue(self) -> int:
        """Put this job back into the queue; returns only if that was not to be."""
        state = _query("squeue", "--noheader", f"--jobs={self.job}", "--format=%T")
        if state != "RUNNING":
            # Cancelled by its owner, or requeued by SLURM itself: a requeue from here would revive the one and disturb
            # the other.
            log.info("SLURM is ending the job (%s); not requeued from here", state.lower() or "unknown to squeue")
            return 1
        done = subprocess.run(["scontrol", "requeue", self.job], capture_output=True, text=True, check=False)
        if "pending" in done.stderr.lower():
            log.info("SLURM has requeued the job already")
        elif done.returncode != 0:
            return self.stay_down(f"scontrol requeue failed: {done.stderr.strip()}")
        log.info("requeued")
        time.sleep(600)  # SLURM ends this process
        return 1


def main() -> int:
    """Supervise the stage whose folder is the only argument."""
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

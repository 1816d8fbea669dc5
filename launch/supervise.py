"""The job itself: what the batch script becomes on the first node of a stage.

    python launch/supervise.py STAGE_FOLDER

Takes the lease, looks the nodes over, starts the ranks, passes stop requests on, watches for the first failing rank,
and at the end decides: finished, start again (`scontrol requeue`), or stay down. Everything it knows it writes into
the stage's folder. Standard library only: it runs outside the container, under the node's own Python.
"""

from __future__ import annotations

import contextlib
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
from launch.failure import collect_failure, describe_code, exit_records, failed_first, overall_code
from launch.policy import judge
from launch.rank import LEASE_SECONDS, REPEAT_SECONDS, RUN_VARIABLE
from megatron_dllm.exit_codes import EXIT_FENCED, EXIT_NON_FINITE, EXIT_PREEMPTED
from megatron_dllm.lease import LEASE_VARIABLE, Lease

log = logging.getLogger("launch")
CODE = Path(__file__).resolve().parents[1]
# After one rank has failed the others get this long to end by themselves and write why.
FAILURE_GRACE_SECONDS = 15.0
POLL_SECONDS = 1.0
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
        for number in (signal.SIGUSR1, signal.SIGTERM):
            signal.signal(number, self._ask_to_stop)

    # ---- events ------------------------------------------------------------------------------

    def _ask_to_stop(self, number: int, _: object) -> None:
        if self.stop_signal is None:
            self.stop_time = time.monotonic()
            record.append_event(self.folder, "stop", signal=signal.Signals(number).name, job=self.job)
        self.stop_signal = signal.Signals(number)

    def _checkpoint(self) -> str | None:
        return record.latest_checkpoint(self.run_folder) if self.run_folder else None

    def _end(self, how: str, reason: str, **details: Any) -> None:
        log.info("%s: %s", how, reason)
        record.append_event(self.folder, "end", how=how, reason=reason, job=self.job, restarts=self.restarts,
                            checkpoint=self._checkpoint(), **details)

    def close_previous(self) -> bool:
        """If the start before this one left no end, write what can be told about it; whether that was so."""
        seen = record.events(self.folder)
        places = [number for number, event in enumerate(seen) if event["event"] == "start"]
        if not places or any(event["event"] == "end" for event in seen[places[-1]:]):
            return False
        previous = seen[places[-1]]
        lost = self.lost_nodes(previous.get("nodes", []))
        stops = [event["signal"] for event in seen[places[-1]:] if event["event"] == "stop"]
        if lost:
            how, reason = "vanished", "lost its node: " + "; ".join(lost)
        elif stops:
            how, reason = "terminated", f"ended by SLURM ({stops[0]}) before its ranks had stopped"
        else:
            how, reason = "vanished", ("ended without a word: a node or its daemon failed, or the job was killed; "
                                       f"its nodes were {', '.join(previous.get('nodes', [])) or 'unknown'}")
        self._end(how, reason, start=previous.get("start"))
        return True

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
        _query("scancel", "--signal=KILL", self.job)
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
        if self.close_previous():
            verdict = self.verdict()
            if not verdict.again:
                return self.stay_down(verdict.reason)
            # The old life's ranks may still be alive; their wrappers see the new lease and kill them.
            time.sleep(2 * LEASE_SECONDS)
        hosts = self.hosts()
        nodes = next((count for count in stage["valid_nodes"] if count <= len(hosts)), stage["valid_nodes"][-1])
        start = self.folder / f"start_{lease.generation:04d}"
        start.mkdir()
        record.append_event(self.folder, "start", digest=stage["digest"], job=self.job, restarts=self.restarts,
                            nodes=hosts[:nodes], start=start.name, checkpoint=self._checkpoint())
        environment = self.environment(hosts, nodes, lease)
        if stage["preflight"]["is_on"]:
            problem = self.preflight(hosts, nodes, environment, start)
            if problem:
                self._end("crashed", f"preflight: {problem}", start=start.name)
                return self.after_end(lease)
        log.info("%s starts on %s with %s", stage["name"], " ".join(hosts[:nodes]),
                 self._checkpoint() or "no checkpoint yet")
        command = [*self.srun(nodes, stage["tasks_per_node"], hosts), *self.step_command(start)]
        forced = self.run_ranks(command, environment, start)
        self.judge_end(start, nodes, forced)
        return self.after_end(lease)

    def preflight(self, hosts: Sequence[str], nodes: int, environment: dict[str, str], start: Path) -> str | None:
        """Look every node over; a sentence that names the bad one, or None."""
        raise NotImplementedError

    def judge_end(self, start: Path, nodes: int, forced: str | None) -> None:
        """Write how the ranks ended."""
        ranks = nodes * self.stage["ranks_per_node"]
        records = exit_records(start)
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
            worst = failed_first(records)
            assert worst is not None, "a collected failure has its record"
            log.error("%s", failure)
            how = "non_finite" if code == EXIT_NON_FINITE else "crashed"
            self._end(how, f"rank {worst['rank']} on {worst['host']}: {describe_code(worst['code'])}; see "
                           f"{start / 'failure.txt'}", **details)
        else:
            lost = sorted(set(range(ranks)) - {entry["rank"] for entry in records})
            tail = " | ".join(record.last_lines(start / "srun.log", 3))
            self._end("terminated" if self.stop_signal else "crashed",
                      f"ranks {lost} ended without a record; srun said: {tail or 'nothing'}", **details)

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
        if state.startswith("CANCEL") or not state:
            log.info("the job has been cancelled; not requeued")
            return 1
        done = subprocess.run(["scontrol", "requeue", self.job], capture_output=True, text=True, check=False)
        if done.returncode != 0:
            return self.stay_down(f"scontrol requeue failed: {done.stderr.strip()}")
        log.info("requeued")
        time.sleep(600)  # SLURM ends this process
        return 1


def main() -> int:
    """Supervise the stage whose folder is the only argument."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stdout)
    return Supervisor(Path(sys.argv[1])).main()


if __name__ == "__main__":
    sys.exit(main())

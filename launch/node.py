"""The ranks of one node under torchrun, with stop signals that torchrun leaves to them.

    python launch/node.py JOB_FOLDER ATTEMPT_FOLDER          (one srun task a node)

torchrun kills its workers on SIGTERM and dies of SIGUSR1. Preemption sends SIGTERM to whatever srun started, so this
process stands in between: torchrun ignores both signals, and the rank wrappers get SIGUSR1 directly.

Standard library only, apart from torchrun itself.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from launch.rank import PIDS_VARIABLE, REPEAT_SECONDS, die_with_parent  # noqa: E402
from launch.record import read_json  # noqa: E402

# Seconds torchrun gives the other ranks of a node after one has failed: enough to write their own tracebacks.
SHUTDOWN_SECONDS = 10


def rendezvous_options(environment: Mapping[str, str]) -> list[str]:
    """Torchrun's options for this node: a fixed master on SLURM, a port of its own on one machine."""
    if "MASTER_ADDR" not in environment:
        return ["--standalone", "--nnodes=1"]
    return [
        f"--nnodes={environment['MEGATRON_DLLM_NODES']}",
        f"--node-rank={environment['SLURM_NODEID']}",
        f"--master-addr={environment['MASTER_ADDR']}",
        f"--master-port={environment['MASTER_PORT']}",
    ]


def torchrun_command(
    python: str, ranks: int, rendezvous: Sequence[str], attempt_folder: Path, command: Sequence[str]
) -> list[str]:
    """One torchrun that starts `command` under the rank wrapper, `ranks` times.

    Args:
        python: interpreter with torch.
        ranks: processes on this node.
        rendezvous: from rendezvous_options.
        attempt_folder: where logs and exit records go.
        command: of a rank, the interpreter included.
    """
    return [
        python,
        "-m",
        "torch.distributed.run",
        *rendezvous,
        f"--nproc-per-node={ranks}",
        "--max-restarts=0",
        "--monitor-interval=0.5",
        "--signals-to-handle=SIGHUP",
        f"--shutdown-timeout={SHUTDOWN_SECONDS}",
        "--no-python",
        python,
        str(ROOT / "launch" / "rank.py"),
        str(attempt_folder),
        "--",
        *command,
    ]


def _prepare_torchrun() -> None:
    die_with_parent()
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


def run(command: Sequence[str], environment: Mapping[str, str], log: Path) -> int:
    """Run torchrun, turning SIGTERM, SIGUSR1 and Ctrl-C into an orderly stop of its ranks; its return code.

    A second Ctrl-C kills the ranks at once. torchrun's own messages go to `log`: what matters in them is told
    better by the ranks' exit records.
    """
    interrupts = 0
    is_stopping = False
    with tempfile.TemporaryDirectory(prefix="megatron_dllm_") as pids:

        def send() -> None:
            number = signal.SIGKILL if interrupts > 1 else signal.SIGUSR1
            for pid in os.listdir(pids):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), number)

        def pass_on(received: int, _: object) -> None:
            nonlocal interrupts, is_stopping
            is_stopping = True
            interrupts += received == signal.SIGINT
            send()

        previous = {n: signal.signal(n, pass_on) for n in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}
        try:
            with open(log, "ab") as messages:
                process = subprocess.Popen(
                    list(command),
                    env={**environment, PIDS_VARIABLE: pids},
                    stderr=messages,
                    preexec_fn=_prepare_torchrun,
                )
            while True:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    return process.wait(REPEAT_SECONDS)
                # A request that came before the ranks were there must reach them too.
                if is_stopping:
                    send()
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)


def main() -> int:
    """Start the node's ranks as the job's frozen command says."""
    job = read_json(Path(sys.argv[1]) / "job.json")
    python = job["rank_python"] or sys.executable
    start = Path(sys.argv[2])
    ranks = int(os.environ["MEGATRON_DLLM_RANKS_PER_NODE"])
    command = torchrun_command(python, ranks, rendezvous_options(os.environ), start, [python, "-u", *job["arguments"]])
    return run(command, os.environ, start / f"torchrun_{os.environ['SLURM_NODEID']}.log")


if __name__ == "__main__":
    sys.exit(main())

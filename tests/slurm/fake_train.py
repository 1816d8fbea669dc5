"""Stand-in for megatron_dllm.train that keeps its process contract and starts in a tenth of a second.

The "model" is a hash chained over the steps, so that a lost, repeated or foreign step changes the end. Every step all
ranks meet at rank 0 (plain sockets), as they would in a collective; a rank that is gone breaks the others.
Settings: FAKE_STEPS, FAKE_STEP_SECONDS, FAKE_SLOW=step:seconds (of one step), FAKE_SAVE_EVERY, FAKE_SAVE_SECONDS,
FAKE_RAISE=rank:step[:once], FAKE_PRINT (name of a variable whose value is printed).
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import socket
import sys
import time
from pathlib import Path

from megatron_dllm.run.exit_codes import EXIT_FENCED, EXIT_PREEMPTED
from megatron_dllm.run.lease import Lease, LeaseLost
from tests.integration.stage_train import given_config


class Meeting:
    """All ranks exchange one boolean a step; True where any rank says True."""

    def __init__(self, rank: int, ranks: int, place: Path) -> None:
        self.rank, self.ranks = rank, ranks
        if rank == 0:
            with socket.create_server(("127.0.0.1", 0)) as server:
                place.with_suffix(".tmp").write_text(str(server.getsockname()[1]))
                os.replace(place.with_suffix(".tmp"), place)
                self.peers = [server.accept()[0] for _ in range(ranks - 1)]
        else:
            while not place.exists():
                time.sleep(0.05)
            self.peers = [socket.create_connection(("127.0.0.1", int(place.read_text())))]

    def any(self, flag: bool) -> bool:
        if self.rank == 0:
            flags = [flag, *(self._receive(peer) for peer in self.peers)]
            for peer in self.peers:
                peer.sendall(b"1" if any(flags) else b"0")
            return any(flags)
        self.peers[0].sendall(b"1" if flag else b"0")
        return self._receive(self.peers[0])

    def _receive(self, peer: socket.socket) -> bool:
        data = peer.recv(1)
        if not data:
            raise ConnectionError("a peer is gone")
        return data == b"1"


def save(run: Path, step: int, state: str, lease: Lease) -> None:
    name = f"step_{step:07d}"
    final = run / "checkpoints" / name
    lease.check()
    if not final.exists():
        temporary = run / "checkpoints" / f".{name}.{lease.generation}"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        (temporary / "part").write_text("half")
        time.sleep(float(os.environ.get("FAKE_SAVE_SECONDS", "0")))
        (temporary / "state.json").write_text(json.dumps({"step": step, "state": state}))
        lease.check()
        os.rename(temporary, final)
    pointer = run / "checkpoints" / f".latest.{lease.generation}"
    pointer.write_text(name + "\n")
    os.replace(pointer, run / "checkpoints" / "latest")


def train() -> int:
    config = given_config()
    run = Path(config["run"]["root"]) / config["run"]["name"]
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    asked = []
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda received, _: asked.append(received))
    generation = int(os.environ.get("MEGATRON_DLLM_LEASE", "0"))
    lease = Lease(run / "lease", generation) if generation else Lease.acquire(run)
    place = run / f"meeting_{lease.generation}"
    meeting = Meeting(rank, ranks, place)
    step, state = 0, str(config["run"]["seed"])
    latest = run / "checkpoints" / "latest"
    if latest.exists():
        saved = json.loads((run / "checkpoints" / latest.read_text().strip() / "state.json").read_text())
        step, state = saved["step"], saved["state"]
    steps, every = int(os.environ.get("FAKE_STEPS", "10")), int(os.environ.get("FAKE_SAVE_EVERY", "5"))
    bad_rank, bad_step, *once = os.environ.get("FAKE_RAISE", "-1:-1").split(":")
    slow_step, slow_seconds = os.environ.get("FAKE_SLOW", "-1:0").split(":")
    print(f"rank {rank} of {ranks} on {socket.gethostname()} starts at step {step}, from {__file__}", flush=True)
    print(os.environ.get(os.environ.get("FAKE_PRINT", ""), ""), flush=True)
    while step < steps:
        time.sleep(float(os.environ.get("FAKE_STEP_SECONDS", "0.02")))
        step += 1
        time.sleep(float(slow_seconds) if step == int(slow_step) else 0.0)
        state = hashlib.sha256(f"{state}:{step}".encode()).hexdigest()
        if rank == int(bad_rank) and step == int(bad_step):
            flag = run / "raised_once"
            if not once or not flag.exists():
                flag.touch()
                raise RuntimeError(f"deliberate failure of rank {rank} at step {step}")
        is_asked = meeting.any(bool(asked))
        if rank == 0:
            lease.check()
            line = {
                "step": step,
                "stage": "only",
                "consumed_tokens": step * 100,
                "loss": int(state[:6], 16) / 2**24,
                "tokens_per_second": 1000.0,
                "learning_rate": 1e-3,
                "grad_norm": 1.0,
            }
            with open(run / "metrics.jsonl", "a") as file:
                file.write(json.dumps(line) + "\n")
            if is_asked or step % every == 0 or step == steps:
                save(run, step, state, lease)
        meeting.any(False)
        if is_asked and step < steps:
            return EXIT_PREEMPTED
    return 0


if __name__ == "__main__":
    try:
        sys.exit(train())
    except LeaseLost as lost:
        print(lost, flush=True)
        sys.exit(EXIT_FENCED)

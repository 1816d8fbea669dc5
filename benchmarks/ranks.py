"""Run a function on several gloo ranks, each a process of its own, with a time limit."""

from __future__ import annotations

import contextlib
import faulthandler
import multiprocessing
import os
import pickle
import signal
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch

# Seconds that a rank gets to write down where it stands before it is killed.
STACK_GRACE_S = 1.0
# Seconds that ranks get to end by themselves after all results are there.
END_GRACE_S = 10.0


def run_ranks(function: Callable[..., Any], world_size: int, *args: Any, timeout_s: float = 120.0) -> list[Any]:
    """Call `function(*args)` on ranks 0 .. world_size - 1 and wait for all of them.

    Each rank has the environment that torchrun would give it; `megatron_dllm.parallel.groups.initialize` reads it. The
    function and its arguments must be picklable, so the function stands at a module's top level. Results come
    back through a pipe: keep them small, tensors on the CPU.

    Returns:
        Each rank's result, by rank.

    Raises:
        RuntimeError: when a rank raises or dies, with its traceback. The other ranks are ended.
        TimeoutError: when a rank is not done in time; the message says where each rank is.
    """
    # The parent serves the ranks' meeting point, so nobody else can take its port in between.
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    # Forked from a server that has imported the slow libraries once: starting a rank costs milliseconds.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.preload"])
    with tempfile.TemporaryDirectory() as folder:
        stacks = [Path(folder) / f"rank_{rank}.txt" for rank in range(world_size)]
        pipes, processes = [], []
        for rank in range(world_size):
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(
                target=_run_rank, args=(function, args, rank, world_size, store.port, sender, str(stacks[rank]))
            )
            process.start()
            sender.close()
            pipes.append(receiver)
            processes.append(process)
        try:
            results = _collect(pipes, processes, stacks, time.monotonic() + timeout_s, timeout_s)
            for process in processes:
                process.join(END_GRACE_S)
            return results
        finally:
            for process in processes:
                _kill_session(process.pid)
                process.kill()
                process.join()


def _kill_session(pid: int) -> None:
    """End a rank, which leads a process group, and whatever it has started, for example a checkpoint's writer."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)


def lead_session() -> None:
    """Put this process and what it starts into a process group that ends with its parent, even a killed one."""
    os.setsid()
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None, "a rank is a child process"
    parent.join()
    _kill_session(os.getpid())


def set_rank(rank: int, world_size: int, port: int) -> None:
    """Give this process the environment that torchrun would give it, with the meeting point at `port`."""
    os.environ.update(rank_environment(rank, world_size, port))
    torch.set_num_threads(1)


def rank_environment(rank: int, world_size: int, port: int) -> dict[str, str]:
    """What torchrun would tell a rank, with the meeting point at `port`."""
    return dict(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        TORCHELASTIC_USE_AGENT_STORE="True",
        GLOO_SOCKET_IFNAME="lo",
    )


def _run_rank(
    function: Callable[..., Any],
    args: tuple[Any, ...],
    rank: int,
    world_size: int,
    port: int,
    sender: Connection,
    stack_file: str,
) -> None:
    lead_session()
    set_rank(rank, world_size, port)
    with open(stack_file, "w", encoding="utf-8") as stack:
        faulthandler.register(signal.SIGUSR1, file=stack)
        try:
            result = function(*args)
            # As bytes: multiprocessing would share a tensor's memory, which ends with this process.
            sender.send((True, pickle.dumps(result)))
        except BaseException:
            sender.send((False, traceback.format_exc()))
        finally:
            sender.close()
            if torch.distributed.is_initialized():
                torch.distributed.destroy_process_group()


def _collect(
    pipes: list[Connection], processes: list[Any], stacks: list[Path], deadline: float, timeout_s: float
) -> list[Any]:
    results: dict[int, Any] = {}
    while len(results) < len(pipes):
        waiting = {pipes[rank]: rank for rank in range(len(pipes)) if rank not in results}
        ready = wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            raise TimeoutError(_describe_standstill(list(waiting.values()), processes, stacks, timeout_s))
        for pipe in ready:
            rank = waiting[pipe]  # type: ignore[index]
            try:
                succeeded, value = pipe.recv()  # type: ignore[union-attr]
            except EOFError:
                processes[rank].join()
                succeeded, value = False, f"the process ended without a result, exit code {processes[rank].exitcode}"
            if not succeeded:
                raise RuntimeError(f"rank {rank} of {len(pipes)} failed:\n{value}")
            results[rank] = pickle.loads(value)
    return [results[rank] for rank in range(len(pipes))]


def _describe_standstill(ranks: list[int], processes: list[Any], stacks: list[Path], timeout_s: float) -> str:
    for rank in ranks:
        os.kill(processes[rank].pid, signal.SIGUSR1)
    time.sleep(STACK_GRACE_S)
    places = "\n".join(f"rank {rank}:\n{stacks[rank].read_text(encoding='utf-8')}" for rank in ranks)
    return f"ranks {ranks} were not done after {timeout_s:g} s; they stand at\n{places}"

"""Writes a rank's tensor files of a checkpoint: at once, or in one process forked for it.

megatron-core plans what each rank writes and names the function that does it. That function starts further
processes and waits for them without a limit, so a writer that dies hangs the job. Here the files are written by the
caller itself or by one watched child: whatever ends it is seen at the next look.
"""

from __future__ import annotations

import atexit
import ctypes
import logging
import multiprocessing
import os
import queue
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest

from megatron_dllm.checkpoint.manifest import checksum
from megatron_dllm.run.disk_full import failed_write

_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Written:
    """What a rank has written: megatron-core's records by file number, and each file's size and checksum."""

    records: dict[int, list[Any]] = field(default_factory=dict)
    checksums: dict[str, dict[str, Any]] = field(default_factory=dict)


def use_local_results() -> None:
    """Have megatron-core collect results in a queue of this process; its own is a server process per rank."""
    filesystem_async._results_queue = queue.Queue()


def write_now(request: AsyncRequest) -> Written:
    """Write the files of a request in this process.

    Raises:
        OSError: there was no room (DiskFull), or no right to write.
        RuntimeError: anything else that went wrong.
    """
    return _write(request.async_fn, _staged(request))


def hand_over(request: AsyncRequest, written: Written) -> None:
    """Give megatron-core the records it asks for when it completes the checkpoint's metadata."""
    if request.async_fn is not None:
        request.async_fn_args[2].put(written.records)


def _staged(request: AsyncRequest) -> list[Any]:
    """Files to write, their tensors in host memory."""
    if request.async_fn is None:
        return []
    return list(request.preload_fn() if request.preload_fn else request.async_fn_args[1])


def _write(function: Any, buckets: list[Any]) -> Written:
    written = Written()
    for index, bucket in enumerate(buckets):
        results: queue.Queue[Any] = queue.Queue()
        count: queue.Queue[int] = queue.Queue()
        count.put(index)
        filesystem_async.FileSystemWriterAsync.write_preloaded_data(
            function.args[0], index, bucket, results, count, use_fsync=True
        )
        _, records = results.get_nowait()
        path = Path(bucket[0])
        if isinstance(records, Exception):
            raise failed_write(path, records) from records
        written.records[index] = records
        try:
            written.checksums[path.name] = checksum(path)
        except OSError as failed:
            raise failed_write(path, failed) from failed
    return written


class BackgroundWrite:
    """A forked process that writes the files of one request. It ends with its parent."""

    def __init__(self, request: AsyncRequest, timeout_minutes: float) -> None:
        """Copy the tensors to the host and start writing; `poll` fails when it takes longer than the timeout."""
        self._deadline = time.monotonic() + 60.0 * timeout_minutes
        self._timeout_minutes = timeout_minutes
        self._written: Written | None = None
        context = multiprocessing.get_context("fork")
        self._receiver, sender = context.Pipe(duplex=False)
        self._process = context.Process(
            target=_child,
            args=(request.async_fn, _staged(request), sender, os.getpid()),
            daemon=True,
            name="checkpoint-writer",
        )
        self._process.start()
        sender.close()
        # Before multiprocessing's own clean-up, which waits for its children.
        atexit.register(self.kill)

    @property
    def pid(self) -> int | None:
        """Process number of the writer."""
        return self._process.pid

    def poll(self) -> Written | None:
        """What was written, or None while the writer is at it.

        Raises:
            OSError: the writer had no room (DiskFull), or no right to write.
            RuntimeError: it failed or died, saying how.
            TimeoutError: it is not done in time; it is killed.
        """
        if self._written is not None:
            return self._written
        was_alive = self._process.is_alive()  # before looking into the pipe: the last message comes before the end
        if self._receiver.poll():
            try:
                self._written, problem = self._receiver.recv()
            except EOFError:
                was_alive, problem = False, None
            if problem is not None:
                raise problem
            if self._written is not None:
                self.kill()
                self._process.join()
                return self._written
        if not was_alive:
            self._process.join()
            raise RuntimeError(f"the checkpoint's writer (process {self.pid}) died: {_end(self._process.exitcode)}")
        if time.monotonic() > self._deadline:
            self._process.kill()
            raise TimeoutError(
                f"the checkpoint's writer (process {self.pid}) did not finish within "
                f"checkpoint.timeout_minutes ({self._timeout_minutes:g})"
            )
        return None

    def kill(self) -> None:
        """End the writer, whatever it is doing."""
        atexit.unregister(self.kill)
        if self._process.is_alive():
            self._process.kill()


def _end(exit_code: int | None) -> str:
    if exit_code is not None and exit_code < 0:
        return f"killed by {signal.Signals(-exit_code).name}"
    return f"exit code {exit_code}"


def _child(function: Callable[..., None] | None, buckets: list[Any], sender: Any, parent: int) -> None:
    # A writer that outlived its rank could write into the folder of the run's next attempt.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)  # asked to stop is the rank, which waits for its writer
    logging.disable()
    try:
        sender.send((_write(function, buckets), None))
    except OSError as error:
        sender.send((None, error))
    except Exception as error:
        sender.send((None, RuntimeError(f"the checkpoint's writer failed: {type(error).__name__}: {error}")))
    sender.close()
    os._exit(0)  # nothing of the parent's is this process's to clean up

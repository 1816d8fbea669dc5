"""How every command begins and ends: signals, streams, and one sentence for a mistake (standard library only).

    from megatron_dllm.run.command import listen, run_command

    if __name__ == "__main__":
        listen()                    # before the slow imports
    import ...
    if __name__ == "__main__":
        run_command(main)

A command ends with 0, with 2 where the user has to mend something, with 85 where it was asked to stop
(`run.exit_codes`), and with a traceback where the program is wrong.
"""

from __future__ import annotations

import io
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import NoReturn

from megatron_dllm.run.exit_codes import EXIT_PREEMPTED, EXIT_REFUSED
from megatron_dllm.run.place import check_temporary_folder, is_rank_zero

# Ctrl-C, what a launcher or a person sends, and what launch/ sends ahead of a time limit.
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
# Requests that follow the first within this time do not disturb the cleaning up.
_PATIENCE_SECONDS = 10.0
# torchrun ends all ranks with the first: rank 0 speaks before that.
_SILENT_SECONDS = 5.0
_EXIT_BROKEN_PIPE = 128 + signal.SIGPIPE


def listen() -> None:
    """From here on a stop signal ends the process at once, with the code of one that was asked to stop."""
    for number in STOP_SIGNALS:
        signal.signal(number, _leave)


def _leave(_number: int, _frame: FrameType | None) -> None:
    os._exit(EXIT_PREEMPTED)


class _Stop:
    """Ends the work like an exception, so that it cleans up."""

    def __init__(self) -> None:
        self.asked_at: float | None = None

    def __call__(self, _number: int, _frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.asked_at is None or now - self.asked_at > _PATIENCE_SECONDS:
            self.asked_at = now
            raise SystemExit(EXIT_PREEMPTED)


def run_command(work: Callable[[], int | None]) -> NoReturn:
    """Do the work of a command and end the process.

    Args:
        work: returns the exit code; None: 0. A ValueError or OSError is a mistake of the user, told in one sentence.
    """
    stop = _Stop()
    for number in STOP_SIGNALS:
        signal.signal(number, stop)
    _settle_streams()
    # What this process writes it must be able to read, whatever umask a shell has left it.
    os.umask(os.umask(0o077) & 0o077)
    code = _code_of(work, stop)
    for number in STOP_SIGNALS:  # the work is done: nothing is left to stop
        signal.signal(number, signal.SIG_IGN)
    sys.exit(code)


def _code_of(work: Callable[[], int | None], stop: _Stop) -> int:
    try:
        check_temporary_folder()
        code = work() or 0
        sys.stdout.flush()
        return code
    except BaseException as error:
        if stop.asked_at is not None:  # what happens on the way out is its consequence
            return EXIT_PREEMPTED
        if isinstance(error, BrokenPipeError):  # whoever read the output has gone
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return _EXIT_BROKEN_PIPE
        if isinstance(error, ValueError | OSError):
            _refuse(error)
            return EXIT_REFUSED
        raise


def _refuse(error: ValueError | OSError) -> None:
    """Say once what is wrong: on rank 0, as all ranks meet the same mistake."""
    if is_rank_zero():
        with suppress(OSError):  # nobody can be told
            print(f"error: {sentence(error)}", file=sys.stderr, flush=True)
    else:
        time.sleep(_SILENT_SECONDS)


def sentence(error: Exception) -> str:
    """An error as one sentence for people."""
    if isinstance(error, OSError) and error.strerror:
        names = " -> ".join(str(name) for name in (error.filename, error.filename2) if name is not None)
        return f"{names}: {error.strerror}" if names else error.strerror
    return str(error)


def _settle_streams() -> None:
    """Whatever the locale, no character ends the program; what goes to a file or a pipe is UTF-8."""
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by whoever started this process
            setattr(sys, name, open(os.devnull, "r" if name == "stdin" else "w", encoding="utf-8"))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            is_given = stream.isatty() or "PYTHONIOENCODING" in os.environ
            stream.reconfigure(encoding=None if is_given else "utf-8", errors="backslashreplace")


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Finish a block of moments, such as the renaming of results, whatever signal comes meanwhile."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = {number: signal.signal(number, signal.SIG_IGN) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextmanager
def leaving_at_once() -> Iterator[None]:
    """Where a process has begun nothing yet, a stop signal ends it also while it waits inside a library.

    Python itself would look at the signal only when the library returns, which for ranks that wait for each other may
    be never. Outside of a command (`run_command`) nothing changes.
    """
    if not isinstance(signal.getsignal(signal.SIGTERM), _Stop):
        yield
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    previous = signal.set_wakeup_fd(writer)
    thread = threading.Thread(target=_leave_when_woken, args=(reader,), daemon=True)
    thread.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(previous)
        os.close(writer)
        thread.join()
        os.close(reader)


def _leave_when_woken(reader: int) -> None:
    while numbers := os.read(reader, 64):
        if any(isinstance(signal.getsignal(number), _Stop) for number in numbers):
            os._exit(EXIT_PREEMPTED)

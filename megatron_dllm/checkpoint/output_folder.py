"""An output folder that is complete or absent."""

from __future__ import annotations

import glob
import logging
import os
import secrets
import shutil
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from megatron_dllm.run.command import STOP_SIGNALS
from megatron_dllm.run.exit_codes import EXIT_PREEMPTED
from megatron_dllm.run.files import parents_made, sync

logger = logging.getLogger(__name__)


@contextmanager
def output_folder(target: Path, num_bytes: int) -> Iterator[Path]:
    """Write a folder under a temporary name, then rename it.

    Args:
        target: must not exist.
        num_bytes: size of what will be written, checked against the disk first.

    Yields:
        The folder to write into. It is deleted if the block raises. A stop signal raises SystemExit there, with
        the code of a process that stopped on request and may be started again.

    Raises:
        ValueError: the target exists, or the disk is too small.
    """
    target = target.absolute()
    _remove_leftovers(target)
    check_output(target, num_bytes)
    # Process numbers repeat in every container, names of nodes in a cluster do not.
    temporary = target.parent / f"{_prefix(target)}{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"
    with _stop_raises() as stop, parents_made(target):
        try:
            temporary.mkdir()
            yield temporary
            for path in (*temporary.rglob("*"), temporary):
                sync(path)
            stop.is_ignored = True
            if target.exists():
                raise ValueError(f"output ({target}) appeared while writing; nothing was replaced.")
            temporary.rename(target)
            sync(target.parent)
        except BaseException:
            stop.is_ignored = True
            shutil.rmtree(temporary, ignore_errors=True)
            raise
    logger.info("wrote %s", target)


def check_output(target: Path, num_bytes: int) -> None:
    """Raise ValueError where `target` exists or its disk has less than `num_bytes` (and 2 %) left."""
    if target.exists():
        raise ValueError(f"output ({target}) exists; nothing is overwritten: name a new folder or remove it.")
    existing = next(parent for parent in target.absolute().parents if parent.exists())
    if not existing.is_dir():
        raise ValueError(f"output ({target}) lies under {existing}, which is a file; name another folder.")
    needed = num_bytes + num_bytes // 50
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise ValueError(
            f"output ({target}) needs {needed / 1e9:.2f} GB, the disk of {existing} has {free / 1e9:.2f} "
            "GB free; make room or name a folder on another disk."
        )


def _prefix(target: Path) -> str:
    return f".{target.name}.incomplete-"


def _remove_leftovers(target: Path) -> None:
    """Delete what writers killed on this machine left of the same output; name what others left."""
    for left in target.parent.glob(f"{glob.escape(_prefix(target))}*-*-*"):
        host, pid, _ = left.name.removeprefix(_prefix(target)).rsplit("-", 2)
        if host != socket.gethostname():
            logger.warning("%s belongs to a process on %s; remove it if that has ended", left, host)
        elif pid.isdecimal() and not _is_running(int(pid)):
            logger.warning("removing %s, which an interrupted process left behind", left)
            shutil.rmtree(left, ignore_errors=True)


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        pass
    return True


class _Stop:
    """Raises SystemExit where a stop signal arrives, unless what it would interrupt is the renaming or the clean-up."""

    is_ignored = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if not self.is_ignored:
            raise SystemExit(EXIT_PREEMPTED)


@contextmanager
def _stop_raises() -> Iterator[_Stop]:
    """Let a stop signal end the block like an exception, so that it cleans up."""
    stop = _Stop()
    try:
        previous = [(number, signal.signal(number, stop)) for number in STOP_SIGNALS]
    except ValueError:  # not in the main thread: the process's owner handles signals
        yield stop
        return
    try:
        yield stop
    finally:
        for number, handler in previous:
            signal.signal(number, handler)

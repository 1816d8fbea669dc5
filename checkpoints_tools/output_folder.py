"""An output folder that is complete or absent."""

from __future__ import annotations

import logging
import os
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

logger = logging.getLogger(__name__)


@contextmanager
def output_folder(target: Path, num_bytes: int) -> Iterator[Path]:
    """Write a folder under a temporary name, then rename it.

    Args:
        target: must not exist.
        num_bytes: size of what will be written, checked against the disk first.

    Yields:
        The folder to write into. It is deleted if the block raises, a termination signal included.

    Raises:
        ValueError: the target exists, or the disk is too small.
    """
    target = target.absolute()
    check_output(target, num_bytes)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.parent / f".{target.name}.incomplete-{os.getpid()}"
    temporary.mkdir()
    try:
        with _termination_raises():
            yield temporary
            _sync_folder(temporary)
            if target.exists():
                raise ValueError(f"output ({target}) appeared while writing; nothing was replaced.")
            temporary.rename(target)
            _sync_folder(target.parent)
    except BaseException:
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
        raise ValueError(f"output ({target}) needs {needed / 1e9:.2f} GB, the disk of {existing} has {free / 1e9:.2f} "
                         "GB free; make room or name a folder on another disk.")


@contextmanager
def _termination_raises() -> Iterator[None]:
    """Let SIGTERM end the block like an exception, so that it cleans up."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    try:
        previous = signal.signal(signal.SIGTERM, stop)
    except ValueError:  # not in the main thread: the process's owner handles signals
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

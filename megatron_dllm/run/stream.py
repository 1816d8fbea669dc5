"""A file of results that is opened before the work begins and holds every result as soon as there is one.

A place that cannot be written is known before a model is loaded, and what was computed before an error stays. As the
file has its name only when all results are there, nobody takes a part for the whole.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_dllm.run.command import uninterrupted
from megatron_dllm.run.files import naming, parents_made

# Behind the name of a file of results while they are coming in.
PARTIAL = ".partial"


def check_writable(path: Path) -> None:
    """Make and remove a file where a result is to go; folders that are missing are not made yet.

    Raises:
        ValueError: it is a folder, or nothing can be written there.
    """
    if path.is_dir():
        raise ValueError(f"output ({path}) is a folder; name a file.")
    place = next(folder for folder in path.absolute().parents if os.path.lexists(folder))
    try:
        with tempfile.TemporaryFile(dir=place):
            return
    except OSError as error:
        raise ValueError(
            f"output ({path}) cannot be written ({place}: {error.strerror}); name a file in another folder."
        ) from None


def check_new(path: Path) -> None:
    """Make sure, before any work, that a result can go where nothing is yet.

    Raises:
        ValueError: something is there, or nothing can be written there.
    """
    check_writable(path)
    _check_absent(path)


def partial_lines(path: Path) -> list[str]:
    """The whole lines that an interrupted start has left in PATH.partial; none if there is no such file."""
    partial = path.with_name(path.name + PARTIAL)
    if not partial.is_file():
        return []
    # Lines end at line feeds alone: a text may hold other characters that end one elsewhere.
    return partial.read_bytes().decode(errors="replace").split("\n")[:-1]


@contextmanager
def result_lines(path: Path, resume: bool = False) -> Iterator[Callable[[str], None]]:
    """Give what appends a line to PATH.partial, which gets its name when the block has ended.

    Only whole lines stay: in PATH.partial if the block fails, until the next start replaces it. Without a line, and
    where the process is asked to stop (the same command starts over), nothing stays.

    Args:
        path: of the file, which must not exist; its folders are made.
        resume: go on behind the `partial_lines` that are there, and leave them to the next start also where the
            process is asked to stop.

    Raises:
        ValueError: it exists.
        OSError: the place cannot be written, or the disk is full.
    """
    _check_absent(path)
    partial = path.with_name(path.name + PARTIAL)
    with parents_made(path):
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | (0 if resume else os.O_TRUNC)
        end = partial.read_bytes().rfind(b"\n") + 1 if resume and partial.is_file() else 0
        descriptor = os.open(partial, flags, 0o666)
        os.ftruncate(descriptor, end)

        def append(line: str) -> None:
            nonlocal end
            data = (line + "\n").encode(errors="backslashreplace")
            with naming(partial):
                while data:  # a disk that fills up takes a part
                    data = data[os.write(descriptor, data) :]
            end = os.fstat(descriptor).st_size

        try:
            yield append
            os.fsync(descriptor)
            with uninterrupted():
                _check_absent(path)
                partial.rename(path)
        except BaseException as error:
            os.ftruncate(descriptor, end)
            if not end or (isinstance(error, SystemExit) and not resume):
                partial.unlink()
            raise
        finally:
            os.close(descriptor)


def _check_absent(path: Path) -> None:
    if path.exists():
        raise ValueError(f"output ({path}) exists; nothing is overwritten: name a new file.")

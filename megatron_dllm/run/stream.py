"""A file of results that is opened before the work begins and holds every result as soon as there is one.

A place that cannot be written is known before a model is loaded, and what was computed before an interruption stays.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def result_lines(path: Path) -> Iterator[Callable[[str], None]]:
    """Make a file and give what appends a line to it. Only whole lines stay; without one the file goes away again.

    Args:
        path: of the file, which must not exist; its folders are made.

    Raises:
        ValueError: it exists.
        OSError: the place cannot be written, or the disk is full.
    """
    made = [folder for folder in path.parents if not folder.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o666)
    except FileExistsError:
        raise ValueError(f"output ({path}) exists; nothing is overwritten: name a new file.") from None
    end = 0

    def append(line: str) -> None:
        nonlocal end
        data = (line + "\n").encode()
        while data:  # a disk that fills up takes a part
            data = data[os.write(descriptor, data) :]
        end = os.fstat(descriptor).st_size

    try:
        yield append
    finally:
        os.ftruncate(descriptor, end)
        os.close(descriptor)
        if not end:
            path.unlink()
            with suppress(OSError):  # another's file lies there by now
                for folder in made:
                    folder.rmdir()

"""Makes a folder that many tests read once in a session, however many processes of pytest-xdist share it out."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable
from pathlib import Path

import pytest


def make_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], None]) -> Path:
    """The folder `name` of this test run; the first who asks makes it, the others wait for that.

    Args:
        factory: pytest's folders of this test run.
        name: of the folder, one for each `make`.
        make: fills the folder. A test that changes something in it must copy it first.
    """
    base = factory.getbasetemp()
    # Workers of xdist have a folder each inside the session's.
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    folder, finished = shared / name, shared / f"{name}.finished"
    with open(shared / f"{name}.lock", "w", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not finished.exists():
            folder.mkdir()  # fails where an earlier attempt has failed: the tests say so one by one
            make(folder)
            finished.touch()
    return folder

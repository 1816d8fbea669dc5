"""A disk without room is told apart from other failures of writing."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from megatron_dllm.run.command import sentence
from megatron_dllm.run.disk_full import DiskFull, failed_write
from tests.full_disk import full_disk


def _hidden(number: int) -> RuntimeError:
    """What torch makes of an error of the operating system."""
    try:
        try:
            raise OSError(number, "said by the system")
        except OSError:
            raise RuntimeError("unexpected position")  # noqa: B904
    except RuntimeError as error:
        return error


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_want_of_room_is_known_behind_an_error_of_a_library(tmp_path: Path, number: int) -> None:
    error = failed_write(tmp_path / "weights", _hidden(number))
    assert isinstance(error, DiskFull)
    assert str(error).startswith(f"writing {tmp_path}/weights: [Errno {number}] said by the system (")
    assert "; make room, or choose another run.root" in str(error)


def test_another_failure_is_no_want_of_room(tmp_path: Path) -> None:
    for error in (_hidden(errno.EIO), RuntimeError("unexpected position")):
        assert type(failed_write(tmp_path / "weights", error)) is RuntimeError


@pytest.mark.parametrize("number", [errno.EACCES, errno.EPERM, errno.EROFS])
def test_want_of_the_right_to_write_is_said_as_the_system_says_it(tmp_path: Path, number: int) -> None:
    error = failed_write(tmp_path / "weights", _hidden(number))
    assert isinstance(error, OSError) and not isinstance(error, DiskFull)
    assert sentence(error) == f"{tmp_path}/weights: {os.strerror(number)}"


def test_the_system_is_asked_where_its_error_is_lost(tmp_path: Path) -> None:
    with full_disk(1000):
        error = failed_write(tmp_path, RuntimeError("unexpected position"))
    assert isinstance(error, DiskFull) and "File too large" in str(error)
    assert not list(tmp_path.iterdir())

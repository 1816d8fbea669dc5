"""An output folder is complete or absent, also when the process is told to stop."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from checkpoints_tools.output_folder import output_folder

from .conftest import left_in


def test_appears_only_when_it_is_complete(tmp_path: Path) -> None:
    with output_folder(tmp_path / "deep" / "out", 10) as folder:
        (folder / "file").write_text("x")
        assert not (tmp_path / "deep" / "out").exists()
    assert (tmp_path / "deep" / "out" / "file").read_text() == "x"
    assert left_in(tmp_path / "deep") == {"out"}


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error), output_folder(tmp_path / "out", 10):
        raise error
    assert left_in(tmp_path) == set()


def test_a_termination_signal_leaves_nothing(tmp_path: Path) -> None:
    previous = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as stopped, output_folder(tmp_path / "out", 10) as folder:
        (folder / "file").write_text("x")
        os.kill(os.getpid(), signal.SIGTERM)
    assert stopped.value.code == 128 + signal.SIGTERM
    assert left_in(tmp_path) == set()
    assert signal.getsignal(signal.SIGTERM) == previous


def test_refuses_to_replace_what_appeared_meanwhile(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="appeared while writing"), output_folder(tmp_path / "out", 10):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "theirs").write_text("x")
    assert (tmp_path / "out" / "theirs").exists()


def test_a_file_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="which is a file"), output_folder(tmp_path / "file" / "out", 10):
        pass

"""Results that are written as they come: whole lines or nothing, and a bad place known at once."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest

from megatron_dllm.run.stream import result_lines


def test_lines_are_there_as_soon_as_they_are_written(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "lines.jsonl"
    with result_lines(path) as write:
        write("one")
        assert path.read_text() == "one\n"
        write("zwölf")
        assert path.read_text() == "one\nzwölf\n"


def test_what_was_computed_before_an_error_stays(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    with pytest.raises(KeyboardInterrupt), result_lines(path) as write:
        write("one")
        raise KeyboardInterrupt
    assert path.read_text() == "one\n"


def test_without_a_result_nothing_stays(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), result_lines(tmp_path / "new" / "lines.jsonl"):
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    path.write_text("mine")
    with pytest.raises(ValueError, match="exists; nothing is overwritten"), result_lines(path):
        pass
    assert path.read_text() == "mine"


def test_a_disk_that_fills_up_in_a_line_keeps_the_lines_before_it(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, hard))
    try:
        with pytest.raises(OSError), result_lines(path) as write:
            write("a line")
            write("another line")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_text() == "a line\n"

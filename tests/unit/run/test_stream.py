"""Results that are written as they come: whole lines or nothing, and a bad place known at once."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_dllm.run.exit_codes import EXIT_PREEMPTED
from megatron_dllm.run.stream import PARTIAL, check_new, check_writable, partial_lines, result_lines
from tests.full_disk import full_disk


def partial_of(path: Path) -> Path:
    return path.with_name(path.name + PARTIAL)


def test_lines_are_there_as_soon_as_they_are_written(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "lines.jsonl"
    with result_lines(path) as write:
        write("one")
        assert partial_of(path).read_text() == "one\n"
        write("zwölf \udce9")
        assert partial_of(path).read_text() == "one\nzwölf \\udce9\n" and not path.exists()
    assert path.read_text() == "one\nzwölf \\udce9\n" and list(path.parent.iterdir()) == [path]


def test_what_was_computed_before_an_error_stays(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    with pytest.raises(KeyboardInterrupt), result_lines(path) as write:
        write("one")
        raise KeyboardInterrupt
    assert partial_of(path).read_text() == "one\n" and not path.exists()
    with result_lines(path) as write:
        write("two")
    assert path.read_text() == "two\n" and list(tmp_path.iterdir()) == [path]


def test_a_later_start_goes_on_behind_the_whole_lines(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    assert partial_lines(path) == []
    with pytest.raises(SystemExit), result_lines(path, resume=True) as write:
        write("one\u2028still one")
        raise SystemExit(EXIT_PREEMPTED)
    with partial_of(path).open("a") as stream:
        stream.write("half a li")
    assert partial_lines(path) == ["one\u2028still one"]
    with pytest.raises(KeyboardInterrupt), result_lines(path, resume=True) as write:
        raise KeyboardInterrupt
    with result_lines(path, resume=True) as write:
        write("two")
    assert path.read_text() == "one\u2028still one\ntwo\n" and list(tmp_path.iterdir()) == [path]


def test_a_stop_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(SystemExit), result_lines(tmp_path / "a" / "b" / "lines.jsonl") as write:
        write("one")
        raise SystemExit(EXIT_PREEMPTED)
    assert list(tmp_path.iterdir()) == []


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
    with (
        full_disk(10),
        pytest.raises(OSError, match=r"File too large: '.*/lines.jsonl.partial'"),
        result_lines(path) as write,
    ):
        write("a line")
        write("another line")
    assert partial_of(path).read_text() == "a line\n" and not path.exists()


def test_bad_places_are_refused_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    for name in ("file/texts", "file/a/b", "dangling/a"):
        with pytest.raises(ValueError, match="cannot be written"):
            check_writable(tmp_path / name)
    with pytest.raises(ValueError, match="is a folder; name a file"):
        check_writable(tmp_path)
    check_writable(tmp_path / "new" / "folder" / "file")
    assert {path.name for path in tmp_path.iterdir()} == {"file", "dangling"}


def test_a_place_for_something_new_is_free_and_can_be_written(tmp_path: Path) -> None:
    check_new(tmp_path / "new" / "lines.jsonl")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match="is a folder; name a file"):
        check_new(tmp_path)
    (tmp_path / "lines.jsonl").write_text("")
    with pytest.raises(ValueError, match=r"lines\.jsonl\) exists; nothing is overwritten: name a new file"):
        check_new(tmp_path / "lines.jsonl")

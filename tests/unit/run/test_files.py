"""Files that readers see whole, and damage that is named."""

from __future__ import annotations

import json
import stat
from pathlib import Path

import pytest

from megatron_dllm.run import files
from tests.full_disk import full_disk


def test_text_is_replaced_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "file"
    files.write_text(path, "old")
    files.write_text(path, "new")
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_copied_files_are_whole_or_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, target = tmp_path / "source.json", tmp_path / "target"
    source.write_text("{}")

    def interrupted(source: Path, target: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(files.shutil, "copyfile", interrupted)
        files.copy_files([source], target)
    assert not target.exists()
    files.copy_files([source], target)
    assert (target / "source.json").read_text() == "{}"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source.json", "target"]


def test_a_copy_has_neither_links_nor_permissions_of_its_source(tmp_path: Path) -> None:
    (tmp_path / "blob").write_text("{}")
    (tmp_path / "blob").chmod(0o444)
    (tmp_path / "link.json").symlink_to("blob")
    files.copy_files([tmp_path / "link.json"], tmp_path / "target")
    copy = tmp_path / "target" / "link.json"
    assert not copy.is_symlink() and copy.read_text() == "{}"
    assert copy.stat().st_mode & 0o200 and (tmp_path / "target").stat().st_mode & 0o200
    (tmp_path / "blob").unlink()
    with pytest.raises(ValueError, match=r"link\.json is a link to blob, which does not exist"):
        files.refuse_dead_link(tmp_path / "link.json")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"a": 1, "b": {"c": 1, "c": 2}}', "'c' stands there twice"),
        ("[" * 100000, "nested too deeply"),
        ("1" * 5000, "no JSON"),
        ("{", "no JSON"),
    ],
)
def test_json_that_readers_may_take_differently_is_refused(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "file.json").write_text(content)
    with pytest.raises(ValueError, match=rf"file\.json is damaged .*{message}.*; ask someone"):
        files.read_json(tmp_path / "file.json", "ask someone")


def test_a_failed_write_keeps_the_old_content_and_leaves_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "file"
    files.write_text(path, "old")
    with pytest.raises(UnicodeEncodeError):
        files.write_text(path, "\ud800")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_replaced_file_keeps_its_permissions(tmp_path: Path) -> None:
    path = tmp_path / "file"
    files.write_text(path, "old")
    path.chmod(0o640)
    files.write_text(path, "new")
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


def test_json_is_read_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "value.json"
    files.write_json(path, {"b": "\u00e9", "a": [1]}, indent=2, sort_keys=True, ensure_ascii=False)
    assert path.read_text(encoding="utf-8") == '{\n  "a": [\n    1\n  ],\n  "b": "\u00e9"\n}\n'
    assert files.read_json_object(path, "") == {"a": [1], "b": "\u00e9"}


@pytest.mark.parametrize("content", [b"{", b"\xff", b"[1]", b"null"])
def test_damaged_json_is_named_with_the_remedy(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "value.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"value\.json is damaged \(no JSON.*\); copy it again\.$"):
        files.read_json_object(path, "copy it again")
    with pytest.raises(FileNotFoundError):
        files.read_json_object(tmp_path / "nowhere.json", "copy it again")


def test_a_removed_folder_is_gone_and_a_missing_one_no_error(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    (folder / "inner").mkdir(parents=True)
    files.remove(folder)
    files.remove(folder)
    assert list(tmp_path.iterdir()) == []


def test_a_file_gets_the_permissions_it_is_given(tmp_path: Path) -> None:
    files.write_text(tmp_path / "secret", "a", mode=0o600)
    files.write_text(tmp_path / "secret", "b")
    files.write_text(tmp_path / "open", "c")
    (tmp_path / "open").chmod(0o644)
    assert (tmp_path / "secret").stat().st_mode & 0o777 == 0o600
    files.write_text(tmp_path / "open", "d", mode=0o600)
    assert (tmp_path / "open").stat().st_mode & 0o777 == 0o600


def test_a_full_disk_is_told_with_the_name_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "text"
    with full_disk(10):
        for write in (lambda: files.write_text(path, "x" * 11), lambda: files.append_line(path, "x" * 11)):
            with pytest.raises(OSError, match="File too large") as caught:
                write()
                write()  # a line may have gone in part
            assert caught.value.filename == str(path)


def test_half_written_and_foreign_lines_are_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    text = "a\u2028b\u2029c\x85d\x0be"
    whole = [json.dumps({"step": 1, "text": text}, ensure_ascii=False), "", "3", "[1]", "\x00\x00", '{"step": 2}\r']
    path.write_bytes("\n".join(whole).encode() + b'\n{"step": 3, "lo' + b"\xff")
    assert files.read_json_lines(path) == [{"step": 1, "text": text}, {"step": 2}]
    assert files.read_json_lines(tmp_path / "none.jsonl") == []

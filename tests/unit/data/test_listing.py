"""Folders of every odd kind: what is read, in which order, and what is left out for which reason."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from megatron_dllm.data.listing import list_files


@dataclass(frozen=True)
class Folder:
    """A folder to list. Paths are relative to it; contents ending in "->" of a link are its target."""

    name: str
    files: dict[str, str] = field(default_factory=dict)
    links: dict[str, str] = field(default_factory=dict)
    expected: list[str] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)


LINE, TEXT = json.dumps({"text": "a"}) + "\n", "a"
UNKNOWN = "unknown extension"
FOLDERS = [
    Folder(
        "every_extension_in_any_case",
        {n: LINE for n in ("a.jsonl", "b.NDJSON", "c.JsonLines", "d.JSON", "e.Txt", "f.MD", "g.jsonl.GZ", "h.txt.Zst")},
        expected=["a.jsonl", "b.NDJSON", "c.JsonLines", "d.JSON", "e.Txt", "f.MD", "g.jsonl.GZ", "h.txt.Zst"],
    ),
    Folder(
        "every_compression",
        {f"a.jsonl{packed}": "" for packed in (".bz2", ".gz", ".xz", ".zst")} | {"b.txt.xz": "", "c.md.bz2": ""},
        expected=["a.jsonl.bz2", "a.jsonl.gz", "a.jsonl.xz", "a.jsonl.zst", "b.txt.xz", "c.md.bz2"],
    ),
    Folder(
        "unknown_extensions",
        {n: TEXT for n in ("a.txt", "_SUCCESS", "b.csv", "c", "d.py", "e.jsonl.lz4", "f.parquet.gz", "g.txt~", "h.gz")},
        expected=["a.txt"],
        left_out={
            n: UNKNOWN for n in ("_SUCCESS", "b.csv", "c", "d.py", "e.jsonl.lz4", "f.parquet.gz", "g.txt~", "h.gz")
        },
    ),
    Folder(
        "hidden",
        {".a.txt": TEXT, ".git/b.txt": TEXT, "c/.d.jsonl": LINE, "c/e.txt": TEXT, ".txt": TEXT},
        expected=["c/e.txt"],
        left_out={".a.txt": "hidden", ".git": "hidden", ".txt": "hidden", "c/.d.jsonl": "hidden"},
    ),
    Folder(
        "sorted_by_parts",
        {"b/a.txt": TEXT, "b.txt": TEXT, "a/z.txt": TEXT, "B.txt": TEXT, "a.txt": TEXT, "b/a/c.txt": TEXT},
        expected=["B.txt", "a/z.txt", "a.txt", "b/a/c.txt", "b/a.txt", "b.txt"],
    ),
    Folder(
        "linked_file_and_folder",
        {"data/a.txt": TEXT, "../elsewhere/b.txt": TEXT, "../elsewhere/deep/c.txt": TEXT},
        {"data/linked": "../../elsewhere", "data/z.txt": "../../single"},
        expected=["data/a.txt", "data/linked/b.txt", "data/linked/deep/c.txt", "data/z.txt"],
    ),
    Folder(
        "cache_with_blobs",  # as the hub's client keeps a data set: the name is the link's, not its target's
        {"blobs/0f3a": LINE, "blobs/77b1": TEXT},
        {"snapshots/1/a.jsonl": "../../blobs/0f3a", "snapshots/1/README.md": "../../blobs/77b1"},
        expected=["snapshots/1/a.jsonl"],
        left_out={
            "blobs/0f3a": UNKNOWN,
            "blobs/77b1": UNKNOWN,
            "snapshots/1/README.md": "describes the data set beside it",
        },
    ),
    Folder("loop_to_itself", {"a.txt": TEXT}, {"b": "."}, expected=["a.txt"], left_out={"b": "the same as {}"}),
    Folder(
        "loop_to_a_folder_above",
        {"a/b/c.txt": TEXT, "d.txt": TEXT},
        {"a/b/up": "../..", "a/b/upper": "../../.."},
        expected=["a/b/c.txt", "a/b/upper/other.txt", "d.txt"],
        left_out={"a/b/up": "the same as {}", "a/b/upper/folder": "the same as {}"},
    ),
    Folder(
        "two_loops",
        {"a/x.txt": TEXT, "b/y.txt": TEXT},
        {"a/to_b": "../b", "b/to_a": "../a"},
        expected=["a/to_b/y.txt", "a/x.txt"],
        left_out={"a/to_b/to_a": "the same as {}/a", "b": "the same as {}/a/to_b"},
    ),
    Folder(
        "links_that_double",  # a path for every way through: 2^20 without a guard
        {f"{n}/a.txt": TEXT for n in range(10, 30)},
        {f"{n}/{name}": f"../{n + 1}" for n in range(10, 29) for name in ("l", "r")},
        expected=["10/a.txt"] + [f"10/{'/'.join(['l'] * n)}/a.txt" for n in range(1, 20)],
    ),
    Folder(
        "two_names_of_one_file",
        {"a.jsonl": LINE},
        {"b.jsonl": "a.jsonl", "c.txt": "a.jsonl"},
        expected=["a.jsonl"],
        left_out={"b.jsonl": "the same as {}/a.jsonl", "c.txt": "the same as {}/a.jsonl"},
    ),
    Folder(
        "chain_of_links",
        {"../elsewhere/a": TEXT},
        {"a.txt": "b", "b": "c", "c": "../elsewhere/a"},
        expected=["a.txt"],
        left_out={"b": UNKNOWN, "c": UNKNOWN},
    ),
    Folder(
        "card_and_licence_beside_records",
        {"README.md": TEXT, "LICENSE.txt": TEXT, "Readme.txt": TEXT, "data/a.jsonl": LINE, "notes.md": TEXT},
        expected=["data/a.jsonl", "notes.md"],
        left_out={n: "describes the data set beside it" for n in ("LICENSE.txt", "README.md", "Readme.txt")},
    ),
    Folder(
        "a_readme_among_texts_is_text",
        {"README.md": TEXT, "a.txt": TEXT, "b/README.md": TEXT, "c/README.md": TEXT, "c/d.jsonl": LINE},
        expected=["a.txt", "b/README.md", "c/d.jsonl"],
        left_out={n: "describes the data set beside it" for n in ("README.md", "c/README.md")},
    ),
    Folder(
        "json_that_is_no_document",
        {
            "a.json": json.dumps([{"text": "a"}, {"text": "b"}]),
            "b.json": LINE * 3,
            "c.json": json.dumps({"text": "alone"}, indent=1),
            "d.json": json.dumps({"default": {"features": {"text": "string"}}}),
            "e.json": json.dumps({"default": 1}, indent=2),
            "f.json": "3",
            "g.json": "{nonsense",
            "h.json": '[{"id": 1}]',
            "i.json": "",
        },
        expected=["a.json", "b.json", "c.json", "g.json", "h.json", "i.json"],
        left_out={
            "d.json": "a single JSON value without text: no key 'text' (it has default)",
            "e.json": "a single JSON value without text: no key 'text' (it has default)",
            "f.json": "a single JSON value without text: a JSON int, not an object",
        },
    ),
    Folder(
        "names_of_every_kind",
        {n: TEXT for n in ("a b.txt", "a,b=c.txt", "größe 字.txt", "[x].txt", "a\nb.txt", "-x.txt", "a.tar.txt")},
        expected=sorted(["a b.txt", "a,b=c.txt", "größe 字.txt", "[x].txt", "a\nb.txt", "-x.txt", "a.tar.txt"]),
    ),
    Folder(
        "folder_with_an_extension",
        {"a.jsonl/b.txt": TEXT, "c.txt/d": TEXT},
        expected=["a.jsonl/b.txt"],
        left_out={"c.txt/d": UNKNOWN},
    ),
    Folder("deep", {"/".join(["d"] * 300) + "/a.txt": TEXT}, expected=["/".join(["d"] * 300) + "/a.txt"]),
]


@pytest.mark.parametrize("case", FOLDERS, ids=lambda case: case.name)
def test_folder(tmp_path: Path, case: Folder) -> None:
    root = tmp_path / "folder"
    (tmp_path / "single").write_text(TEXT)
    for name, content in case.files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content)
    if case.name == "loop_to_a_folder_above":
        (tmp_path / "other.txt").write_text(TEXT)
        (tmp_path / "single").unlink()
    for name, target in case.links.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).symlink_to(target)
    listing = list_files([str(root)], "text")
    assert [str(path.relative_to(root)) for path in listing.files] == case.expected
    left_out = sorted(f"{root / name}: {reason.replace('{}', str(root))}" for name, reason in case.left_out.items())
    if case.name == "links_that_double":
        assert len(listing.left_out) == 19 + 19  # every `r`, and every folder but the first under its own name
    else:
        assert sorted(listing.left_out) == left_out


@pytest.mark.parametrize("target", ["gone.jsonl", "../elsewhere/gone", "/nowhere/at/all", "loop.jsonl"])
@pytest.mark.parametrize("name", ["loop.jsonl", "loop", "sub/loop.csv"])
def test_a_link_that_leads_nowhere_is_named(tmp_path: Path, name: str, target: str) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.txt").write_text(TEXT)
    (tmp_path / name).symlink_to(target)
    problem = rf"input \(.*/{name}\) is a link to {target}, which does not exist; restore that or remove the link"
    for given in (tmp_path, tmp_path / name):
        with pytest.raises(ValueError, match=problem):
            list_files([str(given)], "text")


def test_hidden_links_may_lead_nowhere(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(TEXT)
    (tmp_path / ".#a.txt").symlink_to("user@host.1234:567")  # an editor's lock
    assert [file.name for file in list_files([str(tmp_path)], "text").files] == ["a.txt"]


def test_what_is_no_regular_file_is_never_opened(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(TEXT)
    os.mkfifo(tmp_path / "b.jsonl")
    (tmp_path / "c.txt").symlink_to("/dev/zero")
    listing = list_files([str(tmp_path)], "text")
    assert [file.name for file in listing.files] == ["a.txt"]
    assert listing.left_out == [f"{tmp_path}/{name}: not a regular file" for name in ("b.jsonl", "c.txt")]
    for name in ("b.jsonl", "c.txt"):
        with pytest.raises(ValueError, match="is not a regular file; write its content to one"):
            list_files([str(tmp_path / name)], "text")


def test_unusable_inputs(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"input \(.*none\) does not exist; give files \(\.txt \.md "):
        list_files([str(tmp_path / "none")], "text")
    with pytest.raises(ValueError, match="is a folder without files"):
        list_files([str(tmp_path)], "text")
    for number in range(7):
        (tmp_path / f"{number}.csv").write_text("a,b")
    with pytest.raises(ValueError, match=r"holds no file that can be read.*0\.csv: unknown extension; .*and 2 more\.$"):
        list_files([str(tmp_path)], "text")
    with pytest.raises(
        ValueError, match=r"0\.csv\) has an unknown extension, known are .*\.parquet.*rename it to \.txt"
    ):
        list_files([str(tmp_path / "0.csv")], "text")


def test_no_file_is_read_twice(tmp_path: Path) -> None:
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text(TEXT)
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "c.txt").symlink_to("../b.txt")
    for inputs in (["a.txt", "."], [".", "a.txt"], ["sub", "b.txt"], ["a.txt", "./a.txt"]):
        with pytest.raises(ValueError, match="is named twice"):
            list_files([str(tmp_path / name) for name in inputs], "text")


def test_the_inputs_keep_their_order(tmp_path: Path) -> None:
    for name in ("z/b.txt", "z/a.txt", "m.jsonl", "a/c.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(LINE)
    listing = list_files([str(tmp_path / name) for name in ("z", "m.jsonl", "a")], "text")
    assert [str(file.relative_to(tmp_path)) for file in listing.files] == ["z/a.txt", "z/b.txt", "m.jsonl", "a/c.txt"]

"""Folders that are complete or absent, and the newest of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_dllm.checkpoint import folder as folders
from megatron_dllm.checkpoint.manifest import check_complete, damaged_files, is_complete, read_json
from megatron_dllm.checkpoint.retention import retire
from megatron_dllm.run.names import CONTRACT, LATEST, MANIFEST, STATE
from tests.unit.checkpoint.small_checkpoint import make_checkpoint, steps_in


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def _alter(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[50] ^= 1
    path.write_bytes(bytes(content))


def test_published_checkpoint_is_complete_and_latest(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, 7)
    assert is_complete(folder)
    assert (tmp_path / LATEST).read_text() == "step_0000007\n"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step_0000007"]


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (Path.unlink, "__0_0.distcp is missing"),
        (_truncate, "has 99 bytes instead of 100"),
        (_alter, "does not have the checksum it was written with"),
    ],
)
def test_damage_is_named(tmp_path: Path, damage, words: str) -> None:
    folder = make_checkpoint(tmp_path, 1)
    damage(folder / "__0_0.distcp")
    manifest = read_json(folder / MANIFEST)
    problems = damaged_files(folder, manifest, manifest)
    assert len(problems) == 1
    assert words in problems[0]
    assert str(folder) in problems[0]
    if damage is not _alter:  # sizes are looked at everywhere, contents when loading
        assert not is_complete(folder)
        with pytest.raises(ValueError, match="is damaged"):
            check_complete(folder)


@pytest.mark.parametrize("name", [CONTRACT, STATE])
def test_altered_descriptions_are_seen_without_reading_the_tensors(tmp_path: Path, name: str) -> None:
    good, folder = make_checkpoint(tmp_path, 1), make_checkpoint(tmp_path, 2)
    _alter(folder / name)
    with pytest.raises(ValueError, match=f"{name} does not have the checksum it was written with"):
        check_complete(folder)
    assert folders.latest_checkpoint(tmp_path) == good
    assert retire(tmp_path, keep_last=1, keep_best=0, keep_every=0) == []


@pytest.mark.parametrize("content", ["[]", '{"contract.json": 5}', '{"__0_0.distcp": {"size": 100, "sha256": "0"}}'])
def test_manifest_of_another_shape_is_damage(tmp_path: Path, content: str) -> None:
    (make_checkpoint(tmp_path, 1) / MANIFEST).write_text(content)
    with pytest.raises(ValueError, match=r"manifest.json is damaged"):
        check_complete(tmp_path / "step_0000001")


def test_folder_without_manifest_is_not_complete(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, 1)
    (folder / MANIFEST).unlink()
    assert not is_complete(folder)
    with pytest.raises(ValueError, match=r"manifest.json is missing.*there is no older one"):
        folders.resolve_checkpoint(tmp_path)
    with pytest.raises(ValueError, match="no complete checkpoint"):
        folders.resolve_checkpoint(tmp_path / "nowhere")


def test_latest_passes_over_incomplete_folders(tmp_path: Path) -> None:
    good = make_checkpoint(tmp_path, 1)
    (make_checkpoint(tmp_path, 2) / "__0_0.distcp").unlink()
    assert folders.latest_checkpoint(tmp_path) == good
    # A resume falls back and says so; what a user asks for by the run's name is the newest or nothing.
    with pytest.raises(ValueError, match=r"step_0000002 is the newest .*__0_0.distcp is missing.*is .*step_0000001"):
        folders.resolve_checkpoint(tmp_path)
    assert folders.resolve_checkpoint(good) == good
    assert folders.latest_checkpoint(tmp_path / "nowhere") is None


def test_publishing_again_replaces(tmp_path: Path) -> None:
    first = make_checkpoint(tmp_path, 3)
    (first / "of_the_first").touch()
    assert make_checkpoint(tmp_path, 3) == first
    assert not (first / "of_the_first").exists()
    assert steps_in(tmp_path) == [3]


def test_set_aside_counts_no_more(tmp_path: Path) -> None:
    good, bad = make_checkpoint(tmp_path, 1), make_checkpoint(tmp_path, 2)
    for _ in range(2):
        aside = folders.set_aside(bad)
        assert aside.name == "damaged-step_0000002"
        assert folders.latest_checkpoint(tmp_path) == good
        make_checkpoint(tmp_path, 2)


def test_leftovers_are_cleaned(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, 1)
    (tmp_path / ".tmp-step_0000002").mkdir()
    (tmp_path / ".tmp-step_0000002" / "__0_0.distcp").touch()
    (tmp_path / ".tmp-latest.123").touch()
    assert len(folders.clean_temporary(tmp_path)) == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step_0000001"]

"""The recorded commit is that of the code that runs, or none."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from megatron_dllm.run import code_version


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=test", "-c", "user.email=test@localhost"]
    return subprocess.run(
        ["git", "-C", str(folder), *identity, *arguments], capture_output=True, text=True, check=True
    ).stdout.strip()


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout with one commit, taken for the project's."""
    (tmp_path / "code.py").write_text("value = 1\n")
    for words in (["init", "-q"], ["add", "."], ["commit", "-qm", "first"]):
        git(tmp_path, *words)
    monkeypatch.setattr(code_version, "ROOT", tmp_path)
    return tmp_path


def test_a_checkout_tells_its_commit_and_what_differs(checkout: Path) -> None:
    head = git(checkout, "rev-parse", "HEAD")
    assert code_version.code_state() == head + "\n" and code_version.commit() == head
    (checkout / "code.py").write_text("value = 2\n")
    assert "+value = 2" in code_version.code_state() and code_version.commit() == head + "-dirty"


def test_code_inside_somebody_elses_checkout_is_not_that_checkouts(
    checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inside = checkout / "runs" / "code_1234"
    inside.mkdir(parents=True)
    monkeypatch.setattr(code_version, "ROOT", inside)
    assert code_version.code_state() == "no git repository\n" and code_version.commit() is None
    (inside / code_version.FROZEN_STATE).write_text("abc\n")
    assert code_version.code_state() == "abc\n" and code_version.commit() == "abc"


def test_a_machine_without_git_is_no_error(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(checkout / "nowhere"))
    assert code_version.commit() is None

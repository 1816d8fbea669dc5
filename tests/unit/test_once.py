"""A folder that the workers of a session share is made by the first who asks."""

from __future__ import annotations

import multiprocessing
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.once import make_once


@dataclass(frozen=True)
class Worker:
    """As far as `make_once` asks it, pytest's factory of temporary folders in one worker."""

    folder: Path

    def getbasetemp(self) -> Path:
        self.folder.mkdir(exist_ok=True)
        return self.folder


def _make_slowly(folder: Path) -> None:
    time.sleep(0.3)
    (folder / "made").write_text("whole")


def _ask(worker: Worker, seen: multiprocessing.SimpleQueue[str]) -> None:
    seen.put((make_once(worker, "run", _make_slowly) / "made").read_text())


def test_workers_share_what_the_first_has_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTEST_XDIST_WORKER", "gw0")
    made: list[Path] = []
    folders = [make_once(Worker(tmp_path / name), "run", made.append) for name in ("gw0", "gw1", "gw0")]
    assert folders == [tmp_path / "run"] * 3
    assert made == [tmp_path / "run"]


def test_a_session_without_workers_keeps_it_to_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)
    assert make_once(Worker(tmp_path / "base"), "run", lambda folder: None) == tmp_path / "base" / "run"


def test_what_could_not_be_made_is_not_taken_for_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)

    def fail(folder: Path) -> None:
        raise RuntimeError("no room")

    for error in (RuntimeError, FileExistsError):
        with pytest.raises(error):
            make_once(Worker(tmp_path / "base"), "run", fail)


@pytest.mark.ranks
def test_who_asks_meanwhile_waits_for_the_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTEST_XDIST_WORKER", "gw0")
    context = multiprocessing.get_context("fork")
    seen: multiprocessing.SimpleQueue[str] = context.SimpleQueue()
    processes = [context.Process(target=_ask, args=(Worker(tmp_path / f"gw{n}"), seen)) for n in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert [seen.get() for _ in processes] == ["whole"] * 3

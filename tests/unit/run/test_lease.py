from __future__ import annotations

import multiprocessing
from pathlib import Path

import pytest

from megatron_dllm.run.lease import LEASE_VARIABLE, Lease, LeaseLost, newest_generation


def test_a_newer_attempt_supersedes_the_older(tmp_path: Path) -> None:
    first = Lease.acquire(tmp_path)
    first.check()
    second = Lease.acquire(tmp_path)
    assert second.generation == first.generation + 1
    second.check()
    with pytest.raises(LeaseLost, match=r"generation \(1\) .* superseded by 2"):
        first.check()
    assert not first.is_current() and second.is_current()


def test_a_process_adopts_what_its_launcher_acquired(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outer = Lease.take_next(tmp_path)
    monkeypatch.setenv(LEASE_VARIABLE, str(outer.generation))
    assert Lease.acquire(tmp_path) == outer
    Lease.take_next(tmp_path)
    with pytest.raises(LeaseLost):
        Lease.acquire(tmp_path)


@pytest.mark.parametrize("hidden", ["current", "generation_000002"])
def test_either_file_is_enough_to_notice(tmp_path: Path, hidden: str) -> None:
    """A network file system may show one of the two late."""
    first = Lease.take_next(tmp_path)
    old = (tmp_path / "lease" / "current").read_text()
    Lease.take_next(tmp_path)
    if hidden == "current":
        (tmp_path / "lease" / hidden).write_text(old)
    else:
        (tmp_path / "lease" / hidden).unlink()
    with pytest.raises(LeaseLost):
        first.check()


def _take(folder: Path, results: multiprocessing.Queue[int]) -> None:
    for _ in range(20):
        results.put(Lease.take_next(folder).generation)


@pytest.mark.ranks
def test_generations_are_never_given_twice(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    results: multiprocessing.Queue[int] = context.Queue()
    processes = [context.Process(target=_take, args=(tmp_path, results)) for _ in range(4)]
    for process in processes:
        process.start()
    taken = sorted(results.get(timeout=20) for _ in range(80))
    for process in processes:
        process.join()
    assert taken == list(range(1, 81))
    assert newest_generation(tmp_path / "lease") == 80


def test_an_attempt_that_ended_before_its_number_was_announced_is_passed_over(tmp_path: Path) -> None:
    (tmp_path / "lease").mkdir()
    (tmp_path / "lease" / "generation_000001").touch()
    assert newest_generation(tmp_path / "lease") == 1
    assert Lease.take_next(tmp_path).generation == 2

"""The tool that the other tests here stand on: results by rank, failures with their traceback, no hang."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.ranks import lead_session, run_ranks


def _sum_of_ranks(offset: int) -> tuple[int, float]:
    torch.distributed.init_process_group("gloo")
    value = torch.tensor(float(torch.distributed.get_rank() + offset))
    torch.distributed.all_reduce(value)
    return torch.distributed.get_rank(), value.item()


def _fail_on_rank_one() -> None:
    if os.environ["RANK"] == "1":
        raise KeyError("the reason")
    time.sleep(60)


def _exit_without_result() -> None:
    os._exit(3)


def _sleep_for_ever() -> None:
    time.sleep(600)


def test_results_come_back_by_rank() -> None:
    assert run_ranks(_sum_of_ranks, 2, 10) == [(0, 21.0), (1, 21.0)]


def test_a_failing_rank_shows_its_traceback_and_ends_the_others() -> None:
    start = time.monotonic()
    with pytest.raises(RuntimeError, match=r"(?s)rank 1 of 2 failed.*_fail_on_rank_one.*the reason"):
        run_ranks(_fail_on_rank_one, 2)
    assert time.monotonic() - start < 50


def test_a_rank_that_dies_is_named() -> None:
    with pytest.raises(RuntimeError, match=r"rank 0 of 1 failed.*\n.*exit code 3"):
        run_ranks(_exit_without_result, 1)


def _start_a_child_and_hang(folder: Path) -> None:
    lead_session()
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    (folder / "pids").write_text(f"{os.getpid()} {child.pid}")
    time.sleep(600)


def _test_run(folder: Path) -> None:
    multiprocessing.get_context("fork").Process(target=_start_a_child_and_hang, args=(folder,)).start()
    time.sleep(600)


def test_a_killed_test_run_takes_its_ranks_and_their_children_with_it(tmp_path: Path) -> None:
    run = multiprocessing.get_context("fork").Process(target=_test_run, args=(tmp_path,))
    run.start()
    pids = _wait_for(lambda: (tmp_path / "pids").exists() and (tmp_path / "pids").read_text().split())
    try:
        assert pids and all(_is_alive(pid) for pid in pids)
    finally:
        run.kill()
        run.join()
    assert _wait_for(lambda: not any(_is_alive(pid) for pid in pids))


def _wait_for(condition: Callable[[], Any], timeout_s: float = 60.0) -> Any:
    deadline = time.monotonic() + timeout_s
    while not (value := condition()) and time.monotonic() < deadline:
        time.sleep(0.05)
    return value


def _is_alive(pid: str) -> bool:
    """Whether the process runs; one that has ended and was not asked for its exit code does not."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def test_a_rank_that_hangs_shows_where_it_stands() -> None:
    with pytest.raises(TimeoutError, match=r"(?s)ranks \[0\].*_sleep_for_ever"):
        run_ranks(_sleep_for_ever, 1, timeout_s=12.0)

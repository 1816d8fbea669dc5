"""The tool that the other tests here stand on: results by rank, failures with their traceback, no hang."""

from __future__ import annotations

import os
import time

import pytest
import torch

from tests.distributed.ranks import run_ranks


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


def test_a_rank_that_hangs_shows_where_it_stands() -> None:
    with pytest.raises(TimeoutError, match=r"(?s)ranks \[0\].*_sleep_for_ever"):
        run_ranks(_sleep_for_ever, 1, timeout_s=12.0)

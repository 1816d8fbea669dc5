from __future__ import annotations

import signal
from pathlib import Path

import pytest

from launch.ending import ending_of
from launch.failure import collect_failure, overall_code
from megatron_dllm.run.exit_codes import EXIT_FENCED, EXIT_LAYOUT, EXIT_NON_FINITE, EXIT_PREEMPTED
from megatron_dllm.run.files import write_json

HOSTS = ["node1", "node2"]


def ranks(
    attempt: Path, codes: dict[int, int], logs: dict[int, str] | None = None, order: list[int] | None = None
) -> None:
    """Exit records of ranks, two a node, ended in the given order."""
    for rank, code in codes.items():
        ended = float((order or sorted(codes)).index(rank))
        write_json(
            attempt / f"exit_{rank:05d}.json",
            {"rank": rank, "host": HOSTS[rank // 2], "code": code, "began": 0.0, "ended": ended},
        )
        (attempt / f"rank_{rank:05d}.log").write_text((logs or {}).get(rank, "working\n"))


def test_orderly_ends_have_one_code(tmp_path: Path) -> None:
    for code, how in ((0, "finished"), (EXIT_PREEMPTED, "stopped"), (EXIT_LAYOUT, "layout")):
        ranks(tmp_path, dict.fromkeys(range(4), code))
        assert ending_of(tmp_path, HOSTS, 4, None, False).how == how
    ranks(tmp_path, {0: EXIT_FENCED, 1: -9, 2: -9, 3: EXIT_FENCED})
    assert ending_of(tmp_path, HOSTS, 4, None, False).code == -9


def test_the_rank_with_a_reason_of_its_own_is_named_before_those_that_lost_it(tmp_path: Path) -> None:
    lost = "Traceback ...\nRuntimeError: [gloo] Connection closed by peer\n"
    ranks(
        tmp_path,
        {0: 1, 1: 1, 2: 1, 3: -signal.SIGTERM},
        {0: lost, 1: lost, 2: "line 1\nValueError: the cause\n"},
        order=[0, 1, 2, 3],
    )
    ending = ending_of(tmp_path, HOSTS, 4, None, False)
    assert ending.how == "crashed" and "rank 2 on node2: exit code 1" in ending.reason
    text = (tmp_path / "failure.txt").read_text()
    assert "ValueError: the cause" in text and text.startswith("rank 2 on node2")


@pytest.mark.parametrize("order", [[1, 0, 2], [0, 2, 1]])
def test_a_killed_rank_is_named_before_those_that_lost_it(tmp_path: Path, order: list[int]) -> None:
    lost = "RuntimeError: [gloo] Connection closed by peer\n"
    ranks(tmp_path, {0: 1, 1: -signal.SIGKILL, 2: -signal.SIGTERM}, {0: lost, 1: "step 4\n"}, order)
    reason = ending_of(tmp_path, HOSTS, 4, None, False).reason
    assert "rank 1 on node1: killed by SIGKILL" in reason
    ranks(tmp_path, {0: 1, 1: -signal.SIGKILL, 2: 1}, {0: lost, 1: "step 4\n", 2: "ValueError: the cause\n"}, [0, 2, 1])
    assert "rank 2 on node2: exit code 1" in ending_of(tmp_path, HOSTS, 4, None, False).reason


def test_a_node_without_a_sign_is_named(tmp_path: Path) -> None:
    ranks(tmp_path, {0: 1, 1: 1})
    assert "no sign of node2" in ending_of(tmp_path, HOSTS, 4, None, False).reason
    (tmp_path / "exit_00000.json").unlink()
    (tmp_path / "exit_00001.json").unlink()
    (tmp_path / "srun.log").write_text("srun: error: Node failure on node2\n")
    ending = ending_of(tmp_path, HOSTS, 4, None, False)
    assert ending.how == "crashed" and "srun: error: Node failure on node2" in ending.reason and ending.code is None
    assert ending_of(tmp_path, HOSTS, 4, None, True).how == "terminated"


def test_what_a_restart_repeats_is_told_apart(tmp_path: Path) -> None:
    ranks(tmp_path, {0: EXIT_NON_FINITE, 1: EXIT_NON_FINITE, 2: -9, 3: 1}, {3: "ConnectionError: peer\n"})
    assert ending_of(tmp_path, HOSTS, 4, None, False).how == "non_finite"
    assert overall_code([{"code": 1, "ended": 0}, {"code": EXIT_NON_FINITE, "ended": 1}], 2) == EXIT_NON_FINITE
    ranks(tmp_path, dict.fromkeys(range(4), 2), {0: "ERROR model.hidden_size (3) must ...\n"})
    ending = ending_of(tmp_path, HOSTS, 4, None, False)
    assert ending.how == "refused" and "model.hidden_size (3)" in ending.reason


def test_nothing_is_collected_where_nothing_failed(tmp_path: Path) -> None:
    ranks(tmp_path, dict.fromkeys(range(4), 0))
    assert collect_failure(tmp_path) is None and not (tmp_path / "failure.txt").exists()

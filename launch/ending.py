"""How an attempt at a job ended, in one word for the policy and one sentence for people."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch import slurm
from launch.failure import collect_failure, describe_code, exit_records, overall_code, root_cause
from launch.record import last_lines
from megatron_dllm.run.exit_codes import EXIT_FENCED, EXIT_LAYOUT, EXIT_NON_FINITE, EXIT_PREEMPTED, EXIT_REFUSED


@dataclass(frozen=True)
class Ending:
    """How an attempt ended.

    Args:
        how: finished, layout, stopped, fenced, crashed, vanished, overran, terminated, refused or non_finite.
        reason: the sentence.
        code: exit code of the whole, None where ranks left no record.
    """

    how: str
    reason: str
    code: int | None = None


_ON_PURPOSE = {
    0: ("finished", "all ranks finished"),
    EXIT_FENCED: ("fenced", "a newer attempt at this run holds its folder"),
    EXIT_PREEMPTED: ("stopped", "saved and stopped on request"),
    EXIT_LAYOUT: ("layout", "saved; the next stage of the schedule has another layout"),
}


def ending_of(attempt: Path, hosts: Sequence[str], ranks: int, forced: str | None, is_stopping: bool) -> Ending:
    """Judge an attempt whose processes have ended.

    Args:
        attempt: its folder, with exit records and logs; failure.txt is written there.
        hosts: nodes it ran on, in order of ranks.
        ranks: processes it had.
        forced: why the launcher ended it by force, or None.
        is_stopping: whether it had been asked to stop.
    """
    records = exit_records(attempt)
    code = overall_code(records, ranks)
    if code in _ON_PURPOSE:
        return Ending(*_ON_PURPOSE[code], code)
    if forced:
        return Ending("overran", forced, code)
    per_node = max(ranks // len(hosts), 1)
    told = {entry["rank"] // per_node for entry in records}
    silent = " and ".join(host for number, host in enumerate(hosts) if number not in told)
    worst = root_cause(attempt, records)
    if worst is None:
        tail = " | ".join(last_lines(attempt / "srun.log", 3))
        return Ending(
            "terminated" if is_stopping else "crashed",
            f"ranks on {silent or 'some nodes'} ended without a record; srun said: {tail or 'nothing'}",
            code,
        )
    collect_failure(attempt)
    where = f"rank {worst['rank']} on {worst['host']}: {describe_code(worst['code'])}; see {attempt / 'failure.txt'}"
    if worst["code"] == EXIT_NON_FINITE:
        return Ending("non_finite", where, code)
    if all(entry["code"] == EXIT_REFUSED for entry in records) and not silent:
        words = last_lines(attempt / "rank_00000.log", 1)
        return Ending("refused", f"{words[0] if words else 'no message'}; see {attempt / 'failure.txt'}", code)
    if silent:
        where = f"no sign of {silent} when the run broke (lost or hanging); {where}"
    return Ending("crashed", where, code)


def ending_of_silent(previous: dict[str, Any], events: Sequence[dict[str, Any]]) -> Ending:
    """What can be told of an older attempt whose supervisor wrote no end.

    Args:
        previous: its `start` event.
        events: everything since.
    """
    lost = slurm.lost_nodes(previous["nodes"])
    stops = [event["signal"] for event in events if event["event"] == "stop"]
    if lost:
        return Ending("vanished", "lost its node: " + "; ".join(lost))
    if stops:
        return Ending("terminated", f"ended by SLURM ({stops[0]}) before its ranks had stopped")
    return Ending(
        "vanished",
        "ended without a word: a node or its daemon failed, or the job was killed; its nodes "
        f"were {', '.join(previous['nodes'])}",
    )

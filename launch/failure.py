"""Which rank failed first and what it said last, gathered from the ranks' exit records and logs into one place."""

from __future__ import annotations

import re
import signal
from pathlib import Path
from typing import Any

from launch.record import last_lines, read_json
from megatron_dllm.run.exit_codes import EXIT_FENCED, EXIT_LAYOUT, EXIT_NON_FINITE, EXIT_PREEMPTED

# After one rank has failed the others get this long to end by themselves and write why.
FAILURE_GRACE_SECONDS = 15.0
# Codes with which a rank ends on purpose.
ORDERLY = (0, EXIT_PREEMPTED, EXIT_LAYOUT, EXIT_FENCED)
# A rank that the launcher ended because another had failed is not the cause. SIGKILL is one: where the launcher sends
# it, the rank's wrapper ends too and writes no record; with a record, the kernel (out of memory) or a person sent it.
_ENDED_BY_LAUNCHER = -signal.SIGTERM


def exit_records(attempt_folder: Path) -> list[dict[str, Any]]:
    """The exit records of one attempt, by time of end."""
    found = [read_json(path) for path in attempt_folder.glob("exit_*.json")]
    return sorted((entry for entry in found if entry), key=lambda entry: entry["ended"])


def failed_first(records: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The first rank that failed by itself, or else the first that the launcher ended; None if none failed."""
    failed = [entry for entry in records if entry["code"] not in ORDERLY]
    by_itself = [entry for entry in failed if entry["code"] != _ENDED_BY_LAUNCHER]
    return next(iter(by_itself or failed), None)


# What ranks say when another one has gone: true, but not the cause.
_SECOND_HAND = re.compile(
    r"Connection (reset|closed|refused)|connection was closed|ConnectionError|Broken pipe|"
    r"peer|NCCL|gloo|DistBackendError|timed? ?out",
    re.IGNORECASE,
)


def root_cause(attempt_folder: Path, records: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The record of the rank that failed for a reason of its own, as far as the last words tell; None if none failed.

    Ranks that lose their peer end within moments of it, in any order; one that was killed had no last words to say.
    """
    first = failed_first(records)
    for entry in records:
        if entry["code"] in ORDERLY or entry["code"] == _ENDED_BY_LAUNCHER:
            continue
        if entry["code"] == -signal.SIGKILL:
            return entry
        words = last_lines(attempt_folder / f"rank_{entry['rank']:05d}.log", 2)
        if words and not _SECOND_HAND.search(words[-1]):
            return entry
    return first


def overall_code(records: list[dict[str, Any]], ranks: int) -> int | None:
    """One code for an attempt: the failure's, else fenced, preempted, another layout, or 0; None where records lack."""
    failure = failed_first(records)
    if failure:
        return next((EXIT_NON_FINITE for entry in records if entry["code"] == EXIT_NON_FINITE), int(failure["code"]))
    codes = {entry["code"] for entry in records}
    for code in (EXIT_FENCED, EXIT_PREEMPTED, EXIT_LAYOUT):
        if code in codes:
            return code
    return 0 if len(records) == ranks else None


def describe_code(code: int) -> str:
    """An exit code in words."""
    if code == EXIT_NON_FINITE:
        return "the loss or gradient norm was not finite"
    if code < 0:
        return f"killed by {signal.Signals(-code).name}"
    return f"exit code {code}"


def collect_failure(attempt_folder: Path, count: int = 40) -> str | None:
    """Write ATTEMPT/failure.txt: the failing rank, its host, and the last lines of its log.

    Returns:
        Its text, or None if no rank failed.
    """
    failure = root_cause(attempt_folder, exit_records(attempt_folder))
    if failure is None:
        return None
    rank = failure["rank"]
    path = attempt_folder / f"rank_{rank:05d}.log"
    text = (
        "\n".join(
            [
                f"rank {rank} on {failure['host']}: {describe_code(failure['code'])}; last lines of {path}:",
                *last_lines(path, count),
            ]
        )
        + "\n"
    )
    (attempt_folder / "failure.txt").write_text(text, encoding="utf-8")
    return text

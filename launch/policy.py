"""Whether a job that has ended is started again: a pure function of its events.

Orderly stops (time limit, preemption) are always continued. Crashes are continued as long as checkpoints advance:
a number of crashes in a row without a new one, or too many in all, end it. A new submission starts counting afresh.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import dropwhile
from typing import Any

# Ends of an attempt that count as crashes. `vanished`: nothing was written at all, as when the node itself is lost.
CRASHES = ("crashed", "vanished", "overran")


@dataclass(frozen=True)
class Verdict:
    """Start again or not, and the sentence for people."""

    again: bool
    reason: str


def since_submission(events: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The events from the first start after the last submission on: the end of an older attempt may be written late."""
    places = [number for number, event in enumerate(events) if event["event"] == "submitted"]
    return list(dropwhile(lambda event: event["event"] != "start", events[places[-1] + 1 :] if places else events))


def count_crashes(events: Sequence[dict[str, Any]]) -> tuple[int, int]:
    """Crashes since the last new checkpoint, and in all."""
    in_a_row = in_all = 0
    checkpoint = None
    for event in events:
        if event["event"] == "start":
            checkpoint = event.get("checkpoint")
        elif event["event"] == "end":
            is_crash = event["how"] in CRASHES
            in_a_row = in_a_row + is_crash if event.get("checkpoint") == checkpoint else 0
            in_all += is_crash
    return in_a_row, in_all


def judge(events: Sequence[dict[str, Any]], max_without_progress: int, max_crashes: int) -> Verdict:
    """Judge the last end.

    Args:
        events: of the job; an `end` has `how` and `checkpoint` (the newest one then).
        max_without_progress: crashes in a row without a new checkpoint at which it stays down.
        max_crashes: crashes in all at which it stays down.
    """
    seen = since_submission(events)
    in_a_row, in_all = count_crashes(seen)
    how = next((event["how"] for event in reversed(seen) if "how" in event), None)
    if how == "non_finite":
        return Verdict(False, "not started again: the loss or gradient norm was not finite, and a restart repeats it")
    if how == "refused":
        return Verdict(False, "not started again: the run was refused, and a restart repeats that")
    if how not in CRASHES:
        return Verdict(True, "continues")
    if in_a_row >= max_without_progress:
        return Verdict(
            False,
            f"not started again: {in_a_row} crashes without a new checkpoint (the limit is "
            f"requeue.max_crashes_without_progress = {max_without_progress})",
        )
    if in_all >= max_crashes:
        return Verdict(
            False, f"not started again: {in_all} crashes in all (the limit is requeue.max_crashes = {max_crashes})"
        )
    return Verdict(
        True,
        f"started again: crash {in_all} of at most {max_crashes}, {in_a_row} of at most "
        f"{max_without_progress} without a new checkpoint",
    )

from __future__ import annotations

from typing import Any

from launch.policy import judge


def start(checkpoint: str | None) -> dict[str, Any]:
    return {"event": "start", "checkpoint": checkpoint}


def end(how: str, checkpoint: str | None) -> dict[str, Any]:
    return {"event": "end", "how": how, "checkpoint": checkpoint}


def crashes(*checkpoints: str | None) -> list[dict[str, Any]]:
    """Crash after crash; entry i is the newest checkpoint at the end of attempt i."""
    seen: list[dict[str, Any]] = []
    before = None
    for checkpoint in checkpoints:
        seen += [start(before), end("crashed", checkpoint)]
        before = checkpoint
    return seen


def test_three_crashes_in_a_row_without_progress_end_it() -> None:
    assert judge(crashes(None, None), 3, 20).again
    assert not judge(crashes(None, None, None), 3, 20).again


def test_progress_starts_the_count_again() -> None:
    assert judge(crashes(None, None, "step_1", "step_1", "step_1"), 3, 20).again
    assert not judge(crashes(None, None, "step_1", "step_1", "step_1", "step_1"), 3, 20).again


def test_crashes_with_progress_are_bounded_too() -> None:
    seen = crashes(*[f"step_{n}" for n in range(5)])
    assert judge(seen, 3, 6).again
    assert not judge(seen, 3, 5).again


def test_orderly_stops_always_continue_and_do_not_count() -> None:
    seen = [start(None), end("stopped", "step_1")] * 50
    assert judge(seen, 1, 1).again
    assert judge([*seen, *crashes(None, None)], 3, 20).again


def test_a_new_submission_counts_afresh() -> None:
    seen = [*crashes(None, None, None), {"event": "gave_up"}, {"event": "submitted"}]
    assert judge(seen, 3, 20).again
    assert judge([*seen, *crashes(None)], 3, 20).again


def test_a_loss_that_is_not_finite_is_never_tried_again() -> None:
    verdict = judge([start(None), end("non_finite", "step_9")], 3, 20)
    assert not verdict.again and "not finite" in verdict.reason


def test_a_late_signal_after_the_end_changes_nothing() -> None:
    seen = [*crashes(None, None, None), {"event": "stop", "signal": "SIGTERM"}]
    assert not judge(seen, 3, 20).again


def test_an_end_written_after_a_new_submission_belongs_to_the_old_one() -> None:
    assert judge([start(None), {"event": "submitted"}, end("vanished", None)], 1, 1).again

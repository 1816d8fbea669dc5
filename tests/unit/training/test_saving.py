"""When a checkpoint is due, and why."""

from __future__ import annotations

import pytest

from megatron_dllm.training.saving import SaveReason, reason_to_save


@pytest.mark.parametrize(
    "interval, before, after, is_stage_end, must_stop, expected",
    [
        (600, 100, 500, False, False, None),
        (600, 500, 600, False, False, SaveReason(False, True, 1)),
        (600, 500, 1900, False, False, SaveReason(False, True, 3)),
        (600, 100, 500, True, False, SaveReason(True, True, None)),
        (600, 500, 700, True, True, SaveReason(True, True, 1)),
        # A request to stop saves, and leaves no time for a validation.
        (600, 100, 500, False, True, SaveReason(False, False, None)),
        (0, 100, 5000, False, False, None),
        (0, 100, 5000, True, False, SaveReason(True, True, None)),
    ],
)
def test_reasons(
    interval: int, before: int, after: int, is_stage_end: bool, must_stop: bool, expected: SaveReason | None
) -> None:
    arguments = {"is_stage_end": is_stage_end, "must_stop": must_stop}
    assert reason_to_save(interval, before, after, **arguments, has_validation=True) == expected
    without = reason_to_save(interval, before, after, **arguments, has_validation=False)
    assert without == (expected and SaveReason(expected.is_stage_end, False, expected.save_number))

"""Numbers of records, and lines that are drawn only where there are records."""

from __future__ import annotations

import math

import numpy as np

from megatron_dllm.reporting.records import broken_line, is_logged, numbers


def test_what_is_no_number_is_nan() -> None:
    records = [{"a": 1}, {"a": 2.5}, {}, {"a": None}, {"a": "3"}, {"a": True}, {"a": math.inf}]
    assert np.array_equal(numbers(records, "a"), [1, 2.5, *[math.nan] * 4, math.inf], equal_nan=True)
    assert is_logged(records, "a")
    assert not is_logged(records[2:], "a")  # what is not finite cannot be drawn


def segments(records: list[dict[str, object]], width: int = 1, is_apart_by_stage: bool = True) -> list[list[float]]:
    """Values of each piece of the line."""
    across, values = broken_line(records, "step", "y", width, is_apart_by_stage)
    assert np.array_equal(np.isnan(across), np.isnan(values))
    pieces: list[list[float]] = [[]]
    for value in values.tolist():
        pieces = [*pieces, []] if math.isnan(value) else [*pieces[:-1], [*pieces[-1], value]]
    return [piece for piece in pieces if piece]


def test_a_line_is_broken_where_there_is_nothing() -> None:
    steps = [4, 8, 12, 13, 16, 60, 64, 68]
    records: list[dict[str, object]] = [
        {"step": step, "stage": "a" if step < 64 else "b", "y": float(step)} for step in steps
    ]
    del records[1]["y"]
    assert segments(records) == [[4.0], [12.0, 13.0, 16.0], [60.0], [64.0, 68.0]]
    assert segments(records, is_apart_by_stage=False) == [[4.0], [12.0, 13.0, 16.0], [60.0, 64.0, 68.0]]
    assert segments([{"step": 1}]) == segments([]) == []


def test_a_running_mean_ends_at_a_break() -> None:
    records: list[dict[str, object]] = [{"step": n, "y": y} for n, y in enumerate([1.0, 2.0, 6.0, None, 7.0, 9.0])]
    assert segments(records, width=3) == [[1.5, 3.0, 4.0], [8.0, 8.0]]

"""Numbers in the records that a run wrote, with nothing where there is nothing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Record = dict[str, Any]
# A series with a hole of more than so many logging intervals is drawn as two.
_LONGEST_STEP = 3.0


def number(value: object) -> float:
    """The value as a number; NaN where it is none."""
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan


def numbers(records: Sequence[Record], key: str) -> NDArray[np.float64]:
    """[n] the number called `key` of every record, NaN where a record has none."""
    return np.array([number(record.get(key)) for record in records], dtype=np.float64)


def is_logged(records: Sequence[Record], key: str) -> bool:
    """Whether any record has the number."""
    return bool(np.isfinite(numbers(records, key)).any())


def broken_line(
    records: Sequence[Record], across: str, key: str, width: int = 1, is_apart_by_stage: bool = True
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """A line through the records, broken where `key` is missing, where records are missing and where a stage ends.

    Args:
        records: in order, each with its step.
        across: number along the horizontal axis.
        key: number along the vertical axis.
        width: records that a value is averaged over, as many before as behind it, all between the same two breaks.
        is_apart_by_stage: whether the end of a stage breaks the line.

    Returns:
        Two arrays of one length for a plot; NaN in both breaks the line.
    """
    horizontal, vertical = numbers(records, across), numbers(records, key)
    parts = [[math.nan, math.nan]]
    for start, end in _unbroken(records, np.isfinite(vertical), is_apart_by_stage):
        means = _running_mean(vertical[start:end], width)
        parts += [*np.stack([horizontal[start:end], means], axis=1).tolist(), [math.nan, math.nan]]
    line = np.array(parts)
    return line[:, 0], line[:, 1]


def _unbroken(records: Sequence[Record], is_there: NDArray[np.bool_], is_apart_by_stage: bool) -> list[tuple[int, int]]:
    """(start, end) of the longest runs of records without a break.

    Args:
        records: in order.
        is_there: [n] whether a record has the value.
        is_apart_by_stage: whether the end of a stage is a break.
    """
    gaps = np.diff(numbers(records, "step"))
    usual = float(np.median(gaps)) if len(gaps) else 0.0
    spans: list[tuple[int, int]] = []
    for index in np.flatnonzero(is_there).tolist():
        is_next = bool(spans) and spans[-1][1] == index and not gaps[index - 1] > _LONGEST_STEP * usual
        if is_next and is_apart_by_stage:
            is_next = records[index].get("stage") == records[index - 1].get("stage")
        if is_next:
            spans[-1] = (spans[-1][0], index + 1)
        else:
            spans.append((index, index + 1))
    return spans


def _running_mean(values: NDArray[np.float64], width: int) -> NDArray[np.float64]:
    """[n] mean of up to `width` values around each, fewer towards the ends.

    Args:
        values: [n] finite.
        width: an odd number.
    """
    window = np.ones(width)
    counts = np.convolve(np.ones(len(values)), window)
    middle = slice(width // 2, width // 2 + len(values))
    return (np.convolve(values, window) / counts)[middle]

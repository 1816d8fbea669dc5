"""Preference pairs in rows: both sides of a pair lie in rows of the same global batch.

A loss over pairs compares the scores of two documents, which are added up over a global batch. So a global batch holds
whole pairs, in any of its rows: which micro-batches and ranks these belong to does not matter.
"""

from __future__ import annotations

from bisect import bisect_left, insort

import numpy as np
from numpy.typing import NDArray

from megatron_dllm.data.costs import segment_costs
from megatron_dllm.data.geometry import RowGeometry
from megatron_dllm.data.spans import Spans

_ROW_BITS = 32


def assign_pair_rows(
    geometry: RowGeometry, lengths: NDArray[np.int64], spans: Spans | None = None
) -> NDArray[np.int64]:
    """First fit of pairs into batches of rows, and in a batch best fit of their sides into its rows.

        1 cost    the tokens that each side takes
        2 batch   in order of arrival, a pair goes to the first batch whose rows hold both of its sides
        3 rows    each side goes to the fullest row of the batch that has room; of equal ones to the first

    Costs 9 and 5, 4 and 7, 3 and 3, in rows of 16 and batches of 2 rows: row 0 takes 9 and 5, row 1 takes 4 and 7 and
    has 5 left; the last pair does not fit into 2 and 5 tokens, so it opens the second batch: rows 0 0, 1 1, 2 2.
    Batches that are left out of a packing move no pair of the others, which makes a position in the rows exact.

    Args:
        geometry: of the rows; `rows_of_pairs` is the size of a batch.
        lengths: [2q] tokens of the sides of q pairs, one pair after the other, each at most context_length.
        spans: of the sides; None: every token may carry a loss.

    Returns:
        [2q] int64 row of each side; batch i has the rows i * rows_of_pairs and on, some of which may stay empty.
    """
    size = geometry.rows_of_pairs
    assert size is not None and len(lengths) % 2 == 0, f"{len(lengths)} sides in batches of {size} rows"
    costs = segment_costs(geometry, lengths, spans).tolist()
    largest = max(costs, default=0)
    assert largest <= geometry.row_length, f"a side of {largest} tokens in rows of {geometry.row_length}"
    smallest = min(costs, default=0)
    num_batches, rows = 0, np.empty(len(costs), dtype=np.int64)
    batches: list[tuple[int, list[int]]] = []  # its first row, and its rooms: sorted (free tokens << 32) + row
    for side in range(0, len(costs), 2):
        fitting = ((first, rooms, _place_both(rooms, costs[side : side + 2])) for first, rooms in batches)
        first, rooms, found = next((batch for batch in fitting if batch[2]), (num_batches * size, [], None))
        if found is None:
            rooms = [(geometry.row_length << _ROW_BITS) + row for row in range(size)]
            batches.append((first, rooms))
            num_batches, found = num_batches + 1, _place_both(rooms, costs[side : side + 2])
        assert found is not None, "two rows hold two sides"
        rows[side : side + 2] = np.array(found) + first
        # A batch whose largest room holds no side any more is left out, so the list stays short.
        if rooms[-1] >> _ROW_BITS < smallest:
            batches.remove((first, rooms))
    return rows


def _place_both(rooms: list[int], costs: list[int]) -> list[int] | None:
    """The rows of a batch that two sides go to, whose rooms then are smaller; None where they do not fit.

    Args:
        rooms: of the batch, changed in place.
        costs: tokens of the sides.
    """
    before, found = list(rooms), []
    for cost in costs:
        # Sorted by room first, so the first entry that is not smaller than (cost, row 0) is the best fit.
        place = bisect_left(rooms, cost << _ROW_BITS)
        if place == len(rooms):
            rooms[:] = before
            return None
        room, row = divmod(rooms.pop(place), 1 << _ROW_BITS)
        insort(rooms, ((room - cost) << _ROW_BITS) + row)
        found.append(row)
    return found

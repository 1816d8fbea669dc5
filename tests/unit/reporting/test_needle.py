"""The picture of a test of long contexts."""

from __future__ import annotations

import pytest

from megatron_dllm.evaluation.by_position import Stretch
from megatron_dllm.evaluation.needle import Cell
from megatron_dllm.reporting.needle import picture

CELLS = [Cell(length, depth, 4, depth, 3.0, 0.5) for length in (64, 128) for depth in (0.0, 1.0)]
STRETCHES = [Stretch(0, 64, 3, 2.5, 0.1), Stretch(64, 128, 3, 2.0, None)]


@pytest.mark.parametrize(("cells", "stretches"), [(CELLS, STRETCHES), (CELLS, []), ([], STRETCHES)])
def test_what_was_measured_is_drawn(cells: list[Cell], stretches: list[Stretch]) -> None:
    drawn = picture(cells, stretches, 8)
    assert drawn.startswith(b"\x89PNG") and len(drawn) > 5000
    assert drawn != picture(CELLS[:2], STRETCHES[:1], 8)

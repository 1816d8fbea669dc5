"""Ranks that compute together agree on a number of tokens, and none on more than it takes."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest

from megatron_dllm.inference.pass_shapes import Needs, Shape, shape_for


def agreed(shapes: Sequence[Shape], multiple: int = 1) -> list[Shape]:
    columns = zip(*(Needs.of(shape).numbers() for shape in shapes), strict=True)
    most = Needs(*map(max, columns))
    return [shape_for(shape, most, multiple) for shape in shapes]


@pytest.mark.parametrize(
    ("shapes", "expected"),
    [
        ([(5, 8), (5, 8)], [(5, 8), (5, 8)]),
        ([(5, 8), (0, 0)], [(5, 8), (5, 8)]),
        ([(0, 0), (0, 0)], [(0, 0), (0, 0)]),
        ([(1, 8192), (64, 32)], [(1, 8192), (64, 128)]),
        ([(1, 8192), (64, 32), (0, 0)], [(1, 8192), (64, 128), (64, 128)]),
        ([(48, 32), (3, 1000)], [(64, 63), (4, 1008)]),
    ],
)
def test_by_hand(shapes: list[Shape], expected: list[Shape]) -> None:
    assert agreed(shapes) == expected


@pytest.mark.parametrize("multiple", [1, 2, 8])
def test_all_have_equally_many_tokens_and_room_for_their_own(multiple: int) -> None:
    draw = random.Random(multiple)
    for _ in range(300):
        shapes = [(draw.randint(1, 70), draw.choice((1, 7, 32, 900))) for _ in range(draw.randint(1, 5))]
        found = agreed(shapes, multiple)
        assert len({rows * length for rows, length in found}) == 1
        for (rows, length), (needed_rows, needed_length) in zip(found, shapes, strict=True):
            assert rows >= needed_rows and length >= needed_length and length % multiple == 0
        most = max(rows * length for rows, length in shapes)
        slack = 2 * multiple * max(rows for rows, _ in shapes)
        assert found[0][0] * found[0][1] <= 2 * most + slack

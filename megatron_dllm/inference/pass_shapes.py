"""The shapes of passes that ranks compute together: equally many tokens on every rank, and few of them padding.

Ranks that share experts compute every pass at once. While one takes in a prompt, a row of 8,192 tokens, another may
fill 64 blocks of 32; as large as both would be 64 rows of 8,192. Only the number of tokens has to agree:

    1 round  every rank's rows to a power of 2: 1 x 8192 and 64 x 32
    2 agree  on the most tokens, a multiple of the most rows: 8192
    3 widen  each rank's rows until they hold as many: 1 x 8192 and 64 x 128

Where that takes no fewer tokens, as between equal shapes, all take the most rows and the longest row.
"""

from __future__ import annotations

from dataclasses import dataclass

Shape = tuple[int, int]


@dataclass(frozen=True)
class Needs:
    """What a rank needs, or the most of all ranks, which is the largest of each number.

    Attributes:
        rows: of the pass.
        length: tokens of a row.
        rounded_rows: a power of 2.
        rounded_tokens: of so many rows.
    """

    rows: int
    length: int
    rounded_rows: int
    rounded_tokens: int

    @classmethod
    def of(cls, shape: Shape) -> Needs:
        """Of a pass of some rows and tokens of a row; (0, 0): of none."""
        rows, length = shape
        rounded = _rounded(rows)
        return cls(rows, length, rounded, rounded * length)

    def numbers(self) -> list[int]:
        """All of them, in the order in which they are given."""
        return [self.rows, self.length, self.rounded_rows, self.rounded_tokens]


def shape_for(own: Shape, most: Needs, multiple: int = 1) -> Shape:
    """The shape that a rank's pass must have; (0, 0): no rank needs one.

    Args:
        own: that the rank needs; (0, 0): none.
        most: of all ranks.
        multiple: that the tokens of a row must be of.
    """
    if not most.rounded_tokens:
        return 0, 0
    length = most.length + -most.length % multiple
    unit = most.rounded_rows * multiple
    num_tokens = most.rounded_tokens + -most.rounded_tokens % unit
    if most.rows * length <= num_tokens:
        return most.rows, length
    rows = _rounded(own[0]) or most.rounded_rows
    return rows, num_tokens // rows


def _rounded(rows: int) -> int:
    """The smallest power of 2 that is not below `rows`; 0 of none."""
    return 1 << (rows - 1).bit_length() if rows else 0

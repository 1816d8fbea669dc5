"""The geometry of a row in one stage: how its tokens are cut into blocks, and what a segment costs.

A segment of n tokens takes `num_views` noisy copies, and a clean copy of the tokens that some
later block reads: all but its last block. A segment of one block has no clean copy, so block_size equal
to context_length is MDLM. An AR segment is its n clean tokens.

Where spans say which tokens may carry a loss, a segment costs less: noisy copies of the blocks that hold such
a token, and a clean copy of what stands before the last of these blocks. A prompt of 1000 tokens and an
answer of 216 in blocks of 32 cost 224 + 1184 = 1408 tokens with one view, not 1216 + 1184 = 2400:

    noisy   blocks 31..37, tokens 992..1215: the answer begins inside block 31
    clean   blocks 0..36,  tokens 0..1183
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_dllm.config import DataConfig, ScheduleConfig, StageConfig
from megatron_dllm.config.data import BLOCK_ORIGINS
from megatron_dllm.config.schedule import OBJECTIVES
from megatron_dllm.data.spans import START, STOP, Spans

IntArray = NDArray[np.int64]


@dataclass(frozen=True)
class RowGeometry:
    """What decides how segments fill rows; the same for every row of a stage.

    Attributes:
        objective: "ar" or "block_diffusion".
        block_size: tokens denoised together; without meaning in AR.
        context_length: longest segment of a document.
        row_length: tokens the model sees in a row: noisy, clean and padding.
        num_views: noisy copies of every segment; 0 in AR.
        block_origin: "document" restarts the block grid at every segment; "row" runs it through the
            document tokens of the row, so that a segment may begin in mid-block.
        prune_clean: whether copies of blocks that no loss needs are left out: of a noisy block without a token that
            may carry one, and of a clean block that no later block of its document with such a token reads.
        shift: whether position i predicts token i + 1; None: what the objective does.
    """

    objective: str
    block_size: int
    context_length: int
    row_length: int
    num_views: int
    block_origin: str = "document"
    prune_clean: bool = True
    shift: bool | None = None

    def __post_init__(self) -> None:
        # The configuration has refused these; that a validation's rows are long enough shows only here.
        assert self.objective in OBJECTIVES, f"objective ({self.objective}) is not known"
        assert self.block_origin in BLOCK_ORIGINS, f"block_origin ({self.block_origin}) is not known"
        for name in ("block_size", "context_length", "row_length"):
            assert getattr(self, name) >= 1, f"{name} ({getattr(self, name)}) must be positive"
        is_noisy = self.objective == "block_diffusion"
        assert self.num_views >= 0 and (self.num_views > 0) == is_noisy, (
            f"num_views ({self.num_views}) must be 0 for ar and positive for block_diffusion"
        )
        assert self.shift in (None, self.objective == "ar"), f"shift ({self.shift}) with objective {self.objective}"
        longest = np.array([self.context_length])
        needed = int(forward_tokens(self, longest, np.zeros(1, dtype=np.int64))[0])
        if self.row_length < needed:
            raise ValueError(
                f"row_length ({self.row_length}) must hold the longest segment: context_length "
                f"{self.context_length} with {self.num_views} noisy view(s) takes {needed} tokens; "
                f"raise row_length to {needed} or lower context_length."
            )

    @classmethod
    def of_stage(cls, stage: StageConfig, schedule: ScheduleConfig, data: DataConfig) -> RowGeometry:
        """The geometry that a stage of the configuration asks for."""
        return cls(
            objective=stage.objective,
            block_size=stage.block_size,
            context_length=schedule.context_length,
            row_length=schedule.tokens_per_row,
            num_views=stage.num_noisy_copies,
            block_origin=data.block_origin,
            prune_clean=data.prune_clean,
            shift=stage.shift,
        )


def row_starts(lengths: IntArray) -> IntArray:
    """[p] document tokens that stand before each segment in its row, for [p] lengths in row order."""
    return np.cumsum(lengths) - lengths


def forward_tokens(geometry: RowGeometry, lengths: IntArray, starts: IntArray, spans: Spans | None = None) -> IntArray:
    """Tokens that segments take in their row.

    Args:
        geometry: of the row.
        lengths: [p] tokens of the segments, each at least 1.
        starts: [p] document tokens before each segment in its row; they matter only for the row grid.
        spans: of the segments; None: every token may carry a loss.

    Returns:
        [p] int64.
    """
    if spans is None or geometry.objective == "ar" or not geometry.prune_clean:
        return geometry.num_views * lengths + _clean_lengths(geometry, lengths, starts)
    noisy, clean = _needed_lengths(geometry, lengths, starts, spans.maskable())
    return geometry.num_views * noisy + clean


def segment_costs(geometry: RowGeometry, lengths: IntArray, spans: Spans | None = None) -> IntArray:
    """Tokens that segments take in a row; under the row grid the most they can take, wherever they stand.

    Args:
        geometry: of the row.
        lengths: [p] tokens of the segments, each at least 1.
        spans: of the segments; None: every token may carry a loss.

    Returns:
        [p] int64.
    """
    if geometry.objective == "ar" or geometry.block_origin == "document":
        return forward_tokens(geometry, lengths, np.zeros_like(lengths), spans)
    if not geometry.prune_clean:
        return geometry.num_views * lengths + np.where(lengths > 1, lengths, 0)
    # In the worst place a block ends right before the last token that may carry a loss.
    if spans is None:
        return geometry.num_views * lengths + lengths - 1
    spans, owner = spans.maskable(), spans.maskable().owner
    widest = spans.table[:, STOP] - spans.table[:, START] + 2 * (geometry.block_size - 1)
    noisy = np.minimum(_sums(owner, widest, len(lengths)), lengths)
    last = np.zeros_like(lengths)
    np.maximum.at(last, owner, spans.table[:, STOP] - 1)
    return geometry.num_views * noisy + last


def _clean_lengths(geometry: RowGeometry, lengths: IntArray, starts: IntArray) -> IntArray:
    """Clean tokens of segments in which every token may carry a loss.

    Args:
        geometry: of the row.
        lengths: [p] tokens of the segments, each at least 1.
        starts: [p] document tokens before each segment in its row.
    """
    if geometry.objective == "ar":
        return lengths
    first = starts % geometry.block_size if geometry.block_origin == "row" else 0
    last_block = (first + lengths - 1) % geometry.block_size + 1
    kept = lengths - last_block if geometry.prune_clean else lengths
    return np.where(last_block >= lengths, 0, kept)


def _needed_lengths(
    geometry: RowGeometry, lengths: IntArray, starts: IntArray, spans: Spans
) -> tuple[IntArray, IntArray]:
    """Tokens of a noisy view and of the clean copy, where only some tokens may carry a loss.

    Args:
        geometry: of the row.
        lengths: [p] tokens of the segments.
        starts: [p] document tokens before each segment in its row.
        spans: maskable spans of the segments.

    Returns:
        [p] and [p] int64.
    """
    size, owner = geometry.block_size, spans.owner
    before = starts % size if geometry.block_origin == "row" else np.zeros_like(lengths)  # tokens of the first block
    shift = before[owner]
    # 1 each span's first and last block: with size 4, tokens 6..9 lie in blocks 1..2
    first, last = (spans.table[:, START] + shift) // size, (spans.table[:, STOP] - 1 + shift) // size
    # 2 a block that holds the end of one span and the beginning of the next counts once, for the former
    counted = np.full(len(last), -1)
    counted[1:] = np.where(owner[1:] == owner[:-1], last[:-1], -1)
    first = np.maximum(first, counted + 1)
    # 3 the tokens of these blocks that lie in the segment
    begin = np.maximum(first * size - shift, 0)
    noisy = _sums(owner, np.maximum(np.minimum((last + 1) * size - shift, lengths[owner]) - begin, 0), len(lengths))
    # 4 clean: what stands before the last of these blocks
    clean = np.zeros_like(lengths)
    np.maximum.at(clean, owner, last * size - shift)
    return noisy, clean


def _sums(owner: IntArray, values: IntArray, num_segments: int) -> IntArray:
    """Sums by segment.

    Args:
        owner: [k] int64 the segment of each value.
        values: [k] int64.
        num_segments: p.

    Returns:
        [p] int64.
    """
    sums = np.zeros(num_segments, dtype=np.int64)
    np.add.at(sums, owner, values)
    return sums

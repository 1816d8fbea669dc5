"""The geometry of a row in one stage: how its tokens are cut into blocks, and what a piece costs.

A document piece of n tokens takes `num_views` noisy copies, and a clean copy of the tokens that some
later block reads: all but its last block. A piece of one block has no clean copy, so block_size equal
to context_length is MDLM. An AR piece is its n clean tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_dllm.config import DataConfig, ScheduleConfig, StageConfig
from megatron_dllm.config.data import BLOCK_ORIGINS
from megatron_dllm.config.schedule import OBJECTIVES

IntArray = NDArray[np.int64]


@dataclass(frozen=True)
class RowGeometry:
    """What decides how pieces fill rows; the same for every row of a stage.

    Attributes:
        objective: "ar" or "block_diffusion".
        block_size: tokens denoised together; without meaning in AR.
        context_length: longest piece of a document.
        row_length: tokens the model sees in a row: noisy, clean and padding.
        num_views: noisy copies of every piece; 0 in AR.
        block_origin: "document" restarts the block grid at every piece; "row" runs it through the
            document tokens of the row, so that a piece may begin in mid-block.
        prune_clean: whether the clean copy leaves out the last block, which nobody reads.
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
        if self.objective not in OBJECTIVES:
            raise ValueError(f"objective ({self.objective}) is not known; use one of {', '.join(OBJECTIVES)}.")
        if self.block_origin not in BLOCK_ORIGINS:
            raise ValueError(f"block_origin ({self.block_origin}) is not known; use one of {', '.join(BLOCK_ORIGINS)}.")
        for name in ("block_size", "context_length", "row_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} ({getattr(self, name)}) must be positive; give a value above 0.")
        if self.num_views < 0 or (self.num_views > 0) != (self.objective == "block_diffusion"):
            raise ValueError(f"num_views ({self.num_views}) must be 0 for ar and positive for block_diffusion.")
        assert self.shift in (None, self.objective == "ar"), f"shift ({self.shift}) with objective {self.objective}"
        longest = np.array([self.context_length])
        needed = int((self.num_views * longest + clean_lengths(self, longest, np.zeros(1, dtype=np.int64)))[0])
        if self.row_length < needed:
            raise ValueError(
                f"row_length ({self.row_length}) must hold the longest piece: context_length "
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
    """[p] document tokens that stand before each piece in its row, for [p] lengths in row order."""
    return np.cumsum(lengths) - lengths


def clean_lengths(geometry: RowGeometry, lengths: IntArray, starts: IntArray) -> IntArray:
    """Clean tokens that pieces keep in their row.

    Args:
        geometry: of the row.
        lengths: [p] tokens of the pieces, each at least 1.
        starts: [p] document tokens before each piece in its row; they matter only for the row grid.

    Returns:
        [p] int64.
    """
    if geometry.objective == "ar":
        return lengths
    first = starts % geometry.block_size if geometry.block_origin == "row" else 0
    last_block = (first + lengths - 1) % geometry.block_size + 1
    kept = lengths - last_block if geometry.prune_clean else lengths
    return np.where(last_block >= lengths, 0, kept)


def piece_costs(geometry: RowGeometry, lengths: IntArray) -> IntArray:
    """Tokens that pieces take in a row; under the row grid the most they can take, wherever they stand.

    Args:
        geometry: of the row.
        lengths: [p] tokens of the pieces, each at least 1.

    Returns:
        [p] int64.
    """
    if geometry.objective == "ar" or geometry.block_origin == "document":
        return geometry.num_views * lengths + clean_lengths(geometry, lengths, np.zeros_like(lengths))
    # In the worst place a block ends right before the piece's last token.
    kept = lengths - 1 if geometry.prune_clean else np.where(lengths > 1, lengths, 0)
    return geometry.num_views * lengths + kept

"""The geometry of a row in one stage: how its tokens are cut into blocks, and which copies of them it holds.

What a segment costs under a geometry is computed in `data.costs`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_dllm.config import DataConfig, ScheduleConfig, StageConfig
from megatron_dllm.config.data import BLOCK_ORIGINS
from megatron_dllm.config.schedule import OBJECTIVES
from megatron_dllm.config.sft import FILLS, TURN_BOUNDARIES

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
        shift: whether the slot before a token predicts it, see `data.row`; None: what the objective does.
        fill: "eos" puts trained end-of-text tokens between the end of a turn and the end of its block, see
            `data.noisy_blocks`; "none" nothing. It concerns sources with spans alone, as turn_boundary does.
        turn_boundary: what a turn that ends in mid-block sees behind it, see `data.noisy_blocks`.
        rows_of_pairs: rows of a global batch of preference pairs: both sides of a pair lie in the same so many rows,
            counted from the stage's first one; None: documents have nothing to do with each other.
        longest_cost: tokens of the row that the costliest segment takes; None: what one of context_length takes in
            which every token may carry a loss.
        clean_block_size: tokens of the clean copies that see each other; None: block_size.
        ar_share: share of the clean tokens that predict the token after them; 0: none.
    """

    objective: str
    block_size: int
    context_length: int
    row_length: int
    num_views: int
    block_origin: str = "document"
    prune_clean: bool = True
    shift: bool | None = None
    fill: str = "none"
    turn_boundary: str = "all"
    rows_of_pairs: int | None = None
    longest_cost: int | None = None
    clean_block_size: int | None = None
    ar_share: float = 0.0

    def __post_init__(self) -> None:
        # The configuration has refused these; that a validation's rows are long enough shows only here.
        assert self.objective in OBJECTIVES, f"objective ({self.objective}) is not known"
        assert self.block_origin in BLOCK_ORIGINS, f"block_origin ({self.block_origin}) is not known"
        assert self.fill in FILLS, f"fill ({self.fill}) is not known"
        assert self.turn_boundary in TURN_BOUNDARIES, f"turn_boundary ({self.turn_boundary}) is not known"
        for name in ("block_size", "context_length", "row_length"):
            assert getattr(self, name) >= 1, f"{name} ({getattr(self, name)}) must be positive"
        is_noisy = self.objective == "block_diffusion"
        assert self.num_views >= 0 and (self.num_views > 0) == is_noisy, (
            f"num_views ({self.num_views}) must be 0 for ar and positive for block_diffusion"
        )
        assert is_noisy or self.shift is not False, "an AR position predicts the token after it"
        has_turns = (self.fill, self.turn_boundary) != ("none", "all")
        assert not has_turns or (is_noisy and self.block_origin == "document"), (
            f"fill ({self.fill}) and turn_boundary ({self.turn_boundary}) need block_diffusion on the document's grid"
        )
        assert self.rows_of_pairs is None or (self.rows_of_pairs > 1 and self.block_origin == "document"), (
            f"rows_of_pairs ({self.rows_of_pairs}) must be 2 or more, so that any pair fits, on the document's grid"
        )
        assert self.block_size % self.clean_grid == 0, f"clean blocks of {self.clean_grid} in {self.block_size}"
        assert not self.ar_share or (is_noisy and self.clean_grid == 1), (
            "AR targets need clean copies that see no later token"
        )
        if self.longest_cost is not None:
            assert self.row_length >= self.longest_cost, (
                f"a segment of {self.longest_cost} in a row of {self.row_length}"
            )
            return
        longest = np.array([self.context_length])
        needed = self.num_views * self.context_length + int(clean_lengths(self, longest, np.zeros_like(longest))[0])
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
            fill="none" if stage.sft is None else stage.sft.fill,
            turn_boundary="all" if stage.sft is None else stage.sft.turn_boundary,
            rows_of_pairs=None if stage.preference is None else stage.global_batch_size,
            clean_block_size=None if stage.clean_grid == stage.block_size else stage.clean_grid,
            ar_share=stage.clean_target_share,
        )

    @property
    def is_shifted(self) -> bool:
        """`shift` with its default filled in."""
        return self.objective == "ar" if self.shift is None else self.shift

    def ar_rows(self) -> RowGeometry:
        """That of the AR rows of the same stage: each document once, its clean tokens alone."""
        return RowGeometry("ar", 1, self.context_length, self.row_length, 0, self.block_origin, self.prune_clean)

    @property
    def clean_grid(self) -> int:
        """`clean_block_size` with its default filled in."""
        return self.block_size if self.clean_block_size is None else self.clean_block_size

    def noisy_blocks(self, block: IntArray) -> IntArray:
        """[m] int64 numbers of noisy blocks in roles: each has that of the clean block it begins with.

        Args:
            block: [m] int64 numbers of the blocks among noisy ones.
        """
        return block * (self.block_size // self.clean_grid)

    def grid_starts(self, starts: IntArray) -> IntArray:
        """Where the block grid stands at the first token of segments.

        Args:
            starts: [p] document tokens before each segment in its row.

        Returns:
            [p] int64 tokens of the grid before each segment: its token i lies in block (this + i) // block_size.
        """
        return starts if self.block_origin == "row" else np.zeros_like(starts)


def row_starts(lengths: IntArray) -> IntArray:
    """[p] document tokens that stand before each segment in its row, for [p] lengths in row order."""
    return np.cumsum(lengths) - lengths


def clean_lengths(geometry: RowGeometry, lengths: IntArray, starts: IntArray) -> IntArray:
    """Clean tokens of segments in which every token may carry a loss.

    Args:
        geometry: of the row.
        lengths: [p] tokens of the segments, each at least 1.
        starts: [p] document tokens before each segment in its row.
    """
    if geometry.objective == "ar":
        return lengths
    if geometry.ar_share:  # all but the last one predict their next token
        return lengths - 1 if geometry.prune_clean else np.where(lengths > 1, lengths, 0)
    first = geometry.grid_starts(starts) % geometry.block_size
    last_block = (first + lengths - 1) % geometry.block_size + 1
    kept = lengths - last_block if geometry.prune_clean else lengths
    return np.where(last_block >= lengths, 0, kept)


def noisy_lengths(geometry: RowGeometry, lengths: IntArray, starts: IntArray) -> IntArray:
    """Tokens that one noisy view shows of segments in which every token may carry a loss.

    All of them, but with a shift none of a block of one token: that is predicted before its block, or by nobody.

    Args:
        geometry: of the row: block diffusion.
        lengths: [p] tokens of the segments, each at least 1.
        starts: [p] document tokens before each segment in its row.
    """
    if not (geometry.is_shifted and geometry.prune_clean):
        return lengths
    if geometry.block_size == 1:
        return np.zeros_like(lengths)
    first = geometry.grid_starts(starts) % geometry.block_size
    in_first = np.minimum(geometry.block_size - first, lengths)
    in_last = np.minimum((first + lengths - 1) % geometry.block_size + 1, lengths)
    has_two = in_first < lengths
    shown: IntArray = lengths - (in_last == 1) - ((in_first == 1) & has_two)
    return shown

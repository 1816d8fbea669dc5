"""The maskable tokens of a segment by block, and what identifies the segment to the generator of its noise."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_dllm.diffusion.noise_spec import NoiseSpec


@dataclass(frozen=True)
class SegmentBlocks:
    """The m maskable tokens of a segment, grouped into the c blocks that have any.

    Attributes:
        of_token: [m] int64, which of the c blocks a token lies in.
        rank: [m] int64, a token's place among the maskable tokens of its block.
        start: [c] int64, first token of a block.
        size: [c] int64, maskable tokens of a block.
    """

    of_token: NDArray[np.int64]
    rank: NDArray[np.int64]
    start: NDArray[np.int64]
    size: NDArray[np.int64]

    @classmethod
    def group(cls, block_ids: NDArray[np.int64]) -> SegmentBlocks:
        """Group non-decreasing `block_ids` [m] of the maskable tokens."""
        steps = np.diff(block_ids)
        assert not len(steps) or steps.min() >= 0, "block_ids must not decrease along a segment"
        start = np.concatenate([np.zeros(1, np.int64), np.flatnonzero(steps) + 1])
        size = np.diff(start, append=len(block_ids))
        of_token = np.repeat(np.arange(len(start)), size)
        return cls(of_token, np.arange(len(block_ids)) - start[of_token], start, size)


@dataclass(frozen=True)
class SegmentKey:
    """What identifies a segment to the generator, see `diffusion.noise`; its levels are drawn by `level_id`."""

    sample_id: int
    level_id: int
    ordinal: int
    row_key: int

    @classmethod
    def of(cls, spec: NoiseSpec, sample_id: int, ordinal: int, row_key: int) -> SegmentKey:
        """The key of a segment, whose levels may be those of the one that it forms a pair with."""
        shared = 2 if spec.share_levels else 1
        return cls(sample_id, sample_id // shared * shared, ordinal // shared * shared, row_key)

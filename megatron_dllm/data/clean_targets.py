"""Which clean tokens of a row predict the token after them: the AR loss beside the diffusion loss.

A clean token of a copy in blocks of 1 sees what it sees in an AR model, so it may predict its next token: that of its
own segment, where it may carry a loss. Of a random share of these tokens the loss weighs 1 / share, which leaves the
expected loss what it is. Whether a token is drawn follows from (seed, sample id, epoch) and its place.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_dllm.data.geometry import RowGeometry, row_starts
from megatron_dllm.data.packing import LENGTH, RowPlan
from megatron_dllm.data.row_tokens import CopyTokens, RowContent
from megatron_dllm.data.spans import MASKABLE
from megatron_dllm.diffusion.draws import Draws, Purpose

IntArray = NDArray[np.int64]


@dataclass(frozen=True)
class CleanTargets:
    """The AR targets of a row.

    Attributes:
        tokens: [a] int64 clean tokens of the row that predict, ascending.
        ids: [a] int64 what they predict.
        weight: of the loss of each.
        num_maskable: tokens that could have been predicted.
    """

    tokens: IntArray
    ids: IntArray
    weight: float
    num_maskable: int


def find_clean_targets(
    plan: RowPlan, content: RowContent, clean: CopyTokens, geometry: RowGeometry, seed: int
) -> CleanTargets:
    """The AR targets of a row of block diffusion.

    Args:
        plan: of the row.
        content: of the row.
        clean: its clean tokens.
        geometry: of the row, with a share of AR targets.
        seed: of the draw.
    """
    lengths = plan.segments[:, LENGTH]
    successor = row_starts(lengths)[clean.segments] + clean.position_ids + 1
    is_next = clean.position_ids + 1 < lengths[clean.segments]
    if content.spans is not None:
        kinds = content.spans.kinds(lengths)
        is_next &= kinds[np.minimum(successor, len(kinds) - 1)] == MASKABLE
    num_maskable = int(is_next.sum())
    if geometry.ar_share < 1.0:
        is_next &= _is_drawn(plan, content, lengths, geometry.ar_share, seed)[successor - 1]
    tokens = np.flatnonzero(is_next)
    return CleanTargets(tokens, content.clean_ids[successor[tokens]], 1.0 / geometry.ar_share, num_maskable)


def _is_drawn(plan: RowPlan, content: RowContent, lengths: IntArray, share: float, seed: int) -> NDArray[np.bool_]:
    """[n] whether each token of the segments, of [p] lengths, is one of the share."""
    draws = Draws(seed, plan.epoch)
    uniforms = [
        draws.uniform(Purpose.CLEAN_TARGET, sample, length)
        for sample, length in zip(content.noise_ids.tolist(), lengths.tolist(), strict=True)
    ]
    return np.concatenate([np.zeros(0), *uniforms]) < share

"""What a row of a stage asks of the model: document tokens, targets, and pairs that attention computes.

Where no corpus is given, rows are filled with documents of one length. The counts of pairs are exact for whole
documents (`tests/unit/planning/test_rows.py` counts them on the mask).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_dllm.config import StageConfig
from megatron_dllm.data.costs import document_tokens, forward_tokens
from megatron_dllm.data.geometry import RowGeometry
from megatron_dllm.data.spans import START, STOP, Spans

IntArray = NDArray[np.int64]


@dataclass(frozen=True)
class RowContent:
    """What an average row holds.

    Attributes:
        length: tokens that the model computes, padding included.
        document_tokens: tokens that progress counts.
        targets: tokens with a loss.
        pairs: query and key that see each other.
        source: where the numbers come from.
    """

    length: int
    document_tokens: float
    targets: float
    pairs: float
    source: str


def visible_pairs(geometry: RowGeometry, lengths: IntArray) -> IntArray:
    """Pairs of query and key that see each other, of documents in which every token may carry a loss.

    A document of blocks b_0 .. b_k: noisy block i sees itself and the clean blocks before it, so b_i (b_0 + ... + b_i)
    pairs in each view; clean blocks likewise, but for the last one, which nobody reads.

    Args:
        geometry: of the row; blocks count from the beginning of the document.
        lengths: [p] tokens of the documents.

    Returns:
        [p] int64.
    """
    if geometry.objective == "ar":
        return lengths * (lengths + 1) // 2
    size = geometry.block_size
    before = (lengths - 1) // size  # whole blocks before the last one
    last = lengths - before * size
    earlier = size * size * before * (before + 1) // 2
    noisy = earlier + last * lengths
    clean = earlier if geometry.prune_clean else np.where(before > 0, noisy, 0)
    return geometry.num_views * noisy + clean


def assumed_row(geometry: RowGeometry, stage: StageConfig, document_length: int) -> RowContent:
    """A row that is filled with documents of one length.

    Args:
        geometry: of the stage's rows.
        stage: its noise levels give the share of tokens with a loss.
        document_length: in tokens; longer than context_length: it is cut into such segments.
    """
    length = min(document_length, geometry.context_length)
    lengths = np.array([length])
    number = geometry.row_length // int(forward_tokens(geometry, lengths, np.zeros_like(lengths))[0])
    return RowContent(
        length=geometry.row_length,
        document_tokens=float(number * length),
        targets=number * length * targets_per_token(stage),
        pairs=float(number * visible_pairs(geometry, lengths)[0]),
        source=f"assumed: documents of {length:,} tokens",
    )


def measured_row(
    geometry: RowGeometry, stage: StageConfig, tokens_per_row: float, lengths: IntArray, spans: Spans | None
) -> RowContent:
    """A row of a corpus, from its first documents.

    Args:
        geometry: of the stage's rows.
        stage: its noise levels give the share of tokens with a loss.
        tokens_per_row: document tokens of a row, as packing gives them.
        lengths: [p] tokens of the segments, each at most context_length.
        spans: of the segments; None: every token may carry a loss.
    """
    counted = float(document_tokens(geometry, lengths, spans).sum())
    share = 1.0
    if spans is not None:
        table = spans.maskable().table
        share = float((table[:, STOP] - table[:, START]).sum()) / counted
    return RowContent(
        length=geometry.row_length,
        document_tokens=tokens_per_row,
        targets=tokens_per_row * share * targets_per_token(stage),
        pairs=tokens_per_row * float(visible_pairs(geometry, lengths).sum()) / counted,
        source="measured: the corpus",
    )


def targets_per_token(stage: StageConfig) -> float:
    """Targets of a document token that may carry a loss, over all views: its expected number of masks."""
    if stage.objective == "ar":
        return 1.0
    return stage.num_views * (stage.t_min + stage.t_max) / 2.0

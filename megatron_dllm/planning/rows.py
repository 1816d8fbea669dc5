"""What a row of a stage asks of the model: document tokens, targets, and pairs that attention computes.

Where no corpus is given, rows are filled with documents of one length. The counts of pairs are exact for whole
documents (`tests/unit/planning/test_rows.py` counts them on the mask).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_dllm.config import NoiseConfig, StageConfig
from megatron_dllm.data.costs import document_tokens, forward_tokens
from megatron_dllm.data.geometry import RowGeometry, clean_lengths
from megatron_dllm.data.spans import START, STOP, Spans
from megatron_dllm.diffusion.mask_share import mask_share
from megatron_dllm.diffusion.noise_spec import NoiseSpec

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
    pairs in each view; clean ones likewise, in blocks of their own, but for the tokens that nobody reads.

    Args:
        geometry: of the row; blocks count from the beginning of the document.
        lengths: [p] tokens of the documents.

    Returns:
        [p] int64.
    """
    if geometry.objective == "ar":
        return lengths * (lengths + 1) // 2
    clean = clean_lengths(geometry, lengths, np.zeros_like(lengths))
    return geometry.num_views * _pairs(lengths, geometry.block_size) + _pairs(clean, geometry.clean_grid)


def _pairs(lengths: IntArray, size: int) -> IntArray:
    """[p] pairs of [p] tokens, in blocks of `size`, which see themselves and those before them."""
    whole = lengths // size
    last = lengths - whole * size
    return size * size * whole * (whole + 1) // 2 + last * lengths


def assumed_row(geometry: RowGeometry, stage: StageConfig, document_length: int) -> RowContent:
    """A row that is filled with documents of one length.

    Args:
        geometry: of the stage's rows.
        stage: its noise gives the share of tokens with a loss.
        document_length: in tokens; longer than context_length: it is cut into such segments.
    """
    length = min(document_length, geometry.context_length)
    lengths = np.array([length])
    tokens = _document_tokens(geometry, length)
    if stage.ar_row_share:  # a share counts document tokens, of which an AR row holds more
        share = stage.ar_row_share
        tokens = 1.0 / ((1.0 - share) / tokens + share / _document_tokens(geometry.ar_rows(), length))
    return RowContent(
        length=geometry.row_length,
        document_tokens=tokens,
        targets=tokens * targets_per_token(stage),
        pairs=tokens * float(_stage_pairs(geometry, stage, lengths)[0]) / length,
        source=f"assumed: documents of {length:,} tokens",
    )


def _document_tokens(geometry: RowGeometry, length: int) -> float:
    """Of a row of documents of one length."""
    lengths = np.array([length])
    return float(geometry.row_length // int(forward_tokens(geometry, lengths, np.zeros_like(lengths))[0]) * length)


def _stage_pairs(geometry: RowGeometry, stage: StageConfig, lengths: IntArray) -> NDArray[np.float64]:
    """[p] pairs of documents of [p] tokens, as a mean over the noisy rows and the AR rows of a stage."""
    noisy = visible_pairs(geometry, lengths).astype(np.float64)
    if not stage.ar_row_share:
        return noisy
    share = stage.ar_row_share
    return (1.0 - share) * noisy + share * visible_pairs(geometry.ar_rows(), lengths)


def measured_row(
    geometry: RowGeometry, stage: StageConfig, tokens_per_row: float, lengths: IntArray, spans: Spans | None
) -> RowContent:
    """A row of a corpus, from its first documents.

    Args:
        geometry: of the stage's rows.
        stage: its noise gives the share of tokens with a loss.
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
        pairs=tokens_per_row * float(_stage_pairs(geometry, stage, lengths).sum()) / counted,
        source="measured: the corpus",
    )


def targets_per_token(stage: StageConfig) -> float:
    """Targets of a document token that may carry a loss: its expected number of masks, and of AR targets.

    Blocks count as whole ones, so of documents shorter than a block or so there are some more.
    """
    if stage.objective == "ar":
        return 1.0
    # What shares a level does not change how many tokens are masked.
    spec = NoiseSpec.for_stage(NoiseConfig(), stage)
    noisy = stage.num_views * mask_share(spec, stage.block_size) + stage.clean_target_share
    return (1.0 - stage.ar_row_share) * noisy + stage.ar_row_share

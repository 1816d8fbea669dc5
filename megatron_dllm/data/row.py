"""From a row's plan to its tokens in numpy: layout, noise, roles, targets.

A document piece of n tokens is laid out as its noisy views, one after the other, followed by the
clean tokens that some later block reads:

    [view 1: n tokens] [view 2: n tokens] ... [clean: n tokens, less the last block]

so that a query's visible keys are at most two intervals of the row. An AR piece is its clean tokens.
Padding stands at the end of the row: document -1, the pad token, position 0.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_dllm.data.geometry import RowGeometry, clean_lengths, row_starts
from megatron_dllm.data.packing import LENGTH, ORDINAL, RowPlan
from megatron_dllm.data.shuffle import mix_key
from megatron_dllm.diffusion.noise import NoiseSpec, sample_noise
from megatron_dllm.diffusion.roles import PADDING_DOC

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float32]
BoolArray = NDArray[np.bool_]


@dataclass(frozen=True)
class Row:
    """One row in numpy, under the names of `Batch`: tokens are [s], `target_positions` count inside the row.

    What `Batch` has once a row ([b]) is [1] here, and its totals are numbers.
    """

    sample_ids: IntArray
    num_pieces: IntArray
    row_keys: IntArray
    input_ids: IntArray
    position_ids: IntArray
    roles: NDArray[np.int32]
    is_masked: BoolArray
    target_positions: IntArray
    target_ids: IntArray
    target_t: FloatArray
    loss_weights: FloatArray
    num_maskable: int
    num_document_tokens: int
    num_forward_tokens: int


@dataclass(frozen=True)
class RowContent:
    """The tokens of a row's pieces, joined.

    Attributes:
        clean_ids: [n] int64 tokens of all pieces, one piece after the other.
        sample_ids: [p] int64 sample id of each piece: the corpus position of its first token.
        loss_mask: [n] bool tokens that may carry a loss; None: all of them.
    """

    clean_ids: IntArray
    sample_ids: IntArray
    loss_mask: BoolArray | None = None


def build_row(
    plan: RowPlan,
    content: RowContent,
    geometry: RowGeometry,
    noise: NoiseSpec | None,
    *,
    seed: int,
    mask_token_id: int,
    pad_token_id: int,
) -> Row:
    """Lay out a row, draw its noise and name its targets.

    Args:
        plan: pieces of the row; none at all makes a row of padding.
        content: their tokens.
        geometry: of the row.
        noise: how tokens are masked; None for AR.
        seed: of the noise.
        mask_token_id: replaces masked tokens.
        pad_token_id: fills the rest of the row.

    Returns:
        The row. A position of a noisy view predicts its own token; in AR position i predicts token i + 1.
    """
    num_noise_views = 0 if noise is None else noise.num_views
    assert num_noise_views == geometry.num_views, f"noise of {num_noise_views} views, rows of {geometry.num_views}"
    tokens = _PieceTokens.of(plan, content, geometry)
    source, view = _layout(tokens.lengths, tokens.starts, geometry)
    num_forward = len(source)
    assert num_forward <= geometry.row_length, f"pieces of {num_forward} tokens in a row of {geometry.row_length}"
    row_key = mix_key(plan.epoch, int(content.sample_ids[0])) if len(content.sample_ids) else 0

    input_ids = np.full(geometry.row_length, pad_token_id, dtype=np.int64)
    position_ids = np.zeros(geometry.row_length, dtype=np.int64)
    roles = np.zeros((geometry.row_length, 3), dtype=np.int32)
    is_masked = np.zeros(geometry.row_length, dtype=np.bool_)
    roles[:, 0] = PADDING_DOC
    input_ids[:num_forward] = content.clean_ids[source]
    position_ids[:num_forward] = tokens.position_ids[source]
    roles[:num_forward, 0] = tokens.doc_ids[source]
    roles[:num_forward, 1] = tokens.block_ids[source]
    roles[:num_forward, 2] = view

    if noise is None:
        has_target = tokens.has_successor & np.append(tokens.loss_mask[1:], False)
        target_positions = np.flatnonzero(has_target)
        target_ids = content.clean_ids[target_positions + 1]
        weights, levels = np.ones(len(target_ids), np.float32), np.zeros(len(target_ids), np.float32)
        num_maskable = len(target_ids)
    else:
        drawn = _draw_noise(plan, content, tokens, noise, seed=seed, row_key=row_key)
        # Column 0 is the clean view, in which nothing is masked.
        is_masked[:num_forward] = drawn.is_masked[view, source]
        target_positions = np.flatnonzero(is_masked)
        target_source, target_view = source[target_positions], view[target_positions]
        target_ids = content.clean_ids[target_source]
        weights = drawn.loss_weights[target_view, target_source]
        levels = drawn.t[target_view, target_source]
        input_ids[is_masked] = mask_token_id
        num_maskable = geometry.num_views * int(tokens.loss_mask.sum())
    return Row(
        input_ids=input_ids,
        position_ids=position_ids,
        roles=roles,
        is_masked=is_masked,
        target_positions=target_positions,
        target_ids=target_ids,
        loss_weights=weights,
        target_t=levels,
        row_keys=np.array([row_key], dtype=np.int64),
        num_pieces=np.array([len(content.sample_ids)], dtype=np.int64),
        sample_ids=content.sample_ids,
        num_maskable=num_maskable,
        num_document_tokens=len(content.clean_ids),
        num_forward_tokens=num_forward,
    )


@dataclass(frozen=True)
class _PieceTokens:
    """Per document token of a row ([n], each token once), and per piece ([p])."""

    lengths: IntArray
    starts: IntArray
    doc_ids: IntArray
    position_ids: IntArray
    block_ids: IntArray
    loss_mask: BoolArray
    has_successor: BoolArray

    @classmethod
    def of(cls, plan: RowPlan, content: RowContent, geometry: RowGeometry) -> _PieceTokens:
        lengths = plan.pieces[:, LENGTH]
        starts = row_starts(lengths)
        num_tokens = len(content.clean_ids)
        assert num_tokens == lengths.sum(), f"{num_tokens} tokens for pieces of {lengths.sum()}"
        doc_ids = np.repeat(np.arange(len(lengths)), lengths)
        index = np.arange(num_tokens)
        position_ids = index - starts[doc_ids]
        if geometry.objective == "ar":
            block_ids = position_ids
        else:
            block_ids = (index if geometry.block_origin == "row" else position_ids) // geometry.block_size
        loss_mask = np.ones(num_tokens, dtype=np.bool_) if content.loss_mask is None else content.loss_mask
        return cls(
            lengths=lengths,
            starts=starts,
            doc_ids=doc_ids,
            position_ids=position_ids,
            block_ids=block_ids,
            loss_mask=loss_mask,
            has_successor=position_ids + 1 < lengths[doc_ids],
        )


def _layout(lengths: IntArray, starts: IntArray, geometry: RowGeometry) -> tuple[IntArray, IntArray]:
    """Which document token stands in each slot of the row ([f] index), and in which view ([f])."""
    views = [*range(1, geometry.num_views + 1), 0]
    segment_lengths = np.stack([*[lengths] * geometry.num_views, clean_lengths(geometry, lengths, starts)], axis=1)
    flat_lengths = segment_lengths.reshape(-1)
    # Slot number less where its segment begins, plus where the segment's piece begins.
    shift = np.repeat(starts, len(views)) - row_starts(flat_lengths)
    source = np.arange(flat_lengths.sum()) + np.repeat(shift, flat_lengths)
    return source, np.repeat(np.tile(views, len(lengths)), flat_lengths)


@dataclass(frozen=True)
class _DrawnNoise:
    """[k + 1, n] each; row 0 is the clean view, where nothing is masked."""

    is_masked: BoolArray
    loss_weights: FloatArray
    t: FloatArray


def _draw_noise(
    plan: RowPlan, content: RowContent, tokens: _PieceTokens, noise: NoiseSpec, *, seed: int, row_key: int
) -> _DrawnNoise:
    shape = (noise.num_views + 1, len(content.clean_ids))
    drawn = _DrawnNoise(np.zeros(shape, np.bool_), np.zeros(shape, np.float32), np.zeros(shape, np.float32))
    for piece, (start, length) in enumerate(zip(tokens.starts.tolist(), tokens.lengths.tolist(), strict=True)):
        span = slice(start, start + length)
        block_ids = tokens.block_ids[span]
        piece_noise = sample_noise(
            noise,
            seed=seed,
            epoch=plan.epoch,
            sample_id=int(content.sample_ids[piece]),
            ordinal=int(plan.pieces[piece, ORDINAL]),
            row_key=row_key,
            block_ids=block_ids - block_ids[0],
            loss_mask=tokens.loss_mask[span],
        )
        drawn.is_masked[1:, span] = piece_noise.is_masked
        drawn.loss_weights[1:, span] = piece_noise.loss_weights
        drawn.t[1:, span] = piece_noise.t
    return drawn

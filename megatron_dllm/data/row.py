"""From a row's plan to its tokens in numpy: layout, noise, roles, targets.

A segment of n tokens is laid out as its noisy views, one after the other, followed by the
clean tokens that some later block reads:

    [view 1: n tokens] [view 2: n tokens] ... [clean: n tokens, less the last block]

so that a query's visible keys are at most two intervals of the row. An AR segment is its clean tokens.
Where not every token may carry a loss, noisy blocks without such a token are left out, and the clean
copy ends before the last block that has one: no target reads what is missing.
Padding stands at the end of the row: document -1, the pad token, position 0.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_dllm.data.geometry import RowGeometry, row_starts
from megatron_dllm.data.packing import LENGTH, ORDINAL, RowPlan
from megatron_dllm.data.shuffle import mix_key
from megatron_dllm.data.spans import MASKABLE, MASKED
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
    num_segments: IntArray
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
    """The tokens of a row's segments, joined.

    Attributes:
        clean_ids: [n] int64 tokens of all segments, one segment after the other.
        sample_ids: [p] int64 sample id of each segment: the corpus position of its first token.
        kinds: [n] uint8 what each token is, see `data.spans`; None: all are maskable.
    """

    clean_ids: IntArray
    sample_ids: IntArray
    kinds: NDArray[np.uint8] | None = None


@dataclass(frozen=True)
class RowNoise:
    """The noise of a row's document tokens in every view; row 0 is the clean view, where nothing is masked.

    Attributes:
        is_masked: [k + 1, n] bool tokens that are masked and carry a loss.
        loss_weights: [k + 1, n] fp32 weights of these.
        t: [k + 1, n] fp32 noise levels.
    """

    is_masked: BoolArray
    loss_weights: FloatArray
    t: FloatArray


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
    """Draw a row's noise and lay it out.

    Args:
        plan: segments of the row; none at all makes a row of padding.
        content: their tokens.
        geometry: of the row.
        noise: how tokens are masked; None for AR.
        seed: of the noise.
        mask_token_id: replaces masked tokens.
        pad_token_id: fills the rest of the row.
    """
    num_noise_views = 0 if noise is None else noise.num_views
    assert num_noise_views == geometry.num_views, f"noise of {num_noise_views} views, rows of {geometry.num_views}"
    drawn = None if noise is None else draw_row_noise(plan, content, geometry, noise, seed)
    return lay_out_row(plan, content, geometry, drawn, mask_token_id=mask_token_id, pad_token_id=pad_token_id)


def draw_row_noise(plan: RowPlan, content: RowContent, geometry: RowGeometry, noise: NoiseSpec, seed: int) -> RowNoise:
    """The noise of every segment, joined; each segment has its own, whatever lies beside it."""
    tokens = _SegmentTokens.of(plan, content, geometry)
    shape = (noise.num_views + 1, len(content.clean_ids))
    drawn = RowNoise(np.zeros(shape, np.bool_), np.zeros(shape, np.float32), np.zeros(shape, np.float32))
    for segment, (start, length) in enumerate(zip(tokens.starts.tolist(), tokens.lengths.tolist(), strict=True)):
        span = slice(start, start + length)
        block_ids = tokens.block_ids[span]
        segment_noise = sample_noise(
            noise,
            seed=seed,
            epoch=plan.epoch,
            sample_id=int(content.sample_ids[segment]),
            ordinal=int(plan.segments[segment, ORDINAL]),
            row_key=_row_key(plan, content),
            block_ids=block_ids - block_ids[0],
            loss_mask=tokens.is_maskable[span],
        )
        drawn.is_masked[1:, span] = segment_noise.is_masked
        drawn.loss_weights[1:, span] = segment_noise.loss_weights
        drawn.t[1:, span] = segment_noise.t
    return drawn


def lay_out_row(
    plan: RowPlan,
    content: RowContent,
    geometry: RowGeometry,
    noise: RowNoise | None,
    *,
    mask_token_id: int,
    pad_token_id: int,
) -> Row:
    """Place the copies of a row's tokens, mask them and name the targets.

    Args:
        plan: segments of the row.
        content: their tokens.
        geometry: of the row.
        noise: which tokens of which view are masked; None for AR.
        mask_token_id: replaces masked tokens.
        pad_token_id: fills the rest of the row.

    Returns:
        The row. A position of a noisy view predicts its own token; in AR position i predicts token i + 1.
    """
    tokens = _SegmentTokens.of(plan, content, geometry)
    source, view = _slots(tokens, geometry)
    num_forward, length = len(source), geometry.row_length
    assert num_forward <= length, f"segments of {num_forward} tokens in a row of {length}"
    targets = _next_tokens(tokens, content) if noise is None else _masked_tokens(tokens, content, noise, source, view)
    is_masked = np.zeros(num_forward, np.bool_)
    if noise is not None:
        is_masked = noise.is_masked[view, source] | (tokens.is_hidden[source] & (view > 0))
    return Row(
        sample_ids=content.sample_ids,
        num_segments=np.array([len(content.sample_ids)], dtype=np.int64),
        row_keys=np.array([_row_key(plan, content)], dtype=np.int64),
        input_ids=_padded(np.where(is_masked, mask_token_id, content.clean_ids[source]), length, pad_token_id),
        position_ids=_padded(tokens.position_ids[source], length, 0),
        roles=np.stack(
            [
                _padded(tokens.doc_ids[source], length, PADDING_DOC),
                _padded(tokens.block_ids[source], length, 0),
                _padded(view, length, 0),
            ],
            axis=-1,
        ).astype(np.int32),
        is_masked=np.append(is_masked, np.zeros(length - num_forward, np.bool_)),
        target_positions=targets.positions,
        target_ids=targets.ids,
        target_t=targets.t,
        loss_weights=targets.weights,
        num_maskable=targets.num_maskable,
        num_document_tokens=len(content.clean_ids),
        num_forward_tokens=num_forward,
    )


@dataclass(frozen=True)
class _Targets:
    """Per target ([T]): its slot in the row, token, weight and noise level; and what could have been one."""

    positions: IntArray
    ids: IntArray
    weights: FloatArray
    t: FloatArray
    num_maskable: int


@dataclass(frozen=True)
class _SegmentTokens:
    """Per document token of a row ([n], each token once), and per segment ([p]).

    `is_noisy` and `is_clean` say which tokens a noisy view and the clean copy hold; `is_hidden` ones show the mask
    token in every noisy view without being a target.
    """

    lengths: IntArray
    starts: IntArray
    doc_ids: IntArray
    position_ids: IntArray
    block_ids: IntArray
    is_maskable: BoolArray
    is_hidden: BoolArray
    is_noisy: BoolArray
    is_clean: BoolArray

    @classmethod
    def of(cls, plan: RowPlan, content: RowContent, geometry: RowGeometry) -> _SegmentTokens:
        lengths = plan.segments[:, LENGTH]
        starts = row_starts(lengths)
        num_tokens = len(content.clean_ids)
        assert num_tokens == lengths.sum(), f"{num_tokens} tokens for segments of {lengths.sum()}"
        doc_ids = np.repeat(np.arange(len(lengths)), lengths)
        index = np.arange(num_tokens)
        position_ids = index - starts[doc_ids]
        if geometry.objective == "ar":
            block_ids = position_ids
        else:
            block_ids = (index if geometry.block_origin == "row" else position_ids) // geometry.block_size
        kinds = np.full(num_tokens, MASKABLE, np.uint8) if content.kinds is None else content.kinds
        is_noisy, is_clean = _needed_copies(doc_ids, block_ids, kinds == MASKABLE, geometry)
        return cls(
            lengths=lengths,
            starts=starts,
            doc_ids=doc_ids,
            position_ids=position_ids,
            block_ids=block_ids,
            is_maskable=kinds == MASKABLE,
            is_hidden=kinds == MASKED,
            is_noisy=is_noisy,
            is_clean=is_clean,
        )


def _row_key(plan: RowPlan, content: RowContent) -> int:
    return mix_key(plan.epoch, int(content.sample_ids[0])) if len(content.sample_ids) else 0


def _padded(values: IntArray, length: int, fill: int) -> IntArray:
    padded = np.full(length, fill, dtype=np.int64)
    padded[: len(values)] = values
    return padded


def _needed_copies(
    doc_ids: IntArray, block_ids: IntArray, is_maskable: BoolArray, geometry: RowGeometry
) -> tuple[BoolArray, BoolArray]:
    """Which tokens the noisy views and the clean copy must hold.

    Args:
        doc_ids: [n] int64 segment of each token.
        block_ids: [n] int64 its block.
        is_maskable: [n] bool whether it may carry a loss.
        geometry: of the row.

    Returns:
        [n] bool and [n] bool. They agree with `geometry.forward_tokens`, which knows spans alone.
    """
    everything = np.ones(len(doc_ids), np.bool_)
    if geometry.objective == "ar" or not len(doc_ids):
        return ~everything, everything
    # 1 number the blocks of the row: a block ends where the document or the block changes
    is_first = np.append(True, (np.diff(doc_ids) != 0) | (np.diff(block_ids) != 0))
    block = np.cumsum(is_first) - 1
    # 2 a noisy block needs a token that may carry a loss
    is_noisy = np.bincount(block, is_maskable)[block] > 0 if geometry.prune_clean else everything
    # 3 a clean block needs a noisy one behind it in its document
    last = np.full(int(doc_ids[-1]) + 1, -1)
    np.maximum.at(last, doc_ids[is_noisy], block[is_noisy])
    if geometry.prune_clean:
        return is_noisy, block < last[doc_ids]
    has_several = np.bincount(doc_ids, is_first) > 1
    return is_noisy, has_several[doc_ids]


def _slots(tokens: _SegmentTokens, geometry: RowGeometry) -> tuple[IntArray, IntArray]:
    """Which document token stands in each slot of the row ([f] index), and in which view ([f])."""
    views = [*range(1, geometry.num_views + 1), 0]
    noisy, clean = np.flatnonzero(tokens.is_noisy), np.flatnonzero(tokens.is_clean)
    source = np.concatenate([*[noisy] * geometry.num_views, clean])
    view = np.repeat(views, [*[len(noisy)] * geometry.num_views, len(clean)])
    # View by view over all documents; a stable sort brings each document's views together, in their order.
    order = np.argsort(tokens.doc_ids[source], kind="stable")
    return source[order], view[order]


def _next_tokens(tokens: _SegmentTokens, content: RowContent) -> _Targets:
    """AR: every token predicts its successor in the segment, where that one may carry a loss."""
    has_successor = tokens.position_ids + 1 < tokens.lengths[tokens.doc_ids]
    positions = np.flatnonzero(has_successor & np.append(tokens.is_maskable[1:], False))
    count = len(positions)
    return _Targets(
        positions, content.clean_ids[positions + 1], np.ones(count, np.float32), np.zeros(count, np.float32), count
    )


def _masked_tokens(
    tokens: _SegmentTokens, content: RowContent, noise: RowNoise, source: IntArray, view: IntArray
) -> _Targets:
    """Block diffusion: every masked token predicts itself.

    Args:
        tokens: of the row.
        content: of the row.
        noise: of the row.
        source: [f] int64 document token of each slot.
        view: [f] int64 view of each slot.
    """
    positions = np.flatnonzero(noise.is_masked[view, source])
    of_target = view[positions], source[positions]
    return _Targets(
        positions,
        content.clean_ids[source[positions]],
        noise.loss_weights[of_target],
        noise.t[of_target],
        (len(noise.is_masked) - 1) * int(tokens.is_maskable.sum()),
    )

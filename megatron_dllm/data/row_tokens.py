"""The tokens of a row before its noise is drawn: those that every noisy view shows, and those of the clean copies.

Noisy tokens come segment by segment, and in a segment noisy block by noisy block, see `data.noisy_blocks`. In plain
text they are the row's document tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from megatron_dllm.data.geometry import RowGeometry, row_starts
from megatron_dllm.data.noisy_blocks import NoisyBlocks, Turns, clean_stops, find_noisy_blocks
from megatron_dllm.data.spans import MASKABLE, MASKED, Spans

IntArray = NDArray[np.int64]
BoolArray = NDArray[np.bool_]


@dataclass(frozen=True)
class RowContent:
    """The tokens of a row's segments, joined.

    Attributes:
        clean_ids: [n] int64 tokens of all segments, one segment after the other.
        sample_ids: [p] int64 sample id of each segment: the corpus position of its first token.
        spans: of the segments; None: every token may carry a loss.
        num_sibling_bits: samples whose ids differ in so many of the lowest bits alone have the same noise.
    """

    clean_ids: IntArray
    sample_ids: IntArray
    spans: Spans | None = None
    num_sibling_bits: int = 0

    @property
    def noise_ids(self) -> IntArray:
        """[p] int64 what the noise of each segment follows from."""
        return self.sample_ids >> self.num_sibling_bits


@dataclass(frozen=True)
class CopyTokens:
    """Tokens of a copy, [m].

    Attributes:
        ids: token ids.
        segments: the segment of the row that each lies in.
        position_ids: place in the segment.
        block_ids: number of the block, in roles.
    """

    ids: IntArray
    segments: IntArray
    position_ids: IntArray
    block_ids: IntArray


@dataclass(frozen=True)
class NoisyTokens(CopyTokens):
    """Tokens of one noisy view, [m].

    Attributes:
        noisy_block_ids: the noisy block that each lies in, counted over the row.
        copies: which copy of its block that is, from 0.
        is_maskable: whether the token may be masked, to carry a loss.
        is_hidden: whether it shows the mask token in every view without one.
        is_fill: whether it is an end-of-text token behind a turn.
        turns: the turn that it belongs to, counted over the row; without meaning where it is not maskable.
    """

    noisy_block_ids: IntArray
    copies: IntArray
    is_maskable: BoolArray
    is_hidden: BoolArray
    is_fill: BoolArray
    turns: IntArray


@dataclass(frozen=True)
class LeadingTokens:
    """First tokens of blocks that carry a loss where the slot before a token predicts it, [l].

    Attributes:
        places: the last clean token of the block before, which predicts it, counted over the row's clean tokens.
        ids: token ids.
        segments: the segment of the row that each lies in.
        turns: the turn that it belongs to, counted over the row.
    """

    places: IntArray
    ids: IntArray
    segments: IntArray
    turns: IntArray


@dataclass(frozen=True)
class RowTokens:
    """The tokens of a row's segments.

    Attributes:
        noisy: of one view, which all views show alike; none of them in AR.
        clean: of the clean copies.
        leading: first tokens of blocks that the clean copy predicts; none without a shift.
        num_document_tokens: tokens of the segments, and of the fill, each once.
    """

    noisy: NoisyTokens
    clean: CopyTokens
    leading: LeadingTokens
    num_document_tokens: int


def collect_tokens(
    content: RowContent, lengths: IntArray, geometry: RowGeometry, eos_token_id: int | None
) -> RowTokens:
    """The tokens of a row.

    Args:
        content: of the row.
        lengths: [p] int64 tokens of each segment.
        geometry: of the row.
        eos_token_id: fills blocks; needed where the geometry fills any.
    """
    clean_ids, spans = content.clean_ids, content.spans
    assert len(clean_ids) == lengths.sum(), f"{len(clean_ids)} tokens for segments of {lengths.sum()}"
    starts, everything = row_starts(lengths), spans
    if everything is None:  # plain text: one span is all of a segment, and nothing is filled
        geometry = replace(geometry, fill="none")
        table = np.stack([np.zeros_like(lengths), lengths, np.full_like(lengths, MASKABLE)], axis=1)
        everything = Spans(np.arange(len(lengths) + 1), table)
    if geometry.objective == "ar":
        blocks, num_clean = NoisyBlocks.none(), lengths
    else:
        blocks = find_noisy_blocks(geometry, lengths, starts, everything)
        num_clean = clean_stops(geometry, lengths, blocks, everything)
    noisy = _noisy_tokens(clean_ids, lengths, everything, blocks, geometry, eos_token_id)
    leading_blocks = blocks if geometry.is_shifted else NoisyBlocks.none()
    if geometry.is_shifted:
        noisy = replace(noisy, is_maskable=noisy.is_maskable & ~_is_first(noisy, blocks))
    return RowTokens(
        noisy=noisy,
        clean=_clean_tokens(clean_ids, starts, num_clean, geometry),
        leading=_leading_tokens(clean_ids, lengths, num_clean, everything, leading_blocks),
        num_document_tokens=len(clean_ids) + int(noisy.is_fill.sum()),
    )


def _clean_tokens(clean_ids: IntArray, starts: IntArray, num_clean: IntArray, geometry: RowGeometry) -> CopyTokens:
    """The first num_clean [p] tokens of the segments, which start at starts [p] of clean_ids [n]."""
    segments = np.repeat(np.arange(len(starts)), num_clean)
    positions = np.arange(len(segments)) - np.repeat(np.cumsum(num_clean) - num_clean, num_clean)
    is_ar = geometry.objective == "ar"
    blocks = positions if is_ar else (positions + geometry.grid_starts(starts)[segments]) // geometry.clean_grid
    return CopyTokens(clean_ids[positions + starts[segments]], segments, positions, blocks)


def _noisy_tokens(
    clean_ids: IntArray,
    lengths: IntArray,
    spans: Spans,
    blocks: NoisyBlocks,
    geometry: RowGeometry,
    eos_token_id: int | None,
) -> NoisyTokens:
    """What each noisy block shows: tokens of its segment, then its fill.

    Args:
        clean_ids: [n] int64 tokens of the segments.
        lengths: [p] int64 tokens of each segment.
        spans: of the segments.
        blocks: of the segments.
        geometry: of the row.
        eos_token_id: the fill.
    """
    widths, starts = blocks.num_tokens, row_starts(lengths)
    block = np.repeat(np.arange(len(widths)), widths)
    segments = blocks.segment[block]
    positions = blocks.start[block] + np.arange(len(block)) - np.repeat(np.cumsum(widths) - widths, widths)
    is_fill = positions >= blocks.stop[block]
    assert eos_token_id is not None or not is_fill.any(), "blocks are filled with the end-of-text token"
    # Of the fill, the last token before it.
    token = np.minimum(positions, blocks.stop[block] - 1) + starts[segments]
    kinds = spans.kinds(lengths)[token]
    is_behind = ~is_fill & (positions >= blocks.loss_stop[block])
    return NoisyTokens(
        ids=np.where(is_fill, -1 if eos_token_id is None else eos_token_id, clean_ids[token]),
        segments=segments,
        position_ids=positions,
        block_ids=geometry.noisy_blocks(blocks.block[block]),
        noisy_block_ids=block,
        copies=blocks.copy[block],
        is_maskable=is_fill | ((kinds == MASKABLE) & (positions >= blocks.loss_start[block]) & ~is_behind),
        is_hidden=~is_fill & ((kinds == MASKED) | is_behind),
        is_fill=is_fill,
        turns=_turns(spans, starts, token),
    )


def _is_first(noisy: NoisyTokens, blocks: NoisyBlocks) -> BoolArray:
    """[m] whether a noisy token is the first one of its block."""
    is_first: BoolArray = noisy.position_ids == blocks.start[noisy.noisy_block_ids]
    return is_first


def _leading_tokens(
    clean_ids: IntArray, lengths: IntArray, num_clean: IntArray, spans: Spans, blocks: NoisyBlocks
) -> LeadingTokens:
    """First tokens of blocks that carry a loss; nothing predicts the first token of a segment.

    Args:
        clean_ids: [n] int64 tokens of the segments.
        lengths: [p] int64 tokens of each segment.
        num_clean: [p] int64 tokens of their clean copies.
        spans: of the segments.
        blocks: of the segments.
    """
    starts, segments, first = row_starts(lengths), blocks.segment, blocks.start
    is_trained = (first > 0) & (first >= blocks.loss_start) & (first < blocks.loss_stop)
    is_trained &= spans.kinds(lengths)[first + starts[segments]] == MASKABLE
    segments, first = segments[is_trained], first[is_trained]
    token = first + starts[segments]
    places = row_starts(num_clean)[segments] + first - 1
    return LeadingTokens(places, clean_ids[token], segments, _turns(spans, starts, token))


def _turns(spans: Spans, starts: IntArray, token: IntArray) -> IntArray:
    """[m] the turn of each token [m], counted over a row whose segments begin at starts [p]."""
    turns = Turns.of(spans)
    return np.searchsorted(turns.start + starts[turns.segment], token, side="right") - 1

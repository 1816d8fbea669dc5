"""Which noisy blocks segments need where only some tokens may carry a loss, and what each of them shows.

A turn is what a chat's assistant says at once: spans that touch each other. In most blocks there is one turn, and the
noisy block shows the block's tokens. Two things happen where a turn ends in mid-block:

fill: "eos" puts end-of-text tokens behind it up to the block's end, which carry a loss as its own tokens do. They stand
    in noisy blocks only: no clean copy holds them, and the corpus does not know them.
turn_boundary says what else the block shows, where the document goes on behind the turn. At serving nothing is there:
    "split_views"  each turn has a noisy block of its own, which ends with the turn; those of one block are its copies
    "mask_later"   one noisy block, in which everything behind the first turn shows the mask token without a loss
    "last"         only the last turn of a document carries a loss, and its last block ends with it
    "all"          one noisy block with everything in it: turns see what follows them

Blocks of 8, an answer a of 3 tokens, a question q of 4, an answer b of 5, with "split_views" and "eos" (E):

    document         a a a q q q q b | b b b b
    noisy blocks     a a a E E E E E      copy 0 of block 0, turn a
                     a a a q q q q b      copy 1 of block 0, turn b
                     b b b b E E E E      copy 0 of block 1, turn b
    clean            a a a q q q q b      which block 1 reads

A turn that ends with a span without a loss was cut off, and is not filled.

With a shift, the slot before a token predicts it. Then the first token of a block is never masked: the last clean token
of the block before predicts it. A noisy block with no other token to train shows none at all.

Everything follows from lengths and spans; packing and the building of rows both read this.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from megatron_dllm.data.geometry import RowGeometry, row_starts
from megatron_dllm.data.spans import KIND, MASKABLE, START, STOP, Spans

IntArray = NDArray[np.int64]


@dataclass(frozen=True)
class Turns:
    """The turns of segments.

    Attributes:
        of_span: [k] int64 the turn that each span belongs to.
        segment: [u] int64 the segment of each turn.
        start: [u] int64 its first token.
        stop: [u] int64 one past its last token.
        is_cut: [u] bool whether its last span carries no loss.
    """

    of_span: IntArray
    segment: IntArray
    start: IntArray
    stop: IntArray
    is_cut: NDArray[np.bool_]

    @classmethod
    def of(cls, spans: Spans) -> Turns:
        """The turns that spans make."""
        owner, table = spans.owner, spans.table
        is_first = np.ones(len(table), np.bool_)
        is_first[1:] = (owner[1:] != owner[:-1]) | (table[1:, START] != table[:-1, STOP])
        first = np.flatnonzero(is_first)
        last = np.append(first[1:], len(table))[: len(first)] - 1
        return cls(
            of_span=np.cumsum(is_first) - 1,
            segment=owner[first],
            start=table[first, START].astype(np.int64),
            stop=table[last, STOP].astype(np.int64),
            is_cut=table[last, KIND] != MASKABLE,
        )


@dataclass(frozen=True)
class NoisyBlocks:
    """Noisy blocks by segment, block and copy; a view holds each of them once.

    Attributes:
        segment: [q] int64.
        block: [q] int64 number in the grid.
        copy: [q] int64 which of the noisy blocks of this block it is, from 0.
        start: [q] int64 first token of the segment that it shows.
        stop: [q] int64 one past the last one.
        loss_start: [q] int64 first token that it may train; what is maskable before it shows itself.
        loss_stop: [q] int64 one past the last one; what follows shows the mask token.
        num_fill: [q] int64 end-of-text tokens behind the last one, which carry a loss.
    """

    segment: IntArray
    block: IntArray
    copy: IntArray
    start: IntArray
    stop: IntArray
    loss_start: IntArray
    loss_stop: IntArray
    num_fill: IntArray

    @classmethod
    def none(cls) -> NoisyBlocks:
        """No block at all."""
        return cls(*[np.zeros(0, np.int64) for _ in cls.__dataclass_fields__])

    @property
    def num_tokens(self) -> IntArray:
        """[q] int64 tokens of each, those of the fill included."""
        return self.stop - self.start + self.num_fill

    def sums(self, values: IntArray, num_segments: int) -> IntArray:
        """[num_segments] int64 sums by segment of [q] values."""
        sums = np.zeros(num_segments, dtype=np.int64)
        np.add.at(sums, self.segment, values)
        return sums


def find_noisy_blocks(geometry: RowGeometry, lengths: IntArray, starts: IntArray, spans: Spans) -> NoisyBlocks:
    """The noisy blocks of segments.

    Args:
        geometry: of the row: block diffusion.
        lengths: [p] tokens of the segments.
        starts: [p] document tokens before each segment in its row.
        spans: of the segments.
    """
    grid, size, turns = geometry.grid_starts(starts), geometry.block_size, Turns.of(spans)
    # 1 every maskable span touches some blocks: with size 4, tokens 6..9 touch blocks 1..2
    table, turn = spans.table.astype(np.int64), turns.of_span
    is_trained = table[:, KIND] == MASKABLE
    if geometry.turn_boundary == "last":
        is_trained &= turn == _last_turns(turns, turn[is_trained], len(lengths))[spans.owner]
    table, turn = table[is_trained], turn[is_trained]
    origin = grid[turns.segment[turn]]
    first, last = (table[:, START] + origin) // size, (table[:, STOP] - 1 + origin) // size
    block, turn = _ranges(first, last - first + 1), np.repeat(turn, last - first + 1)
    # 2 a turn has one noisy block in each of them, however many spans it has there
    is_kept = _differs(turn, block)
    block, turn = block[is_kept], turn[is_kept]
    # 3 the turns of one block are told apart by copies, or the first one stands for all
    is_first = _differs(turns.segment[turn], block)
    run_start = np.maximum.accumulate(np.where(is_first, np.arange(len(block)), 0))
    copy = np.arange(len(block)) - run_start
    if geometry.turn_boundary in ("mask_later", "all"):
        block, turn, copy = block[is_first], turn[is_first], copy[is_first]
    found = _show(geometry, lengths, grid, turns, turn, block, copy)
    if not geometry.prune_clean:
        return _with_others(geometry, lengths, grid, found)
    return _without_lone_firsts(found, lengths, spans) if geometry.is_shifted else found


def clean_stops(geometry: RowGeometry, lengths: IntArray, blocks: NoisyBlocks, spans: Spans) -> IntArray:
    """[p] int64 tokens of the clean copies: those before the last noisy block, and those with an AR target.

    All tokens of a segment that needs any, where nothing is left out.

    Args:
        geometry: of the row: block diffusion.
        lengths: [p] tokens of the segments.
        blocks: of the segments.
        spans: of the segments.
    """
    stops = np.zeros_like(lengths)
    np.maximum.at(stops, blocks.segment, blocks.start)
    if geometry.ar_share:  # the token before the last one that may carry a loss predicts it
        trained = spans.maskable()
        np.maximum.at(stops, trained.owner, trained.table[:, STOP].astype(np.int64) - 1)
    return stops if geometry.prune_clean else np.where(stops > 0, lengths, 0)


def _show(
    geometry: RowGeometry,
    lengths: IntArray,
    grid: IntArray,
    turns: Turns,
    turn: IntArray,
    block: IntArray,
    copy: IntArray,
) -> NoisyBlocks:
    """What noisy blocks show.

    Args:
        geometry: of the row.
        lengths: [p] tokens of the segments.
        grid: [p] tokens of the grid before each segment.
        turns: of the segments.
        turn: [q] the turn that each noisy block is for.
        block: [q] its number.
        copy: [q] which copy of that block it is.
    """
    segment = turns.segment[turn]
    start, end = _bounds(geometry.block_size, grid[segment], block)
    is_alone = geometry.turn_boundary in ("split_views", "last")
    turn_stop, length = turns.stop[turn], lengths[segment]
    stop = np.minimum(end, turn_stop if is_alone else length)
    ends_here = (turn_stop <= end) & (stop == turn_stop)
    loss_start, loss_stop = turns.start[turn], turn_stop
    if geometry.turn_boundary == "all":
        loss_start, loss_stop = np.zeros_like(stop), length
        # The block's turns are one; the last of the document decides whether that ends with the document.
        closing = _last_turns(turns, np.arange(len(turns.segment)), len(lengths))[segment]
        turn = closing
        ends_here = (turns.stop[closing] == length) & (stop == length)
    is_filled = ends_here & ~turns.is_cut[turn] & (geometry.fill == "eos")
    return NoisyBlocks(segment, block, copy, start, stop, loss_start, loss_stop, np.where(is_filled, end - stop, 0))


def _without_lone_firsts(found: NoisyBlocks, lengths: IntArray, spans: Spans) -> NoisyBlocks:
    """These, without the tokens of those that train none behind their first; they keep their place in the document.

    Args:
        found: noisy blocks.
        lengths: [p] tokens of the segments.
        spans: of the segments.
    """
    num_before = np.append(0, np.cumsum(spans.kinds(lengths) == MASKABLE))
    base = row_starts(lengths)[found.segment]
    first = base + np.maximum(found.start + 1, found.loss_start)
    stop = base + np.minimum(found.stop, found.loss_stop)
    is_needed = (num_before[np.maximum(stop, first)] > num_before[first]) | (found.num_fill > 0)
    return replace(found, stop=np.where(is_needed, found.stop, found.start))


def _with_others(geometry: RowGeometry, lengths: IntArray, grid: IntArray, found: NoisyBlocks) -> NoisyBlocks:
    """These, and all other blocks of the segments, which train nothing."""
    first, last = grid // geometry.block_size, (grid + lengths - 1) // geometry.block_size
    counts = last - first + 1
    segment, block = np.repeat(np.arange(len(lengths)), counts), _ranges(first, counts)
    width = int(last.max(initial=0)) + 1
    is_other = ~np.isin(segment * width + block, found.segment * width + found.block)
    segment, block = segment[is_other], block[is_other]
    start, end = _bounds(geometry.block_size, grid[segment], block)
    none, stop = np.zeros_like(block), np.minimum(end, lengths[segment])
    others = NoisyBlocks(segment, block, none, start, stop, stop, stop, none)
    names = NoisyBlocks.__dataclass_fields__
    both = {name: np.concatenate([getattr(found, name), getattr(others, name)]) for name in names}
    order = np.lexsort((both["copy"], both["block"], both["segment"]))
    return NoisyBlocks(**{name: values[order] for name, values in both.items()})


def _bounds(size: int, grid: IntArray, block: IntArray) -> tuple[IntArray, IntArray]:
    """[q] the first token of each block [q] that its segment has, and [q] the end of the block."""
    return np.maximum(block * size - grid, 0), (block + 1) * size - grid


def _last_turns(turns: Turns, among: IntArray, num_segments: int) -> IntArray:
    """[num_segments] the last of some turns [n] in each segment; -1 where there is none."""
    last = np.full(num_segments, -1)
    np.maximum.at(last, turns.segment[among], among)
    return last


def _ranges(first: IntArray, counts: IntArray) -> IntArray:
    """first[0], first[0] + 1, ... so many as counts[0] says, then the same from first[1]; both are [n]."""
    ranges: IntArray = np.arange(counts.sum()) + np.repeat(first - (np.cumsum(counts) - counts), counts)
    return ranges


def _differs(*columns: IntArray) -> NDArray[np.bool_]:
    """[n] whether an entry of some columns [n] differs from the one before it; the first one does."""
    differs = np.ones(len(columns[0]), np.bool_)
    differs[1:] = np.any([column[1:] != column[:-1] for column in columns], axis=0)
    return differs

"""What segments cost: the tokens that the model sees, and those that progress counts.

A segment of n tokens takes `num_views` noisy copies, and a clean copy of the tokens that some
later block reads: all but its last block. Where clean tokens predict their next one, the clean copy lacks the last
token alone. A segment of one block has no clean copy, so block_size equal to context_length is MDLM. An AR segment is
its n clean tokens.

Where spans say which tokens may carry a loss, a segment costs less: noisy copies of the blocks that hold such
a token, and a clean copy of what stands before the last of these blocks. A prompt of 1000 tokens and an
answer of 216 in blocks of 32 cost 224 + 1184 = 1408 tokens with one view, not 1216 + 1184 = 2400:

    noisy   blocks 31..37, tokens 992..1215: the answer begins inside block 31
    clean   blocks 0..36,  tokens 0..1183
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from megatron_dllm.data.geometry import RowGeometry, clean_lengths, noisy_lengths
from megatron_dllm.data.noisy_blocks import clean_stops, find_noisy_blocks
from megatron_dllm.data.spans import START, STOP, Spans

IntArray = NDArray[np.int64]


def forward_tokens(geometry: RowGeometry, lengths: IntArray, starts: IntArray, spans: Spans | None = None) -> IntArray:
    """Tokens that segments take in their row.

    Args:
        geometry: of the row.
        lengths: [p] tokens of the segments, each at least 1.
        starts: [p] document tokens before each segment in its row; they matter only for the row grid.
        spans: of the segments; None: every token may carry a loss.

    Returns:
        [p] int64.
    """
    if geometry.objective == "ar":
        return lengths
    if spans is None:
        noisy = noisy_lengths(geometry, lengths, starts)
        return geometry.num_views * noisy + clean_lengths(geometry, lengths, starts)
    blocks = find_noisy_blocks(geometry, lengths, starts, spans)
    clean = clean_stops(geometry, lengths, blocks, spans)
    return geometry.num_views * blocks.sums(blocks.num_tokens, len(lengths)) + clean


def document_tokens(geometry: RowGeometry, lengths: IntArray, spans: Spans | None = None) -> IntArray:
    """Tokens of segments that progress counts: each once, whatever its copies, those of the fill included.

    Args:
        geometry: of the row.
        lengths: [p] tokens of the segments, each at least 1.
        spans: of the segments; None: every token may carry a loss.

    Returns:
        [p] int64.
    """
    if spans is None or geometry.fill == "none":
        return lengths
    blocks = find_noisy_blocks(geometry, lengths, np.zeros_like(lengths), spans)
    return lengths + blocks.sums(blocks.num_fill, len(lengths))


def segment_costs(geometry: RowGeometry, lengths: IntArray, spans: Spans | None = None) -> IntArray:
    """Tokens that segments take in a row; under the row grid the most they can take, wherever they stand.

    Args:
        geometry: of the row.
        lengths: [p] tokens of the segments, each at least 1.
        spans: of the segments; None: every token may carry a loss.

    Returns:
        [p] int64.
    """
    if geometry.objective == "ar" or geometry.block_origin == "document":
        return forward_tokens(geometry, lengths, np.zeros_like(lengths), spans)
    if not geometry.prune_clean:
        return geometry.num_views * lengths + np.where(lengths > 1, lengths, 0)
    # In the worst place a block ends right before the last token that may carry a loss.
    if spans is None:
        return geometry.num_views * lengths + lengths - 1
    spans, owner = spans.maskable(), spans.maskable().owner
    widest = spans.table[:, STOP] - spans.table[:, START] + 2 * (geometry.block_size - 1)
    noisy, last = np.zeros_like(lengths), np.zeros_like(lengths)
    np.add.at(noisy, owner, widest)
    np.maximum.at(last, owner, spans.table[:, STOP] - 1)
    return geometry.num_views * np.minimum(noisy, lengths) + last

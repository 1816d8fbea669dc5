"""The global sequence of rows: which segments of which documents every training row holds.

The sequence is a pure function of (seed, epoch, geometry), the same whatever the parallel layout is:

    documents in a shuffled order  ->  chunks of `chunk` documents  ->  segments of at most context_length
    ->  best fit, in order of arrival, into rows of row_length  ->  rows in the order they were opened

A row is filled by what its segments really cost: noisy views of the blocks with a token that may carry a
loss, plus the clean tokens that a later such block reads. Lengths and spans decide; tokens are not read.
Only one chunk is planned at a time, so neither memory nor start-up time grows with the corpus. A stage of preference
pairs packs them into whole global batches instead (`data.pair_packing`).

When the geometry changes in mid-chunk, the segments not yet emitted are packed anew. The position is
therefore "the n-th row under geometry A, then the m-th under B, ..." of one chunk: a few numbers, from
which everything else is computed again. (Rows already emitted can be left out of a packing without
moving a segment of the others, as best fit never takes a row that is absent. So a position saved anywhere
continues exactly.)
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_dllm.data.costs import document_tokens, forward_tokens, segment_costs
from megatron_dllm.data.geometry import RowGeometry, row_starts
from megatron_dllm.data.pair_packing import assign_pair_rows
from megatron_dllm.data.shuffle import KeyedPermutation
from megatron_dllm.data.spans import Spans, segment_spans

# Columns of a segment.
DOCUMENT, OFFSET, LENGTH, ORDINAL = 0, 1, 2, 3

Segments = NDArray[np.int64]


@dataclass(frozen=True)
class RowPlan:
    """What one row holds.

    Attributes:
        segments: [p, 4] int64 (document, offset, length, ordinal) in the order they stand in the row;
            `ordinal` counts the segments of the epoch in shuffled order.
        epoch: pass over the corpus, from 0.
        progress: share of the stage that was done before the row's global batch.
        is_ar: an AR row of a stage whose other rows are noisy, see `data.ar_rows`.
    """

    segments: Segments
    epoch: int
    progress: float = 1.0
    is_ar: bool = False


def split_segments(segments: Segments, context_length: int) -> Segments:
    """Cut segments at multiples of `context_length` in their document; segments of no tokens vanish.

    Args:
        segments: [p, 4] segments of any length.
        context_length: longest segment allowed.

    Returns:
        [q, 4] segments in the same order; parts of a segment share its ordinal.
    """
    segments = segments[segments[:, LENGTH] > 0]
    starts, ends = segments[:, OFFSET], segments[:, OFFSET] + segments[:, LENGTH]
    first_cut = starts // context_length
    num_parts = (ends - 1) // context_length - first_cut + 1
    parts = np.repeat(segments, num_parts, axis=0)
    part = np.arange(len(parts)) - np.repeat(np.cumsum(num_parts) - num_parts, num_parts)
    cuts = (np.repeat(first_cut, num_parts) + part) * context_length
    parts[:, OFFSET] = np.maximum(cuts, np.repeat(starts, num_parts))
    parts[:, LENGTH] = np.minimum(cuts + context_length, np.repeat(ends, num_parts)) - parts[:, OFFSET]
    return parts


def trainable_segments(segments: Segments, context_length: int, spans: Spans | None) -> Segments:
    """[q, 4] parts of segments that fit the context, those left out that hold no token with a loss.

    Args:
        segments: [p, 4] segments of any length.
        context_length: longest segment allowed.
        spans: of all documents of the source; None: plain text.
    """
    parts = split_segments(segments, context_length)
    of_parts = segment_spans(spans, parts)
    return parts if of_parts is None else parts[np.diff(of_parts.maskable().bounds) > 0]


def assign_rows(geometry: RowGeometry, lengths: NDArray[np.int64], spans: Spans | None = None) -> NDArray[np.int64]:
    """Best fit: every segment, in order of arrival, goes to the fullest row that has room, else to a new row.

        1 cost   the most tokens that each segment can take: its noisy views and the clean blocks that are read
        2 find   the smallest room that holds it; of equal rooms, the row that was opened first
        3 place  it there, and sort the row's smaller room back in; a room that no segment fits is forgotten

    Costs 9, 5, 4, 7, 2 in rows of 16: row 0 takes 9 and 5 and has 2 left, row 1 takes 4 and 7 and has 5 left, and the
    last goes to row 0, which is then full.

    Args:
        geometry: of the rows.
        lengths: [p] tokens of the segments, each at most context_length.
        spans: of the segments; None: every token may carry a loss.

    Returns:
        [p] int64 row of each segment, rows counted in the order of opening.
    """
    bounds = segment_costs(geometry, lengths, spans).tolist()
    smallest = min(bounds, default=0)
    filled: list[int] = []  # document tokens of every row
    rooms: list[int] = []  # sorted: (free tokens << 32) + row
    rows = np.empty(len(bounds), dtype=np.int64)
    for segment, (bound, length) in enumerate(zip(bounds, lengths.tolist(), strict=True)):
        # Sorted by room first, so the first entry that is not smaller than (bound, row 0) is the best fit.
        place = bisect_left(rooms, bound << 32)
        if place < len(rooms):
            room, row = divmod(rooms.pop(place), 1 << 32)
        else:
            room, row = geometry.row_length, len(filled)
            filled.append(0)
        if geometry.block_origin == "document":
            room -= bound
        else:
            # A segment costs less than its bound, depending on where it comes to stand.
            own_spans = None if spans is None else spans.take(np.array([segment]))
            room -= int(forward_tokens(geometry, np.array([length]), np.array([filled[row]]), own_spans)[0])
        filled[row] += length
        rows[segment] = row
        # Rows that are as good as full are left out, so the list stays short.
        if room >= smallest:
            insort(rooms, (room << 32) + row)
    return rows


class RowStream:
    """The global sequence of rows, from any position on.

    Every rank holds one and plans every row; planning reads document lengths, never tokens. Epochs
    follow each other without end.

    Args:
        document_lengths: [d] tokens of every document, e.g. memory-mapped; documents of 0 tokens are skipped.
        seed: chooses the order of the documents, a different one in every epoch.
        chunk: documents that are packed together.
        shuffle: false keeps the documents in their own order (validation).
        spans: of the documents; None: plain text. Segments without a token that may carry a loss are left out.
        first_number: what documents and ordinals begin at in the plans: those of a blend's other corpora stay apart.
        is_paired: documents 2i and 2i + 1 belong together (see `data.preference`) and are shuffled as one.
    """

    def __init__(
        self,
        document_lengths: NDArray[Any],
        seed: int,
        chunk: int,
        shuffle: bool = True,
        spans: Spans | None = None,
        first_number: int = 0,
        is_paired: bool = False,
    ) -> None:
        if len(document_lengths) == 0:
            raise ValueError("document_lengths (0 documents) must not be empty; tokenize a corpus with text in it.")
        if chunk < 1:
            raise ValueError(f"packing_chunk ({chunk}) must be at least 1; 1024 fills rows well.")
        self._lengths, self._spans, self._first_number = document_lengths, spans, first_number
        self._identity = {"num_documents": len(document_lengths), "seed": seed, "chunk": chunk, "shuffle": shuffle}
        if spans is not None:
            self._identity["num_spans"] = len(spans.table)
        self._seed, self._shuffle, self._is_paired = seed, shuffle, is_paired
        # A pair is never cut by the end of a chunk.
        self._chunk = chunk + chunk % 2 if is_paired else chunk
        self._num_chunks = -(-len(document_lengths) // self._chunk)
        self._epoch, self._chunk_index, self._num_segments_before, self._num_dropped = 0, 0, 0, 0
        self._emitted: list[tuple[RowGeometry, int]] = []  # of this chunk: rows under each geometry, in order
        self._planned: tuple[RowGeometry, list[Segments]] | None = None  # rows left in this chunk, last one first

    def next(self, geometry: RowGeometry) -> RowPlan:
        """The next row of the sequence, under `geometry`.

        Raises:
            ValueError: where no document of the corpus holds a token that may carry a loss.
        """
        rows = self._rows_left(geometry)
        num_tries = 0
        while not rows:
            if num_tries > self._num_chunks:
                raise ValueError(
                    f"document_lengths ({len(self._lengths)} documents) must hold a token that may carry a loss; "
                    "tokenize a corpus with text in it, and give its spans a maskable token."
                )
            num_tries += 1
            self._next_chunk(geometry)
            rows = self._rows_left(geometry)
        if self._emitted and self._emitted[-1][0] == geometry:
            self._emitted[-1] = (geometry, self._emitted[-1][1] + 1)
        else:
            self._emitted.append((geometry, 1))
        return RowPlan(segments=rows.pop(), epoch=self._epoch)

    def is_within_batch(self, geometry: RowGeometry) -> bool:
        """Whether the next row belongs to the global batch of pairs that the last one belongs to."""
        if geometry.rows_of_pairs is None or not self._emitted:
            return False
        last, num_rows = self._emitted[-1]
        return last == geometry and num_rows % geometry.rows_of_pairs != 0

    def state_dict(self) -> dict[str, Any]:
        """The position as plain numbers, fit for JSON; its size does not depend on the corpus."""
        return {
            "epoch": self._epoch,
            "chunk_index": self._chunk_index,
            # Named as in the checkpoints that were written before.
            "num_pieces_before": self._num_segments_before,
            # Segments of the chunks that are over, in all epochs, that held no token with a loss.
            "num_dropped": self._num_dropped,
            "emitted": [{"geometry": asdict(geometry), "num_rows": rows} for geometry, rows in self._emitted],
            "identity": dict(self._identity),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue behind the last row that was emitted before `state_dict` was called.

        Raises:
            ValueError: where the position belongs to another corpus, seed or chunk.
        """
        saved = state["identity"]
        for name in dict.fromkeys([*self._identity, *saved]):
            value, saved_value = self._identity.get(name), saved.get(name)
            if saved_value != value:
                raise ValueError(
                    f"{name} ({value}) differs from the saved data position's ({saved_value}): the rows "
                    "would not continue; restore the setting, or start a new run from the checkpoint's weights."
                )
        self._epoch, self._chunk_index = int(state["epoch"]), int(state["chunk_index"])
        self._num_segments_before = int(state["num_pieces_before"])
        self._num_dropped = int(state.get("num_dropped", 0))
        self._emitted = [(RowGeometry(**entry["geometry"]), int(entry["num_rows"])) for entry in state["emitted"]]
        self._planned = None

    def copy(self) -> RowStream:
        """An independent stream at the same position (the lengths are shared)."""
        other = RowStream(
            self._lengths,
            self._seed,
            self._identity["chunk"],
            self._shuffle,
            self._spans,
            self._first_number,
            self._is_paired,
        )
        other.load_state_dict(self.state_dict())
        return other

    def _rows_left(self, geometry: RowGeometry) -> list[Segments]:
        if self._planned is None or self._planned[0] != geometry:
            segments = self._chunk_segments(self._context_length_at_start(geometry))
            for earlier, num_rows in self._emitted:
                segments = trainable_segments(segments, earlier.context_length, self._spans)
                segments = segments[self._rows(segments, earlier) >= num_rows]
            segments = trainable_segments(segments, geometry.context_length, self._spans)
            rows = self._rows(segments, geometry)
            order = np.argsort(rows, kind="stable")
            segments = segments[order]
            segments[:, [DOCUMENT, ORDINAL]] += self._first_number
            plans = np.split(segments, np.cumsum(_row_sizes(rows, geometry))[:-1]) if len(rows) else []
            self._planned = (geometry, plans[::-1])
        return self._planned[1]

    def _context_length_at_start(self, geometry: RowGeometry) -> int:
        return self._emitted[0][0].context_length if self._emitted else geometry.context_length

    def _chunk_segments(self, context_length: int) -> Segments:
        """[p, 4] all segments of the current chunk, in order of arrival."""
        segments = trainable_segments(self._chunk_documents(), context_length, self._spans)
        segments[:, ORDINAL] = self._num_segments_before + np.arange(len(segments))
        return segments

    def _chunk_documents(self) -> Segments:
        """[p, 4] the documents of the current chunk as segments of any length, in order of arrival."""
        size = len(self._lengths)
        places = np.arange(self._chunk_index * self._chunk, min((self._chunk_index + 1) * self._chunk, size))
        documents = self._shuffled(places) if self._shuffle else places
        whole = np.zeros((len(documents), 4), dtype=np.int64)
        whole[:, DOCUMENT], whole[:, LENGTH] = documents, self._lengths[documents]
        whole = whole[whole[:, LENGTH] > 0]
        if self._spans is not None:
            self._spans.take(whole[:, DOCUMENT]).check(whole[:, DOCUMENT], whole[:, LENGTH])
        return whole

    def _shuffled(self, places: NDArray[np.int64]) -> NDArray[np.int64]:
        """[n] documents at places [n] of this epoch's order; of pairs the order of the pairs."""
        size, key = len(self._lengths), (self._seed, self._epoch)
        if not self._is_paired:
            return KeyedPermutation(size, key)(places)
        return 2 * KeyedPermutation(size // 2, key)(places // 2) + places % 2

    def _rows(self, segments: Segments, geometry: RowGeometry) -> NDArray[np.int64]:
        spans = segment_spans(self._spans, segments)
        if geometry.rows_of_pairs is None:
            return assign_rows(geometry, segments[:, LENGTH], spans)
        _check_pairs(segments, self._is_paired)
        return assign_pair_rows(geometry, segments[:, LENGTH], spans)

    def _next_chunk(self, geometry: RowGeometry) -> None:
        context_length = self._context_length_at_start(geometry)
        num_segments = len(self._chunk_segments(context_length))
        if self._spans is not None:
            self._num_dropped += len(split_segments(self._chunk_documents(), context_length)) - num_segments
        self._num_segments_before += num_segments
        self._chunk_index += 1
        if self._chunk_index == self._num_chunks:
            self._epoch, self._chunk_index, self._num_segments_before = self._epoch + 1, 0, 0
        self._emitted, self._planned = [], None


def _check_pairs(segments: Segments, is_paired: bool) -> None:
    """Segments [p, 4] must be both sides of pairs, whole; a stage of pairs refuses other documents before it starts."""
    documents = segments[:, DOCUMENT]
    is_right = is_paired and len(documents) % 2 == 0 and not (documents[::2] % 2).any()
    assert is_right and (documents[1::2] == documents[::2] + 1).all(), "the rows of a stage of pairs hold whole pairs"


def _row_sizes(rows: NDArray[np.int64], geometry: RowGeometry) -> NDArray[np.int64]:
    """[r] segments of each row, for the rows [p] of segments; the last batch of pairs is filled up with empty rows."""
    group = geometry.rows_of_pairs or 1
    num_rows = -(-(int(rows.max()) + 1) // group) * group
    return np.bincount(rows, minlength=num_rows)


@dataclass(frozen=True)
class RowFill:
    """Means over rows, in tokens: of the corpus, seen by the model, and padding left.

    `dropped_share` is of segments: those that were left out, since they hold no token that may carry a loss.
    """

    document_tokens: float
    forward_tokens: float
    padding_tokens: float
    dropped_share: float = 0.0


def row_forward_tokens(
    geometry: RowGeometry, lengths: Sequence[int] | NDArray[np.int64], spans: Spans | None = None
) -> int:
    """Tokens that segments take together in one row: what the model sees, padding apart.

    Args:
        geometry: of the row.
        lengths: [p] tokens of the segments, in row order.
        spans: of the segments; None: every token may carry a loss.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    return int(forward_tokens(geometry, lengths, row_starts(lengths), spans).sum())


def row_document_tokens(geometry: RowGeometry, lengths: NDArray[np.int64], spans: Spans | None = None) -> int:
    """Tokens of a row that progress counts: those of its segments, and of the fill, each once.

    Args:
        geometry: of the row.
        lengths: [p] tokens of the segments, in row order.
        spans: of the segments; None: every token may carry a loss.
    """
    return int(document_tokens(geometry, lengths, spans).sum())


def estimate_fill(
    document_lengths: NDArray[Any],
    geometry: RowGeometry,
    *,
    seed: int,
    chunk: int,
    num_chunks: int = 4,
    spans: Spans | None = None,
    is_paired: bool = False,
) -> RowFill:
    """How full the rows of a stage are, from the first chunks of the corpus.

    Args:
        document_lengths: [d] tokens of every document.
        geometry: of the stage.
        seed: of the run.
        chunk: documents that are packed together.
        num_chunks: chunks to look at, at most one epoch.
        spans: of the documents; None: plain text.
        is_paired: as of `RowStream`.
    """
    documents = min(len(document_lengths), num_chunks * chunk)
    stream = RowStream(document_lengths, seed, chunk, spans=spans, is_paired=is_paired)
    num_document = num_forward = num_rows = num_segments = 0
    while True:
        plan = stream.next(geometry)
        state = stream.state_dict()
        if num_rows and (state["epoch"] > 0 or state["chunk_index"] * chunk >= documents):
            break
        lengths, of_segments = plan.segments[:, LENGTH], segment_spans(spans, plan.segments)
        num_document += row_document_tokens(geometry, lengths, of_segments)
        num_forward += row_forward_tokens(geometry, lengths, of_segments)
        num_rows, num_segments = num_rows + 1, num_segments + len(lengths)
    num_dropped = state["num_dropped"]
    padding = geometry.row_length - num_forward / num_rows
    dropped_share = num_dropped / (num_dropped + num_segments)
    return RowFill(num_document / num_rows, num_forward / num_rows, padding, dropped_share)

"""Which tokens of a document may carry a loss: spans beside the tokens, which packing reads without the tokens.

A document is fixed context, except where a span says otherwise:

    FIXED     read as it is, in every copy (prompts, tool results, padding of a conversation)
    MASKABLE  may be masked, and carries a loss where it is
    MASKED    shows the mask token in every noisy view, without a loss; the clean copy holds the real token

Spans that touch each other are one turn (see `data.noisy_blocks`), so a span of fixed tokens stands between two parts
of one answer. A source without spans is plain text: every token is maskable.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

FIXED, MASKABLE, MASKED = KINDS = 0, 1, 2
# Columns of a span; its tokens are START..STOP - 1 of the document.
START, STOP, KIND = 0, 1, 2

IntArray = NDArray[np.int64]


@dataclass(frozen=True)
class Spans:
    """Spans of many documents (or segments), in order and without overlap in each.

    Attributes:
        bounds: [d + 1] int64, spans of document i are rows bounds[i] to bounds[i + 1] of the table; from 0.
        table: [k, 3] int32 or int64 (start, stop, kind), often memory-mapped.
    """

    bounds: NDArray[np.int64]
    table: NDArray[np.integer]

    @classmethod
    def of_lists(cls, documents: list[list[tuple[int, int, int]]]) -> Spans:
        """From a list of (start, stop, kind) for every document."""
        counts = [len(spans) for spans in documents]
        flat = [span for spans in documents for span in spans]
        return cls(np.cumsum([0, *counts]), np.array(flat, dtype=np.int64).reshape(-1, 3))

    @property
    def owner(self) -> IntArray:
        """[k] int64, the document of each span."""
        return np.repeat(np.arange(len(self.bounds) - 1), np.diff(self.bounds))

    def take(self, documents: IntArray) -> Spans:
        """The spans of some documents.

        Args:
            documents: [p] int64; a document may come several times.

        Raises:
            ValueError: the bounds of one of them are damaged.
        """
        first, end = self.bounds[documents], self.bounds[documents + 1]
        is_right = (first >= 0) & (first <= end) & (end <= len(self.table))
        if not is_right.all():
            wrong = int(np.argmin(is_right))
            raise ValueError(
                f"spans {int(first[wrong])} to {int(end[wrong])} of document {int(documents[wrong])} must lie among "
                f"the {len(self.table)} spans of the file, which is damaged; write or copy it again."
            )
        counts = end - first
        bounds = np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)])
        rows = np.arange(bounds[-1]) + np.repeat(first - bounds[:-1], counts)
        return Spans(bounds, np.asarray(self.table[rows], dtype=np.int64))

    def clip(self, offsets: IntArray, lengths: IntArray) -> Spans:
        """What lies in one part of each document, counted from the part's first token.

        Args:
            offsets: [d] int64 first token of the part.
            lengths: [d] int64 tokens of the part.
        """
        table, owner = np.array(self.table, dtype=np.int64), self.owner
        table[:, :KIND] -= offsets[owner, None]
        table[:, START] = np.maximum(table[:, START], 0)
        table[:, STOP] = np.minimum(table[:, STOP], lengths[owner])
        return self._keep(table, owner, table[:, START] < table[:, STOP])

    def maskable(self) -> Spans:
        """Only what may carry a loss."""
        return self._keep(self.table, self.owner, self.table[:, KIND] == MASKABLE)

    def kinds(self, lengths: IntArray) -> NDArray[np.uint8]:
        """The kind of every token, documents one after the other.

        Args:
            lengths: [d] int64 tokens of the documents.

        Returns:
            [sum of lengths] uint8.
        """
        shift = (np.cumsum(lengths) - lengths)[self.owner]
        # +kind where a span begins and -kind where it ends: the running sum is the kind.
        steps = np.zeros(int(lengths.sum()) + 1, dtype=np.int64)
        np.add.at(steps, self.table[:, START] + shift, self.table[:, KIND])
        np.subtract.at(steps, self.table[:, STOP] + shift, self.table[:, KIND])
        return np.cumsum(steps[:-1]).astype(np.uint8)

    def check(self, documents: IntArray, lengths: IntArray) -> None:
        """Compare the spans of documents with their lengths.

        Args:
            documents: [d] int64 numbers of the documents, for the message.
            lengths: [d] int64 their tokens.

        Raises:
            ValueError: naming the first document with a span that is empty, outside, out of order or of no kind.
        """
        owner, table = self.owner, self.table
        earliest = np.zeros(len(table), dtype=np.int64)
        earliest[1:] = np.where(owner[1:] == owner[:-1], table[:-1, STOP], 0)
        is_right = (earliest <= table[:, START]) & (table[:, START] < table[:, STOP])
        is_right &= (table[:, STOP] <= lengths[owner]) & np.isin(table[:, KIND], KINDS)
        if not is_right.all():
            wrong = int(np.argmin(is_right))
            start, stop, kind = (int(value) for value in table[wrong])
            raise ValueError(
                f"span ({start}, {stop}, kind {kind}) of document {int(documents[owner[wrong]])} "
                f"({int(lengths[owner[wrong]])} tokens) must lie in the document behind the spans before it, with "
                f"start < stop and kind {FIXED}, {MASKABLE} or {MASKED}; write the spans again."
            )

    def _keep(self, table: NDArray[np.integer], owner: IntArray, is_kept: NDArray[np.bool_]) -> Spans:
        counts = np.bincount(owner[is_kept], minlength=len(self.bounds) - 1)
        return Spans(np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)]), table[is_kept])


class SpanTable(Protocol):
    """Spans of documents that are taken by number: `Spans`, or those of several corpora."""

    def take(self, documents: IntArray) -> Spans | None:
        """The spans of [p] int64 documents; None where these are plain text."""


def segment_spans(spans: SpanTable | None, segments: IntArray) -> Spans | None:
    """The spans of segments, counted from each segment's first token; None for plain text.

    Args:
        spans: of all documents of a source.
        segments: [p, 4] int64 (document, offset, length, ordinal), see `data.packing`.
    """
    if spans is None:
        return None
    document, offset, length = segments[:, 0], segments[:, 1], segments[:, 2]
    taken = spans.take(document)
    return None if taken is None else taken.clip(offset, length)

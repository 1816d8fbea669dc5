"""Spans of documents and of their parts, against lists of kinds."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_dllm.data.spans import MASKABLE, MASKED, Spans, segment_spans
from tests.unit.data.random_spans import expected_kinds, random_spans

LENGTHS = [17, 1, 30, 8, 25]


def test_by_hand() -> None:
    spans = Spans.of_lists([[(2, 4, MASKABLE), (4, 5, MASKED)], [], [(0, 3, MASKABLE)]])
    assert spans.bounds.tolist() == [0, 2, 2, 3] and spans.owner.tolist() == [0, 0, 2]
    assert spans.kinds(np.array([6, 2, 3])).tolist() == [0, 0, 1, 1, 2, 0, 0, 0, 1, 1, 1]
    assert spans.maskable().table.tolist() == [[2, 4, MASKABLE], [0, 3, MASKABLE]]
    assert spans.maskable().bounds.tolist() == [0, 1, 1, 2]


@pytest.mark.parametrize("seed", range(5))
def test_segments_have_the_kinds_of_their_tokens(seed: int) -> None:
    spans = random_spans(LENGTHS, seed)
    segments = np.array([[2, 0, 16, 0], [4, 16, 9, 1], [0, 3, 14, 2], [2, 16, 14, 3], [1, 0, 1, 4]])
    found = segment_spans(spans, segments)
    assert found is not None
    expected = [kind for d, o, n, _ in segments.tolist() for kind in expected_kinds(spans, d, LENGTHS[d])[o : o + n]]
    assert found.kinds(segments[:, 2]).tolist() == expected and any(expected)


def test_plain_text_has_no_spans() -> None:
    assert segment_spans(None, np.zeros((1, 4), dtype=np.int64)) is None


def test_no_documents_and_documents_without_spans() -> None:
    spans = Spans.of_lists([[], []])
    assert spans.take(np.array([1, 0])).kinds(np.array([2, 1])).tolist() == [0, 0, 0]
    assert spans.take(np.zeros(0, dtype=np.int64)).table.shape == (0, 3)


@pytest.mark.parametrize(
    "wrong",
    [(5, 11, 1), (5, 5, 1), (-1, 3, 1), (1, 3, 1), (6, 5, 2), (5, 6, 3)],
    ids=["outside", "empty", "before", "overlap", "backwards", "unknown"],
)
def test_wrong_spans_are_refused(wrong: tuple[int, int, int]) -> None:
    documents, lengths = np.array([7, 9]), np.array([4, 10])
    Spans.of_lists([[(0, 4, 1)], [(0, 2, 1), (5, 6, 2)]]).check(documents, lengths)
    spans = Spans.of_lists([[(0, 4, 1)], [(0, 2, 1), wrong]])
    with pytest.raises(ValueError, match=r"span \(.*\) of document 9 \(10 tokens\) must lie in the document"):
        spans.check(documents, lengths)


def test_damaged_bounds_are_refused() -> None:
    spans = Spans(np.array([0, 3, 2]), np.array([[0, 1, 1], [2, 3, 1]]))
    with pytest.raises(ValueError, match=r"spans 0 to 3 of document 0 must lie among the 2 spans of the file"):
        spans.take(np.array([0]))
    with pytest.raises(ValueError, match=r"spans 3 to 2 of document 1"):
        spans.take(np.array([1]))

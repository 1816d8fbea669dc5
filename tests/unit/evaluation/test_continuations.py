"""Continuations as documents: what is fixed, what is scored, what stands behind."""

from __future__ import annotations

import pytest

from megatron_dllm.data.spans import MASKABLE, MASKED
from megatron_dllm.evaluation.continuations import Continuation, source_of

EOS = 9
ITEMS = [Continuation((1, 2, 3, 4, 5, 6), (7, 7, 7), 3), Continuation((1,), (2, 3, 4), 3), Continuation((), (5,), 4)]


@pytest.mark.parametrize(
    ("fill", "kind", "added"), [("mask", MASKED, (3, 0, 3)), ("none", None, (0, 0, 0)), ("eos", MASKABLE, (3, 0, 3))]
)
def test_what_stands_behind_a_continuation(fill: str, kind: int | None, added: tuple[int, ...]) -> None:
    source = source_of(ITEMS, 4, fill, 64, EOS)
    for item, document, start, number in zip(ITEMS, source.documents, source.spans.bounds, added, strict=False):
        stop = len(item.context) + len(item.tokens)
        assert document == (*item.context, *item.tokens, *[EOS] * number)
        spans = source.spans.table[start : start + 1 + bool(number)].tolist()
        expected = [[len(item.context), stop, MASKABLE]]
        assert spans == expected + [[stop, stop + number, kind]] * bool(number)


def test_ids_tell_siblings_apart_and_leave_their_key() -> None:
    source = source_of(ITEMS, 4, "mask", 64, EOS)
    ids = [source.sample_id(place, 0) for place in range(3)]
    assert len(set(ids)) == 3 and [number >> 20 for number in ids] == [3, 3, 4]


@pytest.mark.parametrize(("fill", "expected"), [("mask", [2, 1]), ("none", [2, 1]), ("eos", [2, 4])])
def test_scored_tokens_by_block(fill: str, expected: list[int]) -> None:
    assert ITEMS[0].num_scored(4, fill, 64) == expected
    # A window of 10 ends the last block after two tokens.
    assert ITEMS[0].num_scored(4, fill, 10) == [2, min(expected[1], 2)]

"""Documents of several corpora, told apart by their numbers."""

from __future__ import annotations

import numpy as np

from megatron_dllm.data.blend import Blend, first_number
from megatron_dllm.data.spans import segment_spans
from tests.unit.data.made_sources import MadeSource

TEXT, CHAT = MadeSource("text", 7, 20), MadeSource("chat", 8, 20, answers=True)
BLEND = Blend({0: TEXT, 3: CHAT})


def test_a_document_is_read_from_its_corpus() -> None:
    document = 5 + first_number(3)
    assert BLEND.read(document, 0, 1).tolist() == [8] and BLEND.read(5, 0, 1).tolist() == [7]
    assert BLEND.sample_id(document, 1) == 5001 + 3 * 2**48 and BLEND.sample_id(5, 1) == 5001
    assert (BLEND.name, BLEND.num_tokens) == ("text, chat", TEXT.num_tokens + CHAT.num_tokens)


def test_spans_are_those_of_the_row_s_corpus() -> None:
    segments = np.array([[5, 0, int(CHAT.document_lengths[5]), 0]])
    expected = segment_spans(CHAT.spans, segments)
    found = segment_spans(BLEND.spans, segments + np.array([first_number(3), 0, 0, 0]))
    assert found is not None and expected is not None and found.table.tolist() == expected.table.tolist()
    assert segment_spans(BLEND.spans, segments) is None, "a row of text"
    assert segment_spans(BLEND.spans, segments[:0]) is None, "a row of padding"
    assert Blend({0: TEXT}).spans is None

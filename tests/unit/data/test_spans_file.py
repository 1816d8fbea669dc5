"""PREFIX.spans: what was written is read again, and a damaged file is refused in one sentence."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from megatron_dllm.data.spans import Spans
from megatron_dllm.data.spans_file import read_spans, write_spans
from tests.full_disk import full_disk
from tests.tiny_models import left_in
from tests.unit.data.random_spans import random_spans

LENGTHS = [17, 1, 30, 8, 25]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "text.spans"
    write_spans(path, random_spans(LENGTHS))
    return path


def test_round_trip(path: Path) -> None:
    expected, found = random_spans(LENGTHS), read_spans(path, 5)
    np.testing.assert_array_equal(found.bounds, expected.bounds)
    np.testing.assert_array_equal(found.table, expected.table)
    assert isinstance(found.table.base, np.ndarray) and len(expected.table) > 5
    assert [file.name for file in path.parent.iterdir()] == ["text.spans"]


def test_no_spans_at_all(tmp_path: Path) -> None:
    write_spans(tmp_path / "empty.spans", Spans.of_lists([[], []]))
    assert read_spans(tmp_path / "empty.spans", 2).table.shape == (0, 3)


def test_an_existing_file_is_kept(path: Path) -> None:
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"text\.spans exists and is not overwritten"):
        write_spans(path, Spans.of_lists([[]]))
    assert path.read_bytes() == before


@pytest.mark.parametrize("size", [0, 10, 24, 60, -1])
def test_a_file_that_is_cut_off_is_refused(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ValueError, match=r"bytes of header\) must be a spans file|cut off or damaged"):
        read_spans(path, 5)


def test_another_file_is_refused(path: Path) -> None:
    path.write_bytes(b"MMIDIDX\x00" + path.read_bytes()[8:])
    with pytest.raises(ValueError, match="must be a spans file of version 1"):
        read_spans(path, 5)


def test_spans_of_another_corpus_are_refused(path: Path) -> None:
    with pytest.raises(ValueError, match=r"\(5 documents\) must be of its corpus \(6 documents\)"):
        read_spans(path, 6)


def test_bounds_that_do_not_end_at_the_last_span_are_refused(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[24 + 8 * 5] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"must begin at 0 and end at"):
        read_spans(path, 5)


def test_a_disk_that_is_full_leaves_no_part_of_the_spans(tmp_path: Path) -> None:
    with full_disk(10), pytest.raises(OSError, match=r"File too large: '.*/corpus\.spans'"):
        write_spans(tmp_path / "corpus.spans", Spans.of_lists([[(0, 2, 1)]]))
    assert not left_in(tmp_path)

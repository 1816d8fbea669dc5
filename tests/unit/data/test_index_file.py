"""An index whose lengths, pointers and boundaries do not agree is refused, naming the document."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from megatron_dllm.data.index_file import check_files, check_index
from tests.unit.data.conftest import random_documents

DOCUMENTS = random_documents(9)
HEADER, LENGTHS, POINTERS = 34, 4 * 9, 8 * 9


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_a_whole_index_gives_the_number_of_tokens(write_corpus: Callable[..., str], dtype: type) -> None:
    assert check_index(write_corpus(DOCUMENTS, dtype=dtype)) == sum(map(len, DOCUMENTS))
    assert check_index(write_corpus([[], [5], []], "with_empty")) == 1


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (HEADER + 4 * 3, struct.pack("<i", 1000), "document 4 "),
        (HEADER + 4 * 3, struct.pack("<i", -2), r"document 3 \(-2 tokens"),
        (HEADER + LENGTHS + 8 * 5, struct.pack("<q", 2), r"document 5 \(.* from byte 2 on\) must begin where"),
        (HEADER + LENGTHS + POINTERS, struct.pack("<q", 1), "document 0 "),
        (
            HEADER + LENGTHS + POINTERS + 8 * 9,
            struct.pack("<q", 8),
            r"last boundary \(8\) must be the number of .* \(9\)",
        ),
    ],
)
def test_one_wrong_number(write_corpus: Callable[..., str], place: int, value: bytes, message: str) -> None:
    path = Path(write_corpus(DOCUMENTS) + ".idx")
    content = bytearray(path.read_bytes())
    content[place : place + len(value)] = value
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        check_files(str(path.with_suffix("")))
        check_index(str(path.with_suffix("")))


def test_two_lengths_that_were_swapped(write_corpus: Callable[..., str]) -> None:
    """Their sum is right, and so is the size of every file."""
    path = Path(write_corpus(DOCUMENTS) + ".idx")
    content = bytearray(path.read_bytes())
    first, second = HEADER + 4 * 2, HEADER + 4 * 6
    assert content[first : first + 4] != content[second : second + 4]
    content[first : first + 4], content[second : second + 4] = (
        content[second : second + 4],
        content[first : first + 4],
    )
    path.write_bytes(content)
    with pytest.raises(ValueError, match="document 3 "):
        check_index(str(path.with_suffix("")))

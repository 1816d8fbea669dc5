"""Every page of a corpus has a checksum that finds a changed byte, and the whole a fingerprint of its content."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from megatron_dllm.data.sums_file import (
    FILES,
    PAGE_BYTES,
    content_fingerprint,
    read_sums,
    sampled_fingerprint,
    write_sums,
)
from tests.full_disk import full_disk
from tests.tiny_models import left_in

# Three pages of .bin and one of .idx.
DOCUMENTS = [np.random.default_rng(seed).integers(3, 500, 4000).tolist() for seed in range(5)]


@pytest.fixture
def prefix(write_corpus: Callable[..., str]) -> str:
    return write_corpus(DOCUMENTS)


def flip(path: Path, place: int) -> None:
    """Change one bit of a file."""
    content = bytearray(path.read_bytes())
    content[place] ^= 16
    path.write_bytes(content)


def test_a_changed_byte_is_found_on_its_page_alone(prefix: str) -> None:
    write_sums(prefix)
    path = Path(prefix + ".bin")
    flip(path, PAGE_BYTES + 5)
    sums = read_sums(prefix)
    assert sums is not None
    content = np.fromfile(path, np.uint8)
    sums.files[".bin"].check(content, [0, 2])
    with pytest.raises(
        ValueError, match=r"corpus.bin \(bytes 16384 to 32767\) differs from its checksum in corpus.sums"
    ):
        sums.files[".bin"].check(content, [0, 1, 2])
    with pytest.raises(ValueError, match="differs from its checksum"):
        sums.files[".bin"].check_some(3)


def test_pages_of_bytes(prefix: str) -> None:
    write_sums(prefix)
    sums = read_sums(prefix)
    assert sums is not None
    pages_of = sums.files[".bin"].pages_of
    assert [list(pages_of(*part)) for part in [(0, 1), (0, PAGE_BYTES), (PAGE_BYTES - 1, PAGE_BYTES + 1)]] == [
        [0],
        [0],
        [0, 1],
    ]


def test_the_fingerprint_is_of_the_content_and_not_of_the_name(prefix: str, write_corpus: Callable[..., str]) -> None:
    fingerprint = write_sums(prefix)
    sums = read_sums(prefix)
    assert sums is not None and sums.fingerprint == fingerprint == content_fingerprint(prefix)
    for suffix in FILES[:2]:
        shutil.copy(prefix + suffix, prefix + "_copy" + suffix)
    assert write_sums(prefix + "_copy") == fingerprint
    reordered = write_corpus([*DOCUMENTS[::-1]], "reordered")
    assert write_sums(reordered) != fingerprint
    Path(prefix + ".spans").write_bytes(b"any")
    assert content_fingerprint(prefix) != fingerprint


def test_a_sample_stands_for_a_content_that_was_not_recorded(prefix: str, write_corpus: Callable[..., str]) -> None:
    expected_fingerprint = sampled_fingerprint(prefix)
    assert expected_fingerprint.startswith("sampled-") and sampled_fingerprint(prefix) == expected_fingerprint
    assert sampled_fingerprint(write_corpus(DOCUMENTS[::-1], "reordered")) != expected_fingerprint
    # Two of three pages: a change in the one between is not seen, one in the last is.
    few = sampled_fingerprint(prefix, 2)
    flip(Path(prefix + ".bin"), PAGE_BYTES + 5)
    assert sampled_fingerprint(prefix, 2) == few and sampled_fingerprint(prefix) != expected_fingerprint
    flip(Path(prefix + ".bin"), 2 * PAGE_BYTES + 5)
    assert sampled_fingerprint(prefix, 2) != few


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content[:-1], r"corpus.sums \(.* bytes\) must have .* bytes for 4 pages"),
        (lambda content: content[:20], r"corpus.sums \(20 bytes of header\) must hold the checksums"),
        (lambda content: b"X" + content[1:], "must hold the checksums of a corpus"),
    ],
)
def test_damaged_sums(prefix: str, change: Callable[[bytes], bytes], message: str) -> None:
    write_sums(prefix)
    path = Path(prefix + ".sums")
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(ValueError, match=message):
        read_sums(prefix)


def test_files_of_other_sizes(prefix: str) -> None:
    assert read_sums(prefix) is None
    write_sums(prefix)
    Path(prefix + ".spans").write_bytes(b"any")
    with pytest.raises(ValueError, match=r"corpus.spans \(3 bytes\) must have the 0 bytes that corpus.sums names"):
        read_sums(prefix)


def test_a_disk_that_is_full_leaves_no_part_of_the_sums(prefix: str) -> None:
    before = left_in(Path(prefix).parent)
    with full_disk(10), pytest.raises(OSError, match=r"File too large: '.*\.sums'"):
        write_sums(prefix)
    assert left_in(Path(prefix).parent) == before

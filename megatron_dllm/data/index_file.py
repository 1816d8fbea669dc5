"""PREFIX.idx, Megatron's index of a corpus: where each document begins in PREFIX.bin, and how long it is.

The file in bytes:

    magic, version, dtype code, documents d, boundaries d + 1     34 bytes
    lengths in tokens                                             d x int32
    pointers: the first byte of each document                     d x int64
    boundaries: 0, 1, ... d                                       (d + 1) x int64
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from megatron.core.datasets.indexed_dataset import DType
from numpy.typing import NDArray

_IDX_HEADER = struct.Struct("<9sQBQQ")  # magic, version, dtype code, sequences, document boundaries
_IDX_MAGIC = b"MMIDIDX\x00\x00"
_DOCUMENTS_AT_A_TIME = 2**20


@dataclass(frozen=True)
class Header:
    """What an index says of itself: bytes of a token, documents, and boundaries between documents."""

    token_bytes: int
    num_sequences: int
    num_boundaries: int

    @property
    def file_size(self) -> int:
        """Bytes of the .idx file: lengths, pointers and document boundaries behind the header."""
        return _IDX_HEADER.size + self.num_sequences * (4 + 8) + self.num_boundaries * 8


def read_header(path: Path) -> Header:
    """Read the first bytes of an index.

    Raises:
        ValueError: it is no index of integers.
    """
    with path.open("rb") as file:
        raw = file.read(_IDX_HEADER.size)
    if len(raw) < _IDX_HEADER.size or not raw.startswith(_IDX_MAGIC):
        raise ValueError(f"{path} ({len(raw)} bytes of header) must be a Megatron index; tokenize the corpus again.")
    _, version, code, num_sequences, num_boundaries = _IDX_HEADER.unpack(raw)
    names = {dtype.value: dtype.name for dtype in DType}
    if version != 1 or "int" not in names.get(code, ""):
        raise ValueError(
            f"{path} (version {version}, dtype code {code}) must be a version 1 index of integers; "
            "tokenize the corpus again."
        )
    return Header(DType.size(code), num_sequences, num_boundaries)


def check_files(prefix: str) -> None:
    """Compare the sizes of PREFIX.bin and PREFIX.idx with each other, whatever their size.

    Raises:
        ValueError: one is missing, cut off, empty, or of another corpus.
    """
    paths = {suffix: Path(prefix + suffix) for suffix in (".bin", ".idx")}
    for path in paths.values():
        if not path.is_file():
            raise ValueError(
                f"corpus {prefix} has no {path.name}; give the prefix, without suffix, that "
                "python -m megatron_dllm.data.tokenize wrote (--output)."
            )
    header = read_header(paths[".idx"])
    idx_size, bin_size = (paths[suffix].stat().st_size for suffix in (".idx", ".bin"))
    if idx_size != header.file_size:
        raise ValueError(
            f"{paths['.idx']} ({idx_size} bytes) must have {header.file_size} bytes for its "
            f"{header.num_sequences} documents; it is cut off or damaged: tokenize or copy it again."
        )
    if header.num_sequences == 0 or bin_size == 0:
        raise ValueError(
            f"corpus {prefix} ({header.num_sequences} documents, {bin_size} bytes) is empty; tokenize text that is not."
        )
    if header.num_boundaries != header.num_sequences + 1:
        raise ValueError(
            f"corpus {prefix} ({header.num_sequences} sequences in {header.num_boundaries - 1} documents) "
            "must have one sequence a document; tokenize it without splitting sentences."
        )
    _check_last_boundary(paths[".idx"], header)
    expected = _end_of_last_sequence(paths[".idx"], header)
    if bin_size != expected:
        raise ValueError(
            f"{paths['.bin']} ({bin_size} bytes) must have the {expected} bytes that its .idx names; "
            "it is cut off or belongs to another index: tokenize or copy it again."
        )


def _check_last_boundary(path: Path, header: Header) -> None:
    """Megatron's reader asserts it."""
    last = int(_columns(path, header)[2][-1])
    if last != header.num_sequences:
        raise ValueError(
            f"{path}: the last boundary ({last}) must be the number of documents ({header.num_sequences}); the index "
            "is damaged: tokenize or copy it again."
        )


def _end_of_last_sequence(path: Path, header: Header) -> int:
    lengths, pointers, _ = _columns(path, header)
    return int(pointers[-1]) + int(lengths[-1]) * header.token_bytes


def check_index(prefix: str) -> int:
    """Compare every length with the pointers: each document must begin where the one before it ends.

    Reads the whole index (20 bytes a document), some million documents at a time.

    Args:
        prefix: of a corpus that `check_files` has passed.

    Returns:
        Tokens of all documents.

    Raises:
        ValueError: naming the first document that is out of place.
    """
    path = Path(prefix + ".idx")
    header = read_header(path)
    lengths, pointers, boundaries = _columns(path, header)
    end = 0  # bytes of the documents so far
    for start in range(0, header.num_sequences, _DOCUMENTS_AT_A_TIME):
        part = slice(start, start + _DOCUMENTS_AT_A_TIME)
        sizes = lengths[part].astype(np.int64) * header.token_bytes
        ends = end + np.cumsum(sizes)
        is_right = (sizes >= 0) & (pointers[part] == ends - sizes)
        is_right &= boundaries[:-1][part] == start + np.arange(len(sizes))
        if not is_right.all():
            wrong = start + int(np.argmin(is_right))
            raise ValueError(
                f"{path}: document {wrong} ({int(lengths[wrong])} tokens from byte {int(pointers[wrong])} on) must "
                "begin where the document before it ends; the index is damaged: tokenize or copy it again."
            )
        end = int(ends[-1])
    return end // header.token_bytes


def _columns(path: Path, header: Header) -> tuple[NDArray[np.int32], NDArray[np.int64], NDArray[np.int64]]:
    """[d] lengths, [d] pointers and [d + 1] boundaries of an index, memory-mapped."""
    content = np.memmap(path, mode="r", dtype=np.uint8)
    lengths_end = _IDX_HEADER.size + 4 * header.num_sequences
    pointers_end = lengths_end + 8 * header.num_sequences
    return (
        content[_IDX_HEADER.size : lengths_end].view("<i4"),
        content[lengths_end:pointers_end].view("<i8"),
        content[pointers_end : header.file_size].view("<i8"),
    )

"""PREFIX.spans, beside a corpus: one small header, then where each document's spans begin, then the spans.

    magic "DLLMSPN" + version 1     8 bytes
    documents d, spans k            2 x uint64
    bounds                          (d + 1) x int64, from 0 to k
    table                           k x 3 x int32 (start, stop, kind)

All numbers are little-endian. Opening reads the header and the two ends of the bounds, whatever the size; spans
themselves are checked by those who pack them, a chunk at a time (`Spans.check`).
"""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np

from megatron_dllm.data.spans import Spans
from megatron_dllm.run.files import replacing

_HEADER = struct.Struct("<8sQQ")
_MAGIC = b"DLLMSPN\x01"


def write_spans(path: Path, spans: Spans) -> None:
    """Write a file that is complete or absent.

    Raises:
        ValueError: the file exists.
    """
    if path.exists():
        raise ValueError(f"{path} exists and is not overwritten; remove it or choose another prefix.")
    with replacing(path) as file:
        file.write(_HEADER.pack(_MAGIC, len(spans.bounds) - 1, len(spans.table)))
        file.write(np.ascontiguousarray(spans.bounds, dtype="<i8").tobytes())
        file.write(np.ascontiguousarray(spans.table, dtype="<i4").tobytes())


def read_spans(path: Path, num_documents: int) -> Spans:
    """Map a file into memory.

    Args:
        path: PREFIX.spans.
        num_documents: of the corpus beside it.

    Raises:
        ValueError: it is cut off, damaged, or of another corpus.
    """
    with path.open("rb") as file:
        raw = file.read(_HEADER.size)
    if len(raw) < _HEADER.size or not raw.startswith(_MAGIC):
        raise ValueError(f"{path} ({len(raw)} bytes of header) must be a spans file of version 1; write it again.")
    _, stated_documents, num_spans = _HEADER.unpack(raw)
    size, expected_size = path.stat().st_size, _HEADER.size + 8 * (stated_documents + 1) + 12 * num_spans
    if size != expected_size:
        raise ValueError(
            f"{path} ({size} bytes) must have {expected_size} bytes for its {num_spans} spans; it is cut off or "
            "damaged: write or copy it again."
        )
    if stated_documents != num_documents:
        raise ValueError(
            f"{path} ({stated_documents} documents) must be of its corpus ({num_documents} documents); the files are "
            "of different runs: write it again."
        )
    content = np.memmap(path, mode="r", dtype=np.uint8)
    end_of_bounds = _HEADER.size + 8 * (num_documents + 1)
    bounds = content[_HEADER.size : end_of_bounds].view("<i8")
    if bounds[0] != 0 or bounds[-1] != num_spans:
        raise ValueError(
            f"{path} (spans {int(bounds[0])} to {int(bounds[-1])}) must begin at 0 and end at {num_spans}; it is "
            "damaged: write or copy it again."
        )
    return Spans(bounds, content[end_of_bounds:].view("<i4").reshape(-1, 3))

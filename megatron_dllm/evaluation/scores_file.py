"""PREFIX.scores: the scores that one checkpoint gives the documents of a corpus, computed once and read by training.

    magic "DLLMSCR" + version 1     8 bytes
    length of the header            uint64
    header                          JSON in UTF-8: what the scores depend on, and where a scoring that goes on stands
    scores                          epochs x documents x views, float32, nats
    SHA-256 of everything above     32 bytes

All numbers are little-endian. The noise of a document is a pure function of the seed, its sample id, the epoch and the
view, so another run of the same settings puts the same masks before its model: the header says which settings these
are, and a run with others is refused. 1.5 million pairs with 8 views take 96 MB an epoch.

A scoring that goes on keeps what it has in FILE.partial, from which the same command continues.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megatron_dllm.checkpoint.typed import read_fields
from megatron_dllm.evaluation.scores_header import REMEDY, ScoresHeader
from megatron_dllm.run.files import TEMPORARY_PREFIX, naming, parse_json
from megatron_dllm.run.stream import PARTIAL

_PREFIX = struct.Struct("<8sQ")
_MAGIC = b"DLLMSCR\x01"
_DIGEST_BYTES = 32
_POSITION = "position"
_CHUNK = 1 << 22


@dataclass(frozen=True)
class StoredScores:
    """The scores of a file.

    Attributes:
        header: what they depend on.
        by_view: [e, d, k] fp32, memory-mapped: epochs, documents, views.
    """

    header: ScoresHeader
    by_view: NDArray[np.float32]

    def of(self, sample_ids: Tensor, epochs: Tensor) -> Tensor:
        """[n, k] fp64 the scores of documents under each view.

        Args:
            sample_ids: [n] int64, which are the numbers of the documents, see `data.preference`.
            epochs: [n] int64.
        """
        num_epochs, num_documents, _ = self.header.shape
        ids, passes = sample_ids.numpy(), epochs.numpy()
        assert not len(ids) or (ids.min() >= 0 and ids.max() < num_documents and passes.max() < num_epochs), (
            f"scores of sample {ids.max()} in epoch {passes.max()} of {num_documents} documents, {num_epochs} epochs"
        )
        return torch.from_numpy(self.by_view[passes, ids].astype(np.float64))


@dataclass(frozen=True)
class Begun:
    """A scoring that was interrupted.

    Attributes:
        by_view: [e, d, k] fp32, memory-mapped; NaN where there is no score yet.
        position: of the sequence of rows, behind the last one that was scored.
    """

    by_view: NDArray[np.float32]
    position: Mapping[str, Any]

    @property
    def num_scored(self) -> int:
        """Documents that have their scores, counted once for each epoch."""
        return int(np.isfinite(self.by_view).all(axis=-1).sum())


def partial_path(path: Path) -> Path:
    """Where the scoring for a file keeps what it has."""
    return path.with_name(path.name + PARTIAL)


def write_scores(path: Path, header: ScoresHeader, by_view: NDArray[np.float32]) -> None:
    """Write a file that is complete or absent; an earlier one is replaced, and what its scoring kept goes.

    Args:
        path: of the file.
        header: what the scores depend on.
        by_view: [e, d, k] fp32, all of them finite.
    """
    assert np.isfinite(by_view).all(), "a document has no score"
    _write(path, header, by_view, None)
    partial_path(path).unlink(missing_ok=True)


def write_begun(path: Path, header: ScoresHeader, by_view: NDArray[np.float32], position: Mapping[str, Any]) -> None:
    """Keep what a scoring has so far.

    Args:
        path: of the file that it is for.
        header: what the scores depend on.
        by_view: [e, d, k] fp32; NaN where there is no score yet.
        position: of the sequence of rows.
    """
    _write(partial_path(path), header, by_view, position)


def read_begun(path: Path, header: ScoresHeader) -> Begun | None:
    """What an interrupted scoring with the same settings has kept; None where that is nothing, or damaged.

    Args:
        path: of the file that it is for.
        header: of the scoring that would go on.
    """
    kept = partial_path(path)
    if not kept.is_file():
        return None
    try:
        found, position, by_view = _open(kept)
        check_content(kept)
    except ValueError:
        return None
    return Begun(by_view, position) if position is not None and found == header else None


def _write(path: Path, header: ScoresHeader, by_view: NDArray[np.float32], position: Mapping[str, Any] | None) -> None:
    """Write a file under a temporary name first; `by_view` is [e, d, k] fp32."""
    assert by_view.shape == header.shape, f"scores of shape {by_view.shape}, a header of {header.shape}"
    described = json.dumps(asdict(header) | {_POSITION: position}, sort_keys=True).encode()
    parts = [_PREFIX.pack(_MAGIC, len(described)), described, np.ascontiguousarray(by_view, "<f4").tobytes()]
    digest = hashlib.sha256()
    temporary = path.with_name(f"{TEMPORARY_PREFIX}{path.name}.{os.getpid()}")
    try:
        with naming(path), temporary.open("wb") as file:
            for part in parts:
                digest.update(part)
                file.write(part)
            file.write(digest.digest())
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def open_scores(path: Path) -> StoredScores:
    """Map a file into memory; what it holds is not looked at.

    Raises:
        ValueError: it is missing, cut off, or no file of scores.
    """
    if not path.is_file():
        raise ValueError(f"{path} is no file: the scores of a checkpoint are needed; {REMEDY}.")
    header, position, by_view = _open(path)
    if position is not None:
        raise ValueError(f"{path} is of a scoring that has not ended; give its command again, which goes on.")
    return StoredScores(header, by_view)


def _open(path: Path) -> tuple[ScoresHeader, Mapping[str, Any] | None, NDArray[np.float32]]:
    """Header, position of a scoring that goes on, and [e, d, k] fp32 scores, memory-mapped."""
    with path.open("rb") as file:
        start = file.read(_PREFIX.size)
        if len(start) < _PREFIX.size or not start.startswith(_MAGIC):
            raise ValueError(f"{path} ({len(start)} bytes of header) must be a file of scores, version 1; {REMEDY}.")
        _, length = _PREFIX.unpack(start)
        described = file.read(min(length, path.stat().st_size))
    header, position = _header_of(path, described)
    offset = _PREFIX.size + len(described)
    size, expected_size = path.stat().st_size, offset + 4 * int(np.prod(header.shape)) + _DIGEST_BYTES
    if size != expected_size:
        raise ValueError(f"{path} ({size} bytes) must have {expected_size}; it is cut off or damaged: {REMEDY}.")
    return header, position, np.memmap(path, dtype="<f4", mode="r", offset=offset, shape=header.shape)


def check_content(path: Path) -> None:
    """Compare every byte of a file with its checksum, a second for some hundred megabytes.

    Raises:
        ValueError: it was damaged.
    """
    digest = hashlib.sha256()
    with path.open("rb") as file:
        left = path.stat().st_size - _DIGEST_BYTES
        while left > 0 and (part := file.read(min(_CHUNK, left))):
            digest.update(part)
            left -= len(part)
        stated = file.read()
    if stated != digest.digest():
        raise ValueError(f"{path} does not have the checksum it was written with; copy it again, or {REMEDY}.")


def _header_of(path: Path, described: bytes) -> tuple[ScoresHeader, Mapping[str, Any] | None]:
    try:
        content = parse_json(described)
    except ValueError as error:
        raise ValueError(f"{path} is damaged (its header is no JSON: {error}); {REMEDY}.") from None
    noise = content.get("noise") if isinstance(content, dict) else None
    if not isinstance(noise, dict) or type(noise.get("num_views")) is not int:
        raise ValueError(f"{path} is damaged (its header names no noise); {REMEDY}.")
    return read_fields(ScoresHeader, content, f"{path}: ", ignored=(_POSITION,)), content.get(_POSITION)
